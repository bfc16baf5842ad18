"""Every kernel moves the bytes that its operation has to move, and no more, counted in the interpreter."""

import pytest

from tests.kernels import table
from tests.kernels.floor import FLOOR, T

pytestmark = pytest.mark.interpreted

ROOM = 0.04  # of the floor: statistics and weights, in rows and launches as small as these
ASKED_AGAIN = 0.15  # bytes per element: statistics, labels, and weights by programs that have many rows
MOST_PROGRAMS = 4  # that share the rows out among themselves, on a CPU


@pytest.mark.parametrize("name", FLOOR)
def test_no_more_than_the_floor(name: str) -> None:
    from tests.kernels.traffic import measured  # where Triton interprets

    found = measured(name)
    forward, backward = found.moved
    floor = FLOOR[name]
    sums = floor.num_sums * 4 * MOST_PROGRAMS / T
    assert floor.forward <= forward <= floor.forward * (1 + ROOM)
    assert floor.backward <= backward <= floor.backward * (1 + ROOM) + sums
    # Weights come from a cache, row by row; what is of the size of the activations is asked for once.
    assert found.cached[0] <= 2 * floor.num_sums + floor.cached[0] + ASKED_AGAIN
    assert found.cached[1] <= floor.cached[1] + ASKED_AGAIN
    documented = table.read()
    assert documented[name, "forward"][:2] == [f"{forward:.2f}", f"{floor.forward:g}"]
    if floor.backward:
        assert documented[name, "backward"][:2] == [f"{backward:.2f}", f"{floor.backward:g}"]

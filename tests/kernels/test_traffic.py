"""Every kernel moves the bytes that its operation has to move, and no more, counted in the interpreter."""

import pytest
import torch

from tests.kernels.floor import FLOOR, T

pytestmark = pytest.mark.interpreted

ROOM = 0.04  # of the floor: statistics and weights, in rows and launches as small as these
MOST_PROGRAMS = 4  # that share the rows out among themselves, on a CPU


@pytest.mark.parametrize("name", FLOOR)
def test_no_more_than_the_floor(name: str) -> None:
    forward, backward = measured(name)
    floor = FLOOR[name]
    sums = floor.num_sums * 4 * MOST_PROGRAMS / T
    assert floor.forward <= forward <= floor.forward * (1 + ROOM)
    assert floor.backward <= backward <= floor.backward * (1 + ROOM) + sums


def measured(name: str) -> tuple[float, float]:
    """Bytes per element of the forward and of the backward pass."""
    from tests.kernels.traffic import Traffic  # where Triton interprets

    floor, counts = FLOOR[name], []
    with Traffic() as traffic:
        outputs = floor.run()
        counts.append(traffic.read + traffic.written)
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
        counts.append(traffic.read + traffic.written - counts[0])
    return counts[0] / floor.elements, counts[1] / floor.elements

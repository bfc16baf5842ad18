"""Asking a run to stop: signals set a flag, and all ranks agree on it at a step boundary."""

import signal
from types import FrameType, TracebackType

from megagrow.parallel.collectives import any_over
from megagrow.parallel.mesh import Mesh

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While active, ctrl-C and SIGTERM ask for a save at the next step boundary; a second signal ends at once."""

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.name = signal.Signals(number).name

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank has been asked to stop; a collective, so that all ranks stop after the same step."""
        return any_over(bool(self.name), mesh.world)

"""Asking a run to stop: signals set a flag, and all ranks agree on it at a step boundary."""

import signal
import time
from types import FrameType, TracebackType

from megagrow.parallel.collectives import any_over
from megagrow.parallel.mesh import Mesh

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 3.0  # torchrun repeats to its workers the signal that a terminal has sent to all of them


class StopRequest:
    """While active, ctrl-C and SIGTERM ask for a save at the next step boundary; asking again later ends at once."""

    def __init__(self) -> None:
        self.name = ""
        self._asked_at = 0.0
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
        if self.name and time.monotonic() - self._asked_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.name:
            self.name, self._asked_at = signal.Signals(number).name, time.monotonic()

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank has been asked to stop; a collective, so that all ranks stop after the same step."""
        return any_over(bool(self.name), mesh.world)

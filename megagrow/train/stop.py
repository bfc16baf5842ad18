"""Asking a run to stop: signals set a flag, and all ranks agree on it at a step boundary.

Who sends what: ctrl-C is SIGINT; schedulers, Kubernetes and torchrun send SIGTERM; SLURM sends what `--signal` says, by
custom SIGUSR1. All mean the same. torchrun passes SIGINT and SIGTERM on to its workers, SIGUSR1 only when told to with
`--signals-to-handle`; it kills what still runs after `--shutdown-timeout` seconds (30).
"""

import signal
import sys
import time
from types import FrameType

from megagrow.errors import Preempted
from megagrow.parallel.collectives import any_over
from megagrow.parallel.mesh import Mesh

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO_SECONDS = 3.0  # torchrun repeats to its workers the signal that a terminal has sent to all of them
INTERRUPTED = 130  # what shells call a process that ctrl-C has ended


class StopRequest:
    """Signals ask for a save at the next step boundary.

    Before the first step there is nothing to save: a signal ends the run at once. After ctrl-C, asking again later ends
    it at once too. Schedulers repeat their signals while they wait; that changes nothing, since whoever wants no save
    can send SIGKILL.

    Attributes:
        name: of the first signal; empty when there was none.
        is_stepping: whether the run has come to its first step.
    """

    def __init__(self) -> None:
        self.name = ""
        self.is_stepping = False
        self._raises = True
        self._asked_at = 0.0
        self._previous: dict[int, object] = {}

    def listen(self) -> None:
        """From here on a signal ends the run at once and in order."""
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def wait_for_step(self) -> None:
        """From here on signals wait for the next step boundary."""
        self.is_stepping, self._raises = True, False

    def wait_for_end(self) -> None:
        """From here on signals wait for the end of the process, which is near."""
        self._raises = False

    def restore(self) -> None:
        """Gives the signals back to those who had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        by_hand = "SIGINT" in (self.name, name)
        if self.name and by_hand and time.monotonic() - self._asked_at > ECHO_SECONDS:
            sys.exit(INTERRUPTED)
        if not self.name:
            self.name, self._asked_at = name, time.monotonic()
        if self._raises:
            self._end_now(name)  # and where somebody swallows that, the first step boundary stops

    def _end_now(self, name: str) -> None:
        self.wait_for_end()
        if name == "SIGINT":
            raise KeyboardInterrupt
        raise Preempted(f"stopped by {name} before the first step; there was nothing to save")

    def agreed(self, mesh: Mesh, for_own_reason: bool = False) -> bool:
        """Whether any rank has been asked to stop, or has a reason of its own; a collective, so that all stop alike."""
        return any_over(bool(self.name) or for_own_reason, mesh.world, mesh.device)

"""The seconds that pass between the pieces of work which charge the ledger by themselves."""

import time

import torch

from megagrow.ledger import Ledger


def settle(device: torch.device) -> None:
    """Waits until a GPU has done what it was given, so that the seconds are charged to whoever gave it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Clock:
    """Charges to the phase under way what belongs to none of its steps: metrics, saves, agreeing on stops, roll-backs.

    It runs from the first step on; what comes before is start-up, which no phase counts.
    """

    def __init__(self) -> None:
        self._phase: tuple[str, str] | None = None
        self._at = self._counted = 0.0

    def enter(self, phase: str, model: str) -> None:
        """From here on time belongs to this entry of the ledger."""
        self._phase = phase, model

    def charge(self, ledger: Ledger) -> None:
        """Charges the time since the last call, less what others have charged meanwhile."""
        now, counted = time.perf_counter(), _seconds(ledger)
        if self._phase is not None:
            rest = max(now - self._at - (counted - self._counted), 0.0)
            phase, model = self._phase
            ledger.add(phase, flops=0.0, tokens=0, seconds=rest, steps=0, model=model)
        self._at, self._counted = now, _seconds(ledger)


def _seconds(ledger: Ledger) -> float:
    return sum(phase.seconds or 0.0 for phase in ledger.phases)

"""What a run cost: FLOPs, tokens and seconds of every phase, and of all that the run builds on.

Two totals come out of it, and every saving is stated by both:

    papers_convention  what the large model took: operator learning, teacher, training, in the run or by tools before it
    all_in             that, the small model's training and scoring, wherever they happened

A cost that nobody knows is None, and a sum that contains it is None: never zero.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagrow.data.files import write_atomically
from megagrow.errors import CheckpointError, named, shown
from megagrow.flops import DEFAULT_CONVENTION
from megagrow.json_file import parse_object

PHASES = {
    "small": "training the small model, in the run that later grows it",
    "scoring": "the small model scores the corpus",
    "ligo": "steps that learn the growth operator",
    "growth": "applying the operator",
    "teacher": "the teacher's forward passes; their tokens are the student's and not counted again",
    "salt": "training with a teacher or on selected data (stage 1)",
    "train": "plain training",
    "evaluation": "held-out loss: how a run is measured, not what it costs, so in neither total",
}
LEFT_OUT_BY_PAPERS = ("small", "scoring")
BY_TOOLS = ("teacher", "ligo", "growth")  # what tools can do ahead of a run: a cache of a teacher, a grown checkpoint
MEASURES = ("flops", "tokens", "seconds")

LARGEST = 1e60  # FLOPs, tokens or seconds: far above any cost, and far below where sums of floats overflow
Totals = dict[str, float | None]


@dataclass
class Phase:
    """One kind of work on one model, summed over the run.

    Attributes:
        phase: a key of PHASES.
        model: the model that was worked on, in a few words.
        steps: optimizer steps, or batches where nothing is trained.
        tokens: tokens that went through; None: unknown.
        flops: in the ledger's convention; None: unknown.
        seconds: wall-clock; None: unknown.
    """

    phase: str
    model: str = ""
    steps: int = 0
    tokens: int | None = 0
    flops: float | None = 0.0
    seconds: float | None = 0.0

    def cost(self) -> Totals:
        """FLOPs, tokens and seconds that this phase adds to a total."""
        tokens = 0 if self.phase == "teacher" else self.tokens
        return {"flops": self.flops, "tokens": tokens, "seconds": self.seconds}


@dataclass
class Inherited:
    """Something made earlier that the run builds on.

    Attributes:
        label: what it serves as: "source", "teacher", "scores" …
        identity: the same for every use of one thing (a checkpoint's hash, a folder), so that it
            is charged once.
        ledger: what making it cost.
    """

    label: str
    identity: str
    ledger: "Ledger"


@dataclass
class Ledger:
    """The costs of one run; part of its checkpoints, so that a resumed run carries on counting.

    Attributes:
        convention: how attention's FLOPs are counted, see flops.py.
        phases: in the order in which they began.
        inherited: what the run builds on.
        events: what happened at one step: {"event", "step", "flops_total", "seconds_total", …}.
    """

    convention: str = DEFAULT_CONVENTION
    phases: list[Phase] = field(default_factory=list)
    inherited: list[Inherited] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def outside(cls, flops: float | None = None) -> "Ledger":
        """A model from outside: all is unknown but, at best, the FLOPs that the user gives."""
        return cls(phases=[Phase("train", tokens=None, flops=flops, seconds=None)])

    def add(
        self,
        phase: str,
        *,
        flops: float,
        tokens: int,
        seconds: float,
        steps: int = 1,
        model: str = "",
    ) -> None:
        """Adds the cost of `steps` steps to the entry of (phase, model)."""
        assert phase in PHASES, f"unknown phase {phase}"
        assert all(math.isfinite(x) and x >= 0 for x in (flops, tokens, seconds, steps)), (
            flops,
            tokens,
            seconds,
        )
        entry = next((p for p in self.phases if (p.phase, p.model) == (phase, model)), None)
        if entry is None:
            entry = Phase(phase, model)
            self.phases.append(entry)
        entry.steps += steps
        entry.tokens = _sum([entry.tokens, tokens])
        entry.flops = _sum([entry.flops, float(flops)])
        entry.seconds = _sum([entry.seconds, float(seconds)])

    def inherit(self, label: str, identity: str, ledger: "Ledger") -> None:
        """Records that the run builds on something that cost `ledger`; repeating it is harmless.

        Raises:
            CheckpointError: its FLOPs were counted by another convention.
        """
        if ledger.convention != self.convention:
            raise CheckpointError(
                f"the ledger of {label} {identity} counts FLOPs by the convention "
                f"{ledger.convention!r}, this run by {self.convention!r}: such numbers cannot be "
                "added; count both by the same convention"
            )
        self.inherited = [i for i in self.inherited if (i.label, i.identity) != (label, identity)]
        self.inherited.append(Inherited(label, identity, ledger))

    def add_event(self, event: str, step: int, **values: Any) -> None:
        """Records what happened at `step`, once its cost is added; values are plain data.

        What the run has spent by then is recorded too, as `flops_total` and `seconds_total`.
        """
        spent = self.own()
        totals = {"flops_total": spent["flops"], "seconds_total": spent["seconds"]}
        self.events.append({"event": event, "step": step, **totals, **values})

    def own(self, without: tuple[str, ...] = ()) -> Totals:
        """What this run itself has spent so far, on whichever model, without what it inherited.

        Args:
            without: phases that do not count.
        """
        return _total([p for p in self.phases if p.phase not in ("evaluation", *without)])

    def totals(self) -> dict[str, Totals]:
        """{"papers_convention", "all_in"}: {"flops", "tokens", "seconds"}; None: not known."""
        mine = [p for p in self.phases if p.phase != "evaluation"]
        theirs = [p for ledger in self._foundations().values() for p in ledger.phases if p.phase != "evaluation"]
        ahead = [p for ledger in self._foundations().values() if ledger._is_of_tools() for p in ledger.phases]
        return {
            "papers_convention": _total([p for p in mine if p.phase not in LEFT_OUT_BY_PAPERS] + ahead),
            "all_in": _total(mine + theirs),
        }

    def _is_of_tools(self) -> bool:
        """Whether nothing was trained, only done ahead of a run what the run would have done."""
        return bool(self.phases) and all(p.phase in BY_TOOLS for p in self.phases)

    def inherited_cost(self) -> Totals:
        """What `all_in` holds beyond `own`: the cost of everything that this run started from."""
        return _total([p for x in self._foundations().values() for p in x.phases if p.phase != "evaluation"])

    def _foundations(self) -> dict[str, "Ledger"]:
        found: dict[str, Ledger] = {}
        for item in self.inherited:
            for identity, ledger in (
                (item.identity, item.ledger),
                *item.ledger._foundations().items(),
            ):
                known = found.get(identity)
                if known is None or _known_flops(ledger) > _known_flops(known):
                    found[identity] = ledger
        return found

    def to_dict(self) -> dict[str, Any]:
        """The ledger as plain data for JSON."""
        return {
            "convention": self.convention,
            "phases": [dict(vars(p)) for p in self.phases],
            "inherited": [
                {"label": i.label, "identity": i.identity, "ledger": i.ledger.to_dict()} for i in self.inherited
            ],
            "events": [dict(e) for e in self.events],
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "ledger") -> "Ledger":
        """The inverse of `to_dict`; every field is checked.

        Raises:
            CheckpointError: a key is missing, unknown or of the wrong type, or a cost is negative
                or not finite.
        """
        fields = _mapping(data, where, {"convention": str, "phases": list, "inherited": list, "events": list})
        return cls(
            fields["convention"],
            [_phase(p, f"{where}: phases[{n}]") for n, p in enumerate(fields["phases"])],
            [_inherited(i, f"{where}: inherited[{n}]") for n, i in enumerate(fields["inherited"])],
            [_event(e, f"{where}: events[{n}]") for n, e in enumerate(fields["events"])],
        )

    def save(self, path: Path) -> None:
        """Writes the ledger, with its totals for human readers, so that `path` is always whole."""
        text = json.dumps({**self.to_dict(), "totals": self.totals()}, indent=1, allow_nan=False)
        write_atomically(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing or malformed.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a finished run has a ledger") from None
        data = parse_object(raw, path, CheckpointError, "restore the file or run again")
        data.pop("totals", None)
        return cls.from_dict(data, str(path))


def costs_of(state: dict[str, Any], where: str) -> dict[str, Totals]:
    """The totals of the ledger that came along in a checkpoint's state; {}: none did.

    Raises:
        CheckpointError: see `Ledger.from_dict`.
    """
    return Ledger.from_dict(state["ledger"], f"{where}: ledger").totals() if state.get("ledger") else {}


def _sum(values: list[Any]) -> Any:
    return None if any(v is None for v in values) else sum(values)


def _total(phases: list[Phase]) -> Totals:
    costs = [phase.cost() for phase in phases]
    return {measure: _sum([cost[measure] for cost in costs]) for measure in MEASURES}


def _known_flops(ledger: Ledger) -> float:
    flops = ledger.own()["flops"]
    return -1.0 if flops is None else flops


def _phase(data: Any, where: str) -> Phase:
    number = (int, float, type(None))
    kinds = {
        "phase": str,
        "model": str,
        "steps": int,
        "tokens": (int, type(None)),
        "flops": number,
        "seconds": number,
    }
    fields = _mapping(data, where, kinds)
    _check(
        fields["phase"] in PHASES,
        where,
        f"phase={shown(fields['phase'])} must be one of {', '.join(PHASES)}",
    )
    for name in ("steps", *MEASURES):
        value = fields[name]
        holds = value is None or 0 <= value < LARGEST
        _check(holds, where, f"{name}={shown(value)} must be finite and not negative")
    return Phase(**fields)


def _inherited(data: Any, where: str) -> Inherited:
    fields = _mapping(data, where, {"label": str, "identity": str, "ledger": dict})
    return Inherited(fields["label"], fields["identity"], Ledger.from_dict(fields["ledger"], f"{where}.ledger"))


def _event(data: Any, where: str) -> dict[str, Any]:
    _check(isinstance(data, dict), where, f"must be a mapping, got {type(data).__name__}")
    fields = _mapping({k: data[k] for k in ("event", "step") if k in data}, where, {"event": str, "step": int})
    _check(0 <= fields["step"] < 2**63, where, f"step={shown(fields['step'])} must not be negative, and fit 64 bits")
    return dict(data)


def _mapping(data: Any, where: str, kinds: dict[str, Any]) -> dict[str, Any]:
    _check(isinstance(data, dict), where, f"must be a mapping, got {type(data).__name__}")
    for key, kind in kinds.items():
        _check(key in data, where, f"{key} is missing")
        holds = isinstance(data[key], kind) and not isinstance(data[key], bool)
        _check(holds, where, f"{key}={shown(data[key])} has the wrong type")
    for key in data:
        _check(key in kinds, where, f"unknown key {named(key)}; expected {', '.join(kinds)}")
    return data


def _check(holds: bool, where: str, message: str) -> None:
    if not holds:
        raise CheckpointError(f"{where}: {message}; restore the file or start the run again")

"""What a run knows beside its tensors: plain data that goes into every checkpoint's manifest."""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from megagrow.checkpoint import hf
from megagrow.checkpoint.source import stored_model, stored_optimizer
from megagrow.config import Config, ModelConfig
from megagrow.config_file import to_dict
from megagrow.data.blend import BlendStart, DatasetIdentity
from megagrow.errors import CheckpointError, named, shown
from megagrow.json_file import is_count
from megagrow.ledger import Ledger
from megagrow.optim import StepGuard
from megagrow.timeline import growth_config, learning_steps

Phase = Literal["small", "ligo", "main"]
_SHA256 = re.compile(r"[0-9a-f]{64}")
REASONS = ("start", "step", "tokens", "plateau")  # for which a model grows


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        model: the model in training now (the small one until growth is complete).
        phase: `small` before the last growth, `ligo` while maps are learned, then `main`.
        step: steps done, learning steps of LiGO included; metrics.jsonl counts by it.
        train_step: steps of the schedule done; learning LiGO stands still on it.
        ligo_step: learning steps of LiGO done, in the growth under way or else the last that had any.
        growths: how often the model has grown: the number of the growth that comes next, or is under way.
        grown_at: train_step at which the model last grew; None before.
        layers_before: layers of the model before it last grew.
        tokens: training tokens seen, over all phases.
        cursors: samples consumed from each stream: `all` data (candidates of an online selection included), and the
            `selected` share of SALT's stage 1.
        blend: where the draws from `all` data began; None before the data are opened.
        guard: recent losses and refused steps.
        ledger: what everything cost.
        rolled_back_at: step from which the run last rolled back, -1 when there was none.
        optimizer: Adam's step and per-tensor multipliers.
        pending_event: why and at which losses growing began, until it is complete.
        losses: those that the next growth waits to see flat.
        teacher_loss: the teacher's held-out loss, once it has been measured.
        stage_one_end: train_step before which stage 1 ended early; None: it ends as planned.
        tokenizer, token_ids: of what the run began from, see `Source`.
    """

    model: ModelConfig
    phase: Phase
    step: int = 0
    train_step: int = 0
    ligo_step: int = 0
    growths: int = 0
    grown_at: int | None = None
    layers_before: int = 0
    tokens: int = 0
    cursors: dict[str, int] = field(default_factory=lambda: {"all": 0, "selected": 0})
    blend: BlendStart | None = None
    guard: StepGuard = field(default_factory=StepGuard)
    ledger: Ledger = field(default_factory=Ledger)
    rolled_back_at: int = -1
    optimizer: dict[str, Any] = field(default_factory=dict)
    pending_event: dict[str, Any] | None = None
    losses: list[float] = field(default_factory=list)
    teacher_loss: float | None = None
    stage_one_end: int | None = None
    tokenizer: str = ""
    token_ids: dict[str, Any] | None = None

    def is_done(self, config: Config) -> bool:
        """Whether the schedule is at its end."""
        return self.phase == "main" and self.train_step >= config.train.steps

    def samples_at_end(self, config: Config) -> int:
        """Samples of `all` data that the run will have taken when it is done, where none are passed over."""
        learned = self.ligo_step if self.phase == "ligo" else 0
        steps = config.train.steps - self.train_step + learning_steps(config.growth, self.growths) - learned
        return self.cursors["all"] + max(steps, 0) * config.train.global_batch_size

    def forget_losses(self) -> None:
        """Empties what is compared with the losses that come: those will be of something else."""
        self.guard.forget()
        self.losses = []

    def growing(self, config: Config) -> Config:
        """The configuration of the growth that comes next, or is under way, of a run with this configuration."""
        return growth_config(config, self.growths, self.model)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        plain = {k: v for k, v in vars(self).items() if k not in ("model", "blend", "guard", "ledger")}
        return {
            **plain,
            "model": to_dict(self.model),
            "blend": None if self.blend is None else asdict(self.blend),
            "guard": asdict(self.guard),
            "ledger": self.ledger.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> "RunState":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: fields are missing, unknown or break a rule.
        """
        data = {"tokenizer": "", "token_ids": None, **data}  # older checkpoints have none
        known = set(cls.__dataclass_fields__)
        if set(data) != known:
            odd = ", ".join(named(name) for name in sorted(set(data) ^ known)[:4])
            raise CheckpointError(f"{where}: state has missing or unknown fields ({odd}); it is from another version")
        for name, (holds, kind) in _RULES.items():
            if not holds(data[name]):
                raise CheckpointError(
                    f"{where}: state.{name} is {shown(data[name])}, must be {kind}; use an older checkpoint"
                )
        values = {
            **data,
            "model": stored_model(data["model"], where),
            "blend": None if data["blend"] is None else _blend(data["blend"], data["cursors"]["all"], where),
            "optimizer": stored_optimizer(data["optimizer"], where),
            "guard": StepGuard(**data["guard"]),
            "ledger": Ledger.from_dict(data["ledger"], f"{where}: state.ledger"),
        }
        return cls(**values)


def _blend(data: Any, cursor: int, where: str) -> BlendStart:
    """The blend of a saved state, checked: it decides which samples come next."""
    if not isinstance(data, dict) or set(data) != {"weights", "start", "firsts", "datasets"}:
        raise CheckpointError(
            f"{where}: state.blend must hold weights, start, firsts and datasets; it is from another version, which "
            "can go on with it, or begin a new run from it with --init.from"
        )
    weights, start, firsts, datasets = (data[name] for name in ("weights", "start", "firsts", "datasets"))
    if not isinstance(weights, dict) or not weights or not all(_is_size(w) and w > 0 for w in weights.values()):
        raise CheckpointError(f"{where}: state.blend.weights must be positive numbers by dataset, below 1e30")
    if not isinstance(firsts, dict) or not all(is_count(n) for n in (start, *firsts.values())):
        raise CheckpointError(f"{where}: state.blend.start and .firsts must be numbers of samples")
    if start > cursor:
        raise CheckpointError(f"{where}: state.blend.start is {start}, beyond state.cursors.all, which is {cursor}")
    if not isinstance(datasets, dict) or datasets.keys() != weights.keys() | firsts.keys():
        raise CheckpointError(f"{where}: state.blend.datasets must name those of weights and firsts, no others")
    if not all(map(_is_identity, datasets.values())):
        raise CheckpointError(f"{where}: state.blend.datasets must hold num_samples and sketch, a sha256, of each")
    known = {prefix: DatasetIdentity(**identity) for prefix, identity in datasets.items()}
    return BlendStart({prefix: float(weight) for prefix, weight in weights.items()}, start, firsts, known)


def _is_number(value: Any) -> bool:
    """Finite, and no larger than what floats hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_size(value: Any) -> bool:
    """A number that sums and squares of it do not overflow."""
    return _is_number(value) and abs(value) < 1e30


def _is_identity(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(DatasetIdentity.__dataclass_fields__)
        and is_count(value["num_samples"])
        and isinstance(value["sketch"], str)
        and bool(_SHA256.fullmatch(value["sketch"]))
    )


def _is_guard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(StepGuard.__dataclass_fields__)
        and is_count(value["bad_steps"])
        and isinstance(value["losses"], list)
        and all(map(_is_size, value["losses"]))
    )


def _is_event(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"reason", "loss_before", "loss_initial"}
        and value["reason"] in REASONS
        and all(value[loss] is None or _is_number(value[loss]) for loss in ("loss_before", "loss_initial"))
    )


_COUNT = (is_count, "a whole number from 0 on")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "phase": (lambda v: v in get_args(Phase), f"one of {', '.join(get_args(Phase))}"),
    "step": _COUNT,
    "train_step": _COUNT,
    "ligo_step": _COUNT,
    "growths": _COUNT,
    "layers_before": _COUNT,
    "losses": (lambda v: isinstance(v, list) and all(map(_is_size, v)), "a list of numbers below 1e30"),
    "grown_at": (lambda v: v is None or is_count(v), "a step or null"),
    "tokens": _COUNT,
    "teacher_loss": (lambda v: v is None or _is_number(v), "a number or null"),
    "stage_one_end": (lambda v: v is None or is_count(v), "a step or null"),
    "tokenizer": (lambda v: isinstance(v, str), "a path, or empty"),
    "token_ids": (hf.are_token_ids, "token ids by name, or null"),
    "cursors": (
        lambda v: isinstance(v, dict) and set(v) == {"all", "selected"} and all(map(is_count, v.values())),
        "numbers of samples of the streams all and selected",
    ),
    "guard": (_is_guard, "losses, a list of numbers below 1e30, and bad_steps, a whole number"),
    "rolled_back_at": (lambda v: type(v) is int and -1 <= v < 2**63, "a step, or -1"),
    "pending_event": (
        lambda v: v is None or _is_event(v),
        "reason, loss_before and loss_initial; or null",
    ),
}

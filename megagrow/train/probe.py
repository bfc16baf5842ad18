"""Which way of growing is best from here: each candidate trains a little from one checkpoint, then they are compared.

Source: Karp et al., 2024 (LAG, arXiv 2406.02469): the loss right after growing tells little of the final one, the loss
after a lag tells more.
"""

import gc
import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from megagrow.checkpoint import store
from megagrow.checkpoint.source import Source
from megagrow.checks import check, check_chain
from megagrow.config import CheckpointConfig, Config, InitConfig, RunConfig, SaltConfig, require
from megagrow.config_file import to_dict
from megagrow.errors import NonFiniteError
from megagrow.growth.methods import make_recipe
from megagrow.growth.moments import fitting_policy
from megagrow.optim import lr_at
from megagrow.parallel.mesh import Mesh
from megagrow.timeline import growth_config, latest_step, learning_steps, num_growths, order_size, policy_of
from megagrow.train.growing import check_recipes
from megagrow.train.state import RunState
from megagrow.train.stop import StopRequest
from megagrow.train.trainer import Trainer

SHORT_LAG = 0.05  # of the run; a lag below can well mislead


@dataclass(frozen=True)
class Candidate:
    """A way of growing: method, and what becomes of the optimizer's moments; empty: what a run does, if it can."""

    method: str
    optimizer: str

    @classmethod
    def parse(cls, text: str, optimizer: str) -> "Candidate":
        """`METHOD` or `METHOD:POLICY`; where no policy is named, `optimizer`."""
        method, _, policy = text.partition(":")
        return cls(method, policy or optimizer)

    def __str__(self) -> str:
        return f"{self.method}:{self.optimizer}"


@dataclass(frozen=True)
class Outcome:
    """What a candidate came to.

    Attributes:
        candidate: its method and policy.
        loss_initial: validation loss right after growing, or after learning the operator; None: not finite.
        loss: validation loss after the lag; None: it diverged.
        flops, seconds: of growing, of learning the operator, and of the lag.
    """

    candidate: str
    loss_initial: float | None
    loss: float | None
    flops: float | None
    seconds: float | None


class _Fork(Trainer):
    """A run that leaves nothing behind."""

    def _save(self) -> None:
        pass


def probe(source: Source, config: Config, candidates: Sequence[Candidate], steps: int, mesh: Mesh) -> list[Outcome]:
    """Grows and trains every candidate on the same samples at the same learning rates; a collective over the mesh.

    One that learns an operator does so on the samples before: the lag has the same for all.

    Args:
        source: the small model. Of an own checkpoint on the same data the samples go on where it stopped.
        config: the run that is planned; its next growth is probed. The learning rate is that of the step at which it
            grows, constant but for `growth.rewarmup_steps`.
        candidates: what to compare.
        steps: the lag.
        mesh: where this rank stands.

    Returns:
        The outcomes, the lowest loss after the lag first, and last those that diverged.

    Raises:
        ConfigError: a candidate cannot grow these models, or there is nothing to measure on.
    """
    require(bool(config.data.validation or config.data.split), "probing ranks by validation loss: set data.validation")
    require(config.train.eval_batches > 0, "probing ranks by validation loss: set train.eval_batches")
    require(num_growths(config.growth) > 0, "growth.method=none plans no growth; set growth.method")
    require(all(c.method != "none" for c in candidates), "the candidate none does not grow: there is nothing to probe")
    candidates = [_with_policy(candidate, source, config) for candidate in candidates]
    forks = [_fork_config(source, config, candidate, steps) for candidate in candidates]
    for fork in forks:
        check(fork, mesh.world.size)
        check_chain(fork, source.model)
        check_recipes(RunState(source.model, "small"), fork)
    learning = [learning_steps(fork.growth) for fork in forks]
    begins = _cursor(source, config) + max(learning) * config.train.global_batch_size
    cursors = [begins - steps * config.train.global_batch_size for steps in learning]
    outcomes = [_outcome(*each, mesh) for each in zip(candidates, forks, cursors, strict=True)]
    return sorted(outcomes, key=lambda outcome: math.inf if outcome.loss is None else outcome.loss)


def caution(steps: int, config: Config) -> str:
    """How short the lag is, in words."""
    share = steps / config.train.steps
    said = f"lag: {steps} steps, {share:.2g} of the run's {config.train.steps}"
    if share >= SHORT_LAG:
        return f"{said}; candidates that are close may still change places"
    return (
        f"{said}: short. Short lags mislead: the order after 16 steps has been seen to differ from that after 128 "
        "(arXiv 2604.04281), and the loss as grown says even less; probe longer before relying on it"
    )


def _with_policy(candidate: Candidate, source: Source, config: Config) -> Candidate:
    """The candidate with the policy that a run would take or, where that has no rule, the first one that has."""
    if candidate.optimizer:
        return candidate
    growing = growth_config(config, 0, source.model)
    growth = replace(growing.growth, method=candidate.method, optimizer="")
    policy = policy_of(growth)
    if not growth.learns_maps:
        breaker = growth.breaker, growth.breaker_scale
        recipe = make_recipe(growth.method, source.model, growing.model, *breaker, seed=config.train.seed)
        policy = fitting_policy(recipe, policy)
    return replace(candidate, optimizer=policy)


def _fork_config(source: Source, config: Config, candidate: Candidate, steps: int) -> Config:
    growing = growth_config(config, 0, source.model)
    at_once: dict[str, Any] = {"at_step": 0, "at_tokens": 0, "at_plateau": 0.0, "freeze_steps": 0, "source": None}
    how: dict[str, Any] = {"method": candidate.method, "optimizer": candidate.optimizer, "bootstrap": False}
    begins = max(latest_step(config, 0), config.optim.warmup_steps)
    lr = lr_at(begins, config.train.steps, config.optim)
    num_samples = order_size(config) if config.data.order == "megatron" else 0
    return replace(
        growing,
        data=replace(config.data, num_samples=num_samples),
        train=replace(config.train, steps=steps, eval_interval=0),
        optim=replace(config.optim, lr=lr, schedule="constant", warmup_steps=0),
        growth=replace(growing.growth, **at_once, **how),
        salt=SaltConfig(),
        checkpoint=CheckpointConfig(interval=0),
        init=InitConfig(str(source.path), skip_source_check=config.init.skip_source_check),
    )


def _outcome(candidate: Candidate, fork: Config, cursor: int, mesh: Mesh) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        trainer = _Fork(replace(fork, run=RunConfig(directory, log_interval=fork.train.steps)), mesh)
        trainer.state.cursors["all"] = cursor
        loss = None
        with suppress(NonFiniteError):
            trainer.run(StopRequest())
            loss = trainer.validation_loss
            assert loss is not None, "the last step of a run is evaluated"
        spent, events = trainer.state.ledger.own(), trainer.state.ledger.events
    del trainer
    gc.collect()  # the next model needs its memory
    initial = events[0]["loss_after"] if events else None
    kept = loss if loss is not None and math.isfinite(loss) else None
    return Outcome(str(candidate), initial, kept, spent["flops"], spent["seconds"])


def _cursor(source: Source, config: Config) -> int:
    """The first sample that the source has not seen, if it was trained on these samples."""
    if source.ledger is None:  # from outside
        return 0
    manifest = store.read_manifest(source.path)
    data, cursors = manifest.config.get("data"), manifest.state.get("cursors")
    same = isinstance(data, dict) and all(data.get(name) == value for name, value in _order(config).items())
    return int(cursors["all"]) if same and isinstance(cursors, dict) else 0


def _order(config: Config) -> dict[str, Any]:
    """What says which samples there are, and in which order."""
    plain = to_dict(config.data)
    return {name: plain[name] for name in ("train", "seed", "order", "seq_length", "split", "num_samples")}

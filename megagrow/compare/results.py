"""What came out of a comparison: every reported run, and every arm over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from megagrow.compare.controls import small_of
from megagrow.compare.experiment import Experiment
from megagrow.compare.questions import TASKS
from megagrow.compare.record import Line
from megagrow.compare.suite import SMALL
from megagrow.compare.sweep import Try
from megagrow.report.run import Json, Run, check_comparable
from megagrow.report.savings import (
    CONVENTIONS,
    MEASURES,
    Front,
    at_equal_cost,
    over_seeds,
    saving,
    scratch_front,
    spread,
)

_SEVERAL = "it, its small model and scratch ran on several kinds of machine, or shared it with more or fewer runs"


@dataclass(frozen=True)
class Outcome:
    """One reported run.

    Attributes:
        chosen: arm and rates.
        seed: of weights and of the order of samples.
        line: what is on record of it; None: it has not ended.
        run: the same as reports take it; None: it has not ended, or has diverged.
    """

    chosen: Try
    seed: int
    line: Line | None
    run: Run | None

    @property
    def arm(self) -> str:
        """Its name."""
        return self.chosen.arm

    def steps_to_recover(self) -> int | None:
        """Steps, learning maps included, after which all evaluations find the small model's loss or a lower one.

        None: never, or nothing grew.
        """
        event = self.run.growth if self.run else None
        if self.run is None or event is None or event.get("loss_before") is None:
            return None
        growth = self.run.config.growth
        begun = event["step"] - growth.ligo_steps * growth.learns_maps
        after = [(event["step"], event.get("loss_after"))]
        after += [(each["step"], each["validation_loss"]) for each in self.run.lines if each["step"] > event["step"]]
        known = [(step, loss) for step, loss in after if loss is not None]
        recovered = list(takewhile(lambda each: each[1] <= event["loss_before"], reversed(known)))
        return recovered[-1][0] - begun if recovered else None


@dataclass(frozen=True)
class Results:
    """All reported runs of a comparison."""

    experiment: Experiment
    outcomes: list[Outcome]

    @classmethod
    def of(cls, experiment: Experiment) -> "Results":
        """What has been run so far.

        Raises:
            DataError: runs differ in what their losses depend on.
        """
        found = [_outcome(experiment, chosen, seed) for chosen, seed in experiment.reported()]
        for seed in {each.seed for each in found}:
            large = (each for each in found if each.seed == seed and each.arm not in experiment.suite.small_arms)
            check_comparable([each.run for each in large if each.run])
        return cls(experiment, found)

    def of_arm(self, arm: str) -> list[Outcome]:
        """Its finished runs, by seed."""
        return [each for each in self.outcomes if each.arm == arm and each.run is not None]

    def diverged(self, arm: str | None = None) -> list[Outcome]:
        """Runs that diverged: of one arm, or of all."""
        found = [each for each in self.outcomes if each.line is not None and each.run is None]
        return [each for each in found if arm in (None, each.arm)]

    def scratch(self, seed: int) -> list[Run]:
        """The finished runs of the baseline."""
        return [each.run for each in self._scratch(seed) if each.run]

    def front(self, seed: int) -> Front:
        """All-in FLOPs and losses from which savings of a seed are read."""
        return scratch_front(self.scratch(seed), "all_in", "flops")

    def is_starved(self, outcome: Outcome) -> bool:
        """Whether a run cannot be carried out, because the small model that it needs has diverged."""
        config = self.experiment.config(outcome.chosen, outcome.seed)
        if outcome.line is not None or not (config.init.from_ or config.salt.teacher):
            return False
        small = small_of(outcome.arm), outcome.seed
        return any((each.arm, each.seed) == small for each in self.diverged())

    @property
    def winner(self) -> str | None:
        """The arm that was best on the tuning seed, once its reported runs are finished."""
        found = self.experiment.sweep.best_arm(self.experiment.arms)
        return found if found in self.names else None

    @cached_property
    def names(self) -> list[str]:
        """All of which a run is finished: the small model, the baseline, controls, arms by their mean loss.

        Arms of which a run diverged come last.
        """
        fixed = [SMALL, *self.experiment.suite.scratch_arms, *self.experiment.controls]
        others = [arm for arm in self.experiment.arms if self.of_arm(arm)]
        others.sort(key=lambda arm: (bool(self.diverged(arm)), self.summary(arm)["loss"]["value"]))
        return [name for name in fixed if self.of_arm(name)] + others

    def row(self, outcome: Outcome) -> Json:
        """One run: settings, loss, costs, and what it saves against the baseline of its seed."""
        run, line = outcome.run, outcome.line
        assert run is not None and line is not None, "a run that is there"
        event, chosen = run.growth or {}, outcome.chosen
        settings: Json = {
            "key": line.key,
            "arm": outcome.arm,
            "seed": outcome.seed,
            "lr": chosen.lr,
            "map_lr": chosen.map_lr,
        }
        settings |= {"steps": run.config.train.steps, "loss": run.final_loss}
        costs = {c: {m: run.cost(c, m) for m in MEASURES} for c in CONVENTIONS}
        growth = {name: event.get(name) for name in ("loss_before", "loss_initial", "loss_after")}
        growth |= {"steps_to_recover": outcome.steps_to_recover()}
        compared = {} if self._is_baseline(outcome.arm) else self._compared(outcome)
        settings |= {"machine": line.machine, "commit": line.commit, "date": line.date}
        return {**settings, "costs": costs, **growth, "scores": line.scores, **compared}

    def summary(self, arm: str) -> Json:
        """An arm over its seeds: means, least and greatest values; what not all runs have is None."""
        rows = [self.row(each) for each in self.of_arm(arm)]
        lost = [each.seed for each in self.diverged(arm)]
        found: Json = {"arm": arm, "seeds": [row["seed"] for row in rows], "diverged": lost, "lr": rows[0]["lr"]}
        found |= {"map_lr": rows[0]["map_lr"], "steps": rows[0]["steps"], "loss": spread([row["loss"] for row in rows])}
        found["costs"] = {c: {m: _known([row["costs"][c][m] for row in rows]) for m in MEASURES} for c in CONVENTIONS}
        for name in ("loss_before", "loss_initial", "loss_after", "steps_to_recover"):
            found[name] = _known([row[name] for row in rows])
        scores = [row["scores"] for row in rows]
        found["scores"] = {task: _known([each and each[task] for each in scores]) for task in TASKS}
        if self._is_baseline(arm):
            return found
        found["nats_at_equal_flops"] = _known([row["nats_at_equal_flops"] for row in rows])
        of_lost = [_unknown("the run diverged")] * len(lost)
        found["savings"] = {
            c: {m: over_seeds([row["savings"][c][m] for row in rows] + of_lost) for m in MEASURES} for c in CONVENTIONS
        }
        return found

    def _is_baseline(self, arm: str) -> bool:
        return arm == SMALL or arm in self.experiment.suite.scratch_arms

    def _scratch(self, seed: int) -> list[Outcome]:
        names = self.experiment.suite.scratch_arms
        return [each for each in self.outcomes if each.seed == seed and each.arm in names]

    def _compared(self, outcome: Outcome) -> Json:
        run, scratch = outcome.run, self.scratch(outcome.seed)
        assert run is not None, "a run that is there"
        savings = {c: {m: saving(run, scratch, c, m) for m in MEASURES} for c in CONVENTIONS}
        if len(self._machines(outcome)) > 1:
            for each in savings.values():
                each["seconds"] = _unknown(_SEVERAL)
        return {"nats_at_equal_flops": at_equal_cost(run, scratch)["nats"], "savings": savings}

    def _machines(self, outcome: Outcome) -> set[tuple[str, int]]:
        """Of a run, of its small model and its baseline: the kind of machine, and how many runs shared it."""
        uses_small = outcome.run is not None and (outcome.run.config.init.from_ or outcome.run.config.salt.teacher)
        of_arm = small_of(outcome.arm), outcome.seed
        small = [each for each in self.outcomes if uses_small and (each.arm, each.seed) == of_arm]
        lines = [each.line for each in [outcome, *small, *self._scratch(outcome.seed)] if each.line]
        return {(line.machine, line.parallel) for line in lines}


def _outcome(experiment: Experiment, chosen: Try, seed: int) -> Outcome:
    line = experiment.ended(chosen, seed)
    return Outcome(chosen, seed, line, line.run(experiment.job(chosen, seed).config) if line else None)


def _unknown(reason: str) -> Json:
    return {"value": None, "reason": reason, "bound": None}


def _known(values: Sequence[Any]) -> Json | None:
    return None if not values or None in values else spread(values)

"""What came out of a comparison: every reported run, and every arm over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagrow.compare import downstream
from megagrow.compare.experiment import Experiment
from megagrow.compare.questions import TASKS
from megagrow.compare.suite import SMALL
from megagrow.compare.sweep import Try
from megagrow.errors import CheckpointError
from megagrow.json_file import parse_object
from megagrow.report.run import Json, Run, check_comparable
from megagrow.report.savings import CONVENTIONS, MEASURES, at_equal_cost, over_seeds, saving, spread

SCORES = {"cloze": "acc", "choice": "acc_norm"}  # of each task, the one that tables show


@dataclass(frozen=True)
class Outcome:
    """One reported run.

    Attributes:
        chosen: arm and rates.
        seed: of weights and of the order of samples.
        run: what it left; None: it is not there, or has diverged.
    """

    chosen: Try
    seed: int
    run: Run | None

    @property
    def arm(self) -> str:
        """Its name."""
        return self.chosen.arm

    def steps_to_recover(self) -> int | None:
        """Steps after growing until an evaluation finds the small model's loss again; None: never, or nothing grew."""
        event = self.run.growth if self.run else None
        if self.run is None or event is None or event.get("loss_before") is None:
            return None
        if (event.get("loss_after") or float("inf")) <= event["loss_before"]:
            return 0
        later = (line for line in self.run.lines if line["step"] > event["step"])
        reached = (line["step"] for line in later if (line["validation_loss"] or 1e9) <= event["loss_before"])
        step = next(reached, None)
        return None if step is None else step - event["step"]

    def scores(self) -> dict[str, float] | None:
        """The share of the questions of each task that are answered rightly; None where none were asked."""
        path = self.run.path / downstream.FILE if self.run else None
        if path is None or not path.is_file():
            return None
        found = parse_object(path.read_bytes(), path, CheckpointError, "remove the file")
        return {task: float(found[task][SCORES[task]]) for task in TASKS}


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
        suite, sweep = experiment.suite, experiment.sweep
        names = [name for name in [SMALL, *suite.scratch_arms, *experiment.arms] if sweep.knows([name])]
        found = [_outcome(experiment, sweep.best(name), seed) for seed in suite.seeds for name in names]
        for seed in suite.seeds:
            check_comparable([each.run for each in found if each.seed == seed and each.arm != SMALL and each.run])
        return cls(experiment, found)

    def of_arm(self, arm: str) -> list[Outcome]:
        """Its finished runs, by seed."""
        return [each for each in self.outcomes if each.arm == arm and each.run is not None]

    def scratch(self, seed: int) -> list[Run]:
        """The finished runs of the baseline."""
        names = self.experiment.suite.scratch_arms
        return [each.run for each in self.outcomes if each.run and each.seed == seed and each.arm in names]

    @property
    def names(self) -> list[str]:
        """All arms of which a run is finished: the small model, the baseline, the others by their mean loss."""
        fixed = [SMALL, *self.experiment.suite.scratch_arms]
        others = [arm for arm in self.experiment.arms if self.of_arm(arm)]
        others.sort(key=lambda arm: self.summary(arm)["loss"]["value"])
        return [name for name in fixed if self.of_arm(name)] + others

    def row(self, outcome: Outcome) -> Json:
        """One run: settings, loss, costs, and what it saves against the baseline of its seed."""
        run = outcome.run
        assert run is not None, "a run that is there"
        event, chosen = run.growth or {}, outcome.chosen
        settings: Json = {"arm": outcome.arm, "seed": outcome.seed, "lr": chosen.lr, "map_lr": chosen.map_lr}
        settings |= {"steps": run.config.train.steps, "loss": run.final_loss}
        costs = {c: {m: run.cost(c, m) for m in MEASURES} for c in CONVENTIONS}
        growth = {name: event.get(name) for name in ("loss_before", "loss_initial", "loss_after")}
        growth |= {"steps_to_recover": outcome.steps_to_recover()}
        compared = {} if self._is_baseline(outcome.arm) else self._compared(run, outcome.seed)
        return {**settings, "costs": costs, **growth, "scores": outcome.scores(), **compared}

    def summary(self, arm: str) -> Json:
        """An arm over its seeds: means, least and greatest values; what not all runs have is None."""
        rows = [self.row(each) for each in self.of_arm(arm)]
        found: Json = {"arm": arm, "seeds": [row["seed"] for row in rows], "lr": rows[0]["lr"]}
        found |= {"map_lr": rows[0]["map_lr"], "steps": rows[0]["steps"], "loss": spread([row["loss"] for row in rows])}
        found["costs"] = {c: {m: _known([row["costs"][c][m] for row in rows]) for m in MEASURES} for c in CONVENTIONS}
        for name in ("loss_before", "loss_initial", "loss_after", "steps_to_recover"):
            found[name] = _known([row[name] for row in rows])
        scores = [row["scores"] for row in rows]
        found["scores"] = {task: _known([each and each[task] for each in scores]) for task in TASKS}
        if self._is_baseline(arm):
            return found
        found["nats_at_equal_flops"] = _known([row["nats_at_equal_flops"] for row in rows])
        found["savings"] = {
            c: {m: over_seeds([row["savings"][c][m] for row in rows]) for m in MEASURES} for c in CONVENTIONS
        }
        return found

    def _is_baseline(self, arm: str) -> bool:
        return arm == SMALL or arm in self.experiment.suite.scratch_arms

    def _compared(self, run: Run, seed: int) -> Json:
        scratch = self.scratch(seed)
        return {
            "nats_at_equal_flops": at_equal_cost(run, scratch)["nats"],
            "savings": {c: {m: saving(run, scratch, c, m) for m in MEASURES} for c in CONVENTIONS},
        }


def _outcome(experiment: Experiment, chosen: Try, seed: int) -> Outcome:
    job = experiment.job(chosen, seed)
    return Outcome(chosen, seed, job.result() if job.is_done else None)


def _known(values: Sequence[Any]) -> Json | None:
    return None if not values or None in values else spread(values)

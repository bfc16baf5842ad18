"""A suite on a corpus, from the small model to the last seed; what has been run already is not run again.

1. The small model, the baseline at each of its budgets, then every arm: each is tuned on one seed, with the same number
   of tries. A sweep that was recorded stands in for that.
2. What ended lowest is run on the seeds that are reported, on which nothing was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megagrow.checks import check, check_chain
from megagrow.compare.budget import affordable_steps
from megagrow.compare.corpus import Corpus
from megagrow.compare.job import Job
from megagrow.compare.questions import make_questions
from megagrow.compare.recipes import RECIPES
from megagrow.compare.runner import Runner
from megagrow.compare.suite import SMALL, TUNING_SEED, Suite
from megagrow.compare.sweep import Sweep, Tried, Try
from megagrow.config import Config, GrowthConfig, RunConfig
from megagrow.errors import ConfigError
from megagrow.train.growing import check_recipes
from megagrow.train.state import RunState

SMALL_DATA = 1_000  # added to the seed of the small model's samples: what it saw is no advantage, nor is its order


@dataclass
class Experiment:
    """One comparison.

    Attributes:
        suite: what is compared.
        corpus: on what.
        folder: of its runs.
        runner: carries them out.
        sweep: the tries so far; a recorded sweep may be given.
    """

    suite: Suite
    corpus: Corpus
    folder: Path
    runner: Runner
    sweep: Sweep
    _steps: dict[str, int] = field(default_factory=dict)  # of each arm: rates and seeds do not matter

    def tune(self) -> None:
        """Tries what has not been tried, the baseline before all arms."""
        suite = self.suite
        for arms in ([SMALL], suite.scratch_arms, self.arms):
            if not self.sweep.knows(arms):
                self.sweep.tune(arms, suite.rates, self._measure, self._tunes_maps if suite.refines else None)

    def run_seeds(self) -> None:
        """Runs the chosen settings on the seeds that are reported."""
        names = [*self.suite.scratch_arms, *self.arms]
        self._carry_out([(self.sweep.best(name), seed) for seed in self.suite.seeds for name in names])

    @cached_property
    def arms(self) -> list[str]:
        """The suite's arms that its models and budget allow."""
        return [arm for arm in self.suite.arms if arm not in self.refused]

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why the other arms are not."""
        found = {}
        for arm in self.suite.arms:
            try:
                self._check(self.config(Try(arm, self.suite.rates[0]), TUNING_SEED))
            except ConfigError as error:
                found[arm] = str(error)
        return found

    def job(self, chosen: Try, seed: int) -> Job:
        """The run of an arm at its rates."""
        is_reported = seed in self.suite.seeds
        return Job(
            self.config(chosen, seed),
            questions=self._questions if is_reported else "",
            keeps_model=chosen.arm == SMALL,
        )

    def config(self, chosen: Try, seed: int) -> Config:
        """The configuration of that run.

        Raises:
            ConfigError: the arm is not for these models, or the budget is too small for it.
        """
        suite = self.suite
        if chosen.arm == SMALL:
            small = self._plain(chosen, seed, suite.source_steps)
            return replace(small, model=suite.source, data=replace(small.data, seed=seed + SMALL_DATA))
        if chosen.arm in suite.scratch_arms:
            return self._plain(chosen, seed, suite.scratch_arms[chosen.arm])
        recipe, pair = RECIPES[chosen.arm], suite.pair(self._small_directory(seed))

        def build(steps: int) -> Config:
            return recipe(self._plain(chosen, seed, steps), pair)

        if chosen.arm not in self._steps:
            cost = suite.source_steps * suite.step_flops(suite.source)
            self._steps[chosen.arm] = affordable_steps(build, suite.source, cost, suite.budget)
        config = build(self._steps[chosen.arm])
        if chosen.map_lr is None:
            return config
        return replace(config, growth=replace(config.growth, ligo_lr=chosen.map_lr))

    def small(self, seed: int) -> Job:
        """The small model of a seed."""
        return self.job(self._small_try, seed)

    def _plain(self, chosen: Try, seed: int, steps: int) -> Config:
        """A run of the large model from random weights."""
        base, corpus = self.suite.base, self.corpus
        data = replace(base.data, train=corpus.train, validation=corpus.validation, tokenizer=corpus.tokenizer)
        return replace(
            base,
            model=self.suite.target,
            data=replace(data, seed=seed),
            train=replace(base.train, steps=steps, seed=seed),
            optim=replace(base.optim, lr=chosen.lr),
            run=RunConfig(dir=self._directory(chosen, seed)),
        )

    def _directory(self, chosen: Try, seed: int) -> str:
        return str(self.folder / "runs" / f"{chosen.name}-seed{seed}")

    def _small_directory(self, seed: int) -> str:
        return self._directory(self._small_try, seed)

    @property
    def _small_try(self) -> Try:
        """The small model's settings; before it is tuned, any stand for them."""
        return self.sweep.best(SMALL) if self.sweep.knows([SMALL]) else Try(SMALL, self.suite.rates[0])

    @cached_property
    def _questions(self) -> str:
        count, corpus = self.suite.num_questions, self.corpus
        if count == 0 or not self.suite.target.is_causal:
            return ""
        folder = corpus.folder / f"questions-{count}"
        return str(make_questions(corpus.validation, corpus.tokenizer, folder, count))

    def _measure(self, tries: Sequence[Try]) -> list[Tried]:
        """Carries tries out on the tuning seed."""
        self._carry_out([(each, TUNING_SEED) for each in tries])
        found = [(each, self.job(each, TUNING_SEED).result()) for each in tries]
        return [Tried(each.arm, each.lr, each.map_lr, run.final_loss if run else None) for each, run in found]

    def _carry_out(self, runs: Sequence[tuple[Try, int]]) -> None:
        """Runs what is missing, after the small models that it needs; the longest runs first."""
        jobs = [self.job(chosen, seed) for chosen, seed in runs]
        missing = [job for job in jobs if not job.is_done]
        starts = {job.config.init.from_ or job.config.salt.teacher for job in missing} - {""}
        smalls = [self.small(seed) for seed in (TUNING_SEED, *self.suite.seeds)]
        needed = [small for small in smalls if str(small.directory) in starts]
        self.runner.make_models(needed)
        self.runner.carry_out(sorted(missing, key=lambda job: -job.config.train.steps))

    def _tunes_maps(self, arm: str) -> bool:
        """Whether an arm learns maps at a rate that is not its point."""
        growth = self.config(self.sweep.best(arm), TUNING_SEED).growth
        return growth.learns_maps and growth.ligo_steps > 0 and growth.ligo_lr == GrowthConfig().ligo_lr

    def _check(self, config: Config) -> None:
        """Raises ConfigError where the run would be refused when it begins."""
        check(config, 1)
        source = config.growth.source or self.suite.source
        if config.growth.method != "none":
            check_chain(config, source)
            check_recipes(RunState(source, "small"), config)

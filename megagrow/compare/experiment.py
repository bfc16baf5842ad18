"""A suite on a corpus, from the small model to the last seed; what has been run already is not run again.

1. The small model, on its share of the budget and on all of it, the baseline at each of its budgets, then every arm:
   each is tuned on one seed, with the same number of tries.
2. What ended lowest is run on the seeds that are reported, on which nothing was chosen: neither rates nor the best arm;
   and so are further controls, at the rates of what they are about.

All is read from the record of ended runs; what is missing there is run.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megagrow.checks import check, check_chain
from megagrow.compare.budget import affordable_steps, run_flops
from megagrow.compare.controls import NEVER_GROWN, as_charged, controls_of, small_of, tuned_as
from megagrow.compare.corpus import Corpus
from megagrow.compare.job import Job
from megagrow.compare.questions import make_questions
from megagrow.compare.recipes import RECIPES
from megagrow.compare.record import Line, key_of, settings_of
from megagrow.compare.runner import Runner
from megagrow.compare.suite import SMALL, TUNING_SEED, Suite
from megagrow.compare.sweep import MAP_RATES, Sweep, Tried, Try
from megagrow.config import Config, RunConfig
from megagrow.errors import ConfigError
from megagrow.report.run import Json
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
        runner: carries them out, and has the record.
        sweep: the tries so far.
        only_reads: whether what is missing stays so.
    """

    suite: Suite
    corpus: Corpus
    folder: Path
    runner: Runner
    sweep: Sweep
    only_reads: bool = False
    _steps: dict[str, int] = field(default_factory=dict)  # of each arm: rates and seeds do not matter

    def tune(self) -> None:
        """Tries what has not been tried, the baseline before all arms.

        Raises:
            ConfigError: the small model or the baseline diverges at all rates.
            FailedRun: one of them failed.
        """
        suite = self.suite
        self._tune([SMALL], refines=True)
        if not self.only_reads:
            self._drop_models()
        self._tune(suite.scratch_arms, suite.refines)
        self._tune([NEVER_GROWN, *self.arms], suite.refines)

    def run_seeds(self) -> None:
        """Runs the chosen settings on the seeds that are reported."""
        self._carry_out(self.reported())

    def reported(self) -> list[tuple[Try, int]]:
        """Settings and seeds of the runs that are reported."""
        suite, compared = self.suite, [SMALL, *self.suite.scratch_arms]
        winner = self.sweep.best_arm(self.arms)
        names = dict.fromkeys(suite.seeds, [*compared, *self.controls, *self.arms])
        names |= dict.fromkeys(suite.winner_seeds if winner else (), [*compared, NEVER_GROWN, *filter(None, [winner])])
        return [(self.chosen(name), seed) for seed in names for name in names[seed] if self.knows(name)]

    def chosen(self, name: str) -> Try:
        """The rates at which an arm or a control is reported."""
        return replace(self.sweep.best(tuned_as(name)), arm=name)

    def knows(self, name: str) -> bool:
        """Whether these are known."""
        return self.sweep.knows([tuned_as(name)])

    def ended(self, chosen: Try, seed: int) -> Line | None:
        """What is on record of a run."""
        return self.runner.record.find(self.job(chosen, seed).key)

    @cached_property
    def arms(self) -> list[str]:
        """The suite's arms that its models and budget allow."""
        return [arm for arm in self.suite.arms if arm not in self.refused]

    @cached_property
    def controls(self) -> list[str]:
        """The controls that belong beside these arms."""
        return controls_of(self.arms)

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

    @property
    def num_questions(self) -> int:
        """Of each downstream task."""
        return self.suite.num_questions if self.suite.target.is_causal else 0

    def job(self, chosen: Try, seed: int) -> Job:
        """The run of an arm at its rates."""
        config, settings = self._placed(chosen, seed)
        return Job(
            config,
            questions=self._questions if settings["questions"] else "",
            keeps_model=chosen.arm == SMALL or (chosen.arm in self._beginnings and seed != TUNING_SEED),
            keeps_curve=seed != TUNING_SEED,
            flops=run_flops(config, self.suite.source),
            settings=settings,
        )

    def config(self, chosen: Try, seed: int) -> Config:
        """The configuration of that run, but for its place.

        Raises:
            ConfigError: the arm is not for these models, or the budget is too small for it.
        """
        suite = self.suite
        if chosen.arm in suite.small_arms:
            small = self._plain(chosen, seed, suite.small_arms[chosen.arm])
            return replace(small, model=suite.source, data=replace(small.data, seed=seed + SMALL_DATA))
        if chosen.arm in suite.scratch_arms:
            return self._plain(chosen, seed, suite.scratch_arms[chosen.arm])
        config = self._built(chosen, seed)
        if chosen.map_lr is None:
            return config
        return replace(config, growth=replace(config.growth, ligo_lr=chosen.map_lr))

    def small(self, seed: int, of: str = SMALL) -> Job:
        """The small model of a seed, on its share of the budget; `of` an arm: that which it starts or learns from."""
        return self.job(self._small_try(of), seed)

    @cached_property
    def _beginnings(self) -> set[str]:
        """The runs of the small model that others start or learn from."""
        return {small_of(name) for name in [*self.arms, *self.controls]}

    def _placed(self, chosen: Try, seed: int) -> tuple[Config, Json]:
        """The configuration of a run in its directory, and what decides the run: other settings, another directory."""
        config = self.config(chosen, seed)
        uses_small = bool(config.init.from_ or config.salt.teacher)
        small = key_of(self._placed(self._small_try(chosen.arm), seed)[1]) if uses_small else ""
        count = 0 if seed == TUNING_SEED else self.num_questions
        settings = settings_of(config, self.corpus.sha256, count, small)
        place = self.folder / "runs" / f"{chosen.name}-seed{seed}-{key_of(settings)[:8]}"
        return replace(config, run=RunConfig(dir=str(place))), settings

    def _built(self, chosen: Try, seed: int) -> Config:
        """The run of a recipe, as long as its budget allows."""
        suite, recipe = self.suite, RECIPES[tuned_as(chosen.arm)]
        pair = suite.pair(self._placed(self._small_try(chosen.arm), seed)[0].run.dir)

        def build(steps: int) -> Config:
            return recipe(self._plain(chosen, seed, steps), pair)

        def charged(steps: int) -> Config:
            return as_charged(chosen.arm, build(steps))

        if chosen.arm not in self._steps:
            cost = suite.source_steps * suite.step_flops(suite.source)
            self._steps[chosen.arm] = affordable_steps(charged, suite.source, cost, suite.budget)
        return build(self._steps[chosen.arm])

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
        )

    def _small_try(self, arm: str) -> Try:
        """The small model's settings as an arm uses it; before it is tuned, any stand for them."""
        name = small_of(arm)
        return self.chosen(name) if self.knows(name) else Try(name, self.suite.rates[0])

    @cached_property
    def _questions(self) -> str:
        count, corpus = self.num_questions, self.corpus
        return str(make_questions(corpus.validation, corpus.tokenizer, corpus.folder / f"questions-{count}", count))

    def _tune(self, arms: Iterable[str], refines: bool) -> None:
        names = list(arms)
        self.sweep.tune(names, self.suite.rates, self._measure, self._tunes_maps if refines else None)
        if self.only_reads or NEVER_GROWN in names:  # what diverges at all rates is told by the report
            return
        if not self.sweep.knows(names):
            self.runner.raise_failures()
        for name in names:
            self.sweep.best(name)

    def _measure(self, tries: Sequence[Try]) -> list[Tried]:
        """Carries tries out on the tuning seed."""
        self._carry_out([(each, TUNING_SEED) for each in tries])
        lines = [(each, self.ended(each, TUNING_SEED)) for each in tries]
        return [Tried(each.arm, each.lr, each.map_lr, line.loss) for each, line in lines if line]

    def _drop_models(self) -> None:
        """Removes small models that were only tried."""
        for row in self.sweep.rows:
            if row.key != self._small_try(SMALL):
                shutil.rmtree(self.job(row.key, TUNING_SEED).directory / "checkpoints", ignore_errors=True)

    def _carry_out(self, runs: Sequence[tuple[Try, int]]) -> None:
        """Runs what is missing, after the small models that it needs; the longest runs first."""
        if self.only_reads:
            return
        record = self.runner.record
        missing = [job for job in (self.job(*each) for each in runs) if record.adopt(job.key) is None]
        needed = [self.small(seed, chosen.arm) for chosen, seed in runs]
        smalls = {str(small.directory): small for small in needed}
        starts = {job.config.init.from_ or job.config.salt.teacher for job in missing}
        self.runner.make_models([small for place, small in smalls.items() if place in starts])
        without = {place for place, small in smalls.items() if not small.has_model}
        ready = [job for job in missing if (job.config.init.from_ or job.config.salt.teacher) not in without]
        self.runner.carry_out(sorted(ready, key=lambda job: -job.flops))

    def _tunes_maps(self, arm: str) -> bool:
        """Whether an arm learns maps at a rate that is not its point."""
        growth = self.config(self.sweep.best(arm), TUNING_SEED).growth
        return growth.learns_maps and growth.ligo_steps > 0 and growth.ligo_lr == MAP_RATES[0]

    def _check(self, config: Config) -> None:
        """Raises ConfigError where the run would be refused when it begins."""
        check(config, 1)
        source = config.growth.source or self.suite.source
        if config.growth.method != "none":
            check_chain(config, source)
            check_recipes(RunState(source, "small"), config)

"""Tests ../../megagrow/compare/recipes.py and suites.py: every arm on every pair, built and checked, not run."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.compare.budget import run_flops
from megagrow.compare.corpus import Corpus
from megagrow.compare.experiment import Experiment
from megagrow.compare.pair import Pair
from megagrow.compare.recipes import RECIPES
from megagrow.compare.record import Record
from megagrow.compare.runner import Runner
from megagrow.compare.suite import NEVER_GROWN, SCRATCH, SMALL, TUNING_SEED
from megagrow.compare.suites import SIZES, SUITES, suite
from megagrow.compare.sweep import MAP_RATES, Sweep, Try
from megagrow.config import Config, TrainConfig
from megagrow.errors import ConfigError
from megagrow.roles import num_parameters

# What the pairs do not allow; every other arm of the table has to be possible.
WIDTH_ARMS = {name for name, recipe in RECIPES.items() if recipe.axes == ("width",)}
TEACHING = {"salt", "kd", "ki", "salt_selected", "selected", "ligo_salt", "ligo_taught", "stack_salt"}
REFUSED = {
    "llama_width": {"stack", "interleave", "stack_salt", "clone_zero_pad"},
    "llama_depth": WIDTH_ARMS,
    "llama_both": {"stack", "clone_zero_pad"},
    "gpt2": {"stack", "net2net", "zero_pad", "clone_exact"},
    "bert": {"stack", "net2net", "zero_pad", *(name for name in WIDTH_ARMS if name.startswith("clone")), *TEACHING},
    "salt": {"stack", "interleave", "stack_salt", "net2net", "clone_exact"},
}


def experiment(name: str, size: str) -> Experiment:
    """A comparison of all arms, of which nothing is ever run."""
    whole = replace(suite(name, size), arms=tuple(arm for arm in RECIPES if arm != SCRATCH))
    return Experiment(
        whole, Corpus(Path("corpus"), "none", "0" * 64), Path("runs"), Runner(Record(Path("none"))), Sweep()
    )


@pytest.mark.parametrize("name", SUITES)
def test_every_recipe_is_possible_or_says_why_not(name: str) -> None:
    found = experiment(name, "core").refused
    assert set(found) == REFUSED[name], found
    assert all(len(reason.splitlines()) == 1 and len(reason) > 20 for reason in found.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SUITES)
def test_suites_list_six_arms_that_are_possible(name: str, size: str) -> None:
    found = suite(name, size)
    arms = set(suite(name, "core").arms)
    assert len(arms) == 6 and not arms & REFUSED[name]
    assert set(found.arms) == (set(RECIPES) - {SCRATCH} if size == "full" else arms)
    assert len(found.seeds) == (3 if size in ("core", "gpu") else 1) and TUNING_SEED not in found.seeds
    assert min(found.scratch_budgets) < 1 < max(found.scratch_budgets)


@pytest.mark.parametrize(("name", "times"), [("gpt2", (2.2, 3.6)), ("bert", (2.2, 4.6)), ("salt", (1.3, 2.0))])
def test_pairs_have_the_proportions_of_those_they_stand_for(name: str, times: tuple[float, float]) -> None:
    """GPT-2 345M to 117M, BERT base 110M to small 29M; a student of 2.8B to a teacher of 1.5B."""
    found = suite(name, "gpu")
    assert times[0] < num_parameters(found.target) / num_parameters(found.source) < times[1]


def pair() -> tuple[Config, Pair]:
    found = suite("llama_both", "tiny")
    return replace(found.base, model=found.target, train=TrainConfig(steps=100)), found.pair("runs/small")


def test_growth_starts_from_the_shared_small_model_and_forgets_moments() -> None:
    grown = RECIPES["rms_random"](*pair())
    assert (grown.init.from_, grown.growth.method, grown.growth.optimizer) == (
        "runs/small",
        "rms_random+stack",
        "reset",
    )
    unlearned = RECIPES["ligo_0"](*pair()).growth
    assert (unlearned.method, unlearned.ligo_steps) == ("ligo", 0)
    assert replace(unlearned, ligo_steps=RECIPES["ligo"](*pair()).growth.ligo_steps) == RECIPES["ligo"](*pair()).growth


def test_arms_that_learn_maps_begin_at_the_first_rate_but_those_about_a_rate() -> None:
    learning = {name: RECIPES[name](*pair()).growth for name in RECIPES if name.startswith("ligo") and name != "ligo_0"}
    rates = {name: growth.ligo_lr for name, growth in learning.items() if growth.ligo_lr != MAP_RATES[0]}
    assert len(learning) >= 8 and rates == {"ligo_slow": 3e-4, "ligo_fast": 1e-2}


def test_arms_without_a_small_model_name_none() -> None:
    for name in ("scratch", "mslt", "bootstrap"):
        built = RECIPES[name](*pair())
        assert not built.init.from_ and not built.salt.teacher
    assert RECIPES["mslt"](*pair()).growth.source.num_layers == 2


def test_growth_in_mid_run_that_forgets_moments_warms_up_anew() -> None:
    """At the start of a run its own warm-up does."""
    config, models = pair()
    config = replace(config, optim=replace(config.optim, warmup_steps=7))
    later = []
    for name, recipe in RECIPES.items():
        with suppress(ConfigError):
            growth = recipe(config, models).growth
            if growth.optimizer == "reset" and (growth.at_step > 0 or growth.bootstrap):
                assert growth.rewarmup_steps == 7, name
                later.append(name)
    assert later == ["bootstrap", "progressive"]


def test_teachers_are_the_small_model_and_students_random() -> None:
    for name, weight in (("salt", 0.5), ("kd", 0.5), ("ki", 1.0), ("selected", 0.0)):
        built = RECIPES[name](*pair())
        assert (built.salt.teacher, built.salt.weight, built.init.from_) == ("runs/small", weight, "")


def test_a_recipe_about_an_axis_that_does_not_grow_is_refused() -> None:
    found = suite("llama_width", "tiny")
    with pytest.raises(ConfigError, match="interleave is about depth, which does not grow here"):
        RECIPES["interleave"](found.base, found.pair("small"))


def test_all_arms_of_a_budget_cost_it_within_a_step() -> None:
    """By the plan; tests/compare/test_budget.py holds the plan against ledgers."""
    found = experiment("llama_both", "core")
    whole = found.suite
    small = whole.source_steps * whole.step_flops(whole.source)
    assert small / whole.budget == pytest.approx(whole.source_share, rel=1e-3)
    for arm in found.arms:
        config = found.config(Try(arm, 1e-3), 1)
        inherited = small if config.init.from_ or config.salt.teacher else 0.0
        spent = run_flops(config, whole.source) + inherited
        assert 0 <= whole.budget - spent < 2.5 * whole.step_flops(whole.target), arm


def test_a_control_trains_as_long_as_the_arm_that_learns_nothing_and_learns() -> None:
    found = experiment("llama_both", "core")
    learned, charged, unlearned = (
        found.config(Try(arm, 1e-3, rate), 1)
        for arm, rate in (("ligo_uncharged", 3e-4), ("ligo", 3e-4), ("ligo_0", None))
    )
    assert learned.train.steps == unlearned.train.steps > charged.train.steps
    assert learned.growth == charged.growth and learned.growth.ligo_steps > 0


def test_the_small_model_that_never_grows_has_the_whole_budget_and_samples_of_its_own() -> None:
    found = experiment("llama_depth", "core")
    small, never = (found.config(Try(arm, 1e-3), 1) for arm in (SMALL, NEVER_GROWN))
    assert (never.model, never.data) == (small.model, small.data) and never.growth.method == "none"
    assert run_flops(never, found.suite.source) == pytest.approx(found.suite.budget, rel=1e-3)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_its_controls(name: str) -> None:
    found = experiment(name, "core")
    arms = suite(name, "core").arms
    beside = replace(found, suite=suite(name, "core")).controls
    learned = [f"{arm}_uncharged" for arm in ("ligo", "ligo_full_rank") if arm in arms]
    assert beside == [NEVER_GROWN, *learned, *([f"salt_by_{NEVER_GROWN}"] if name == "salt" else [])]


def test_a_finished_teacher_teaches_for_as_many_steps() -> None:
    found = experiment("salt", "core")
    by_finished, by_small = (found.config(Try(arm, 1e-3), 1) for arm in (f"salt_by_{NEVER_GROWN}", "salt"))
    teacher = by_finished.salt.teacher
    assert f"/{NEVER_GROWN}-lr" in teacher and f"/{SMALL}-lr" in by_small.salt.teacher
    assert by_finished == replace(by_small, run=by_finished.run, salt=replace(by_small.salt, teacher=teacher))

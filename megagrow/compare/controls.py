"""Controls: runs that tell what of an arm does the work. None is tuned; each has the rates of what it is about.

never_grown     the small model on the whole budget: what growing has to beat, beside training from scratch
X_uncharged     X, which learns maps, trained for as many steps as if learning them had cost nothing; as nearly as
                it is where a hundred steps of learning are a ten thousandth of the run. Beside `ligo_0` and
                `rms_random`, from which X starts, that is what learning the maps gives, apart from what it costs
"""

from collections.abc import Iterable
from dataclasses import replace

from megagrow.compare.suite import NEVER_GROWN, SMALL
from megagrow.config import Config

_UNCHARGED = "{}_uncharged"
LEARNED = ("ligo", "ligo_full_rank", "ligo_target_layer")
CONTROLS = {NEVER_GROWN: SMALL, **{_UNCHARGED.format(arm): arm for arm in LEARNED}}  # -> what it is about

ABOUT = {
    NEVER_GROWN: "The small model, trained on the whole budget and never grown.",
    **{
        name: f"{arm} that trains as long as if learning its maps had cost nothing; it spends more than its budget."
        for name, arm in CONTROLS.items()
        if arm != SMALL
    },
}


def controls_of(arms: Iterable[str]) -> list[str]:
    """The controls that belong beside some arms."""
    there = {SMALL, *arms}
    return [name for name, arm in CONTROLS.items() if arm in there]


def without_learning(config: Config) -> Config:
    """The run of an arm without the steps that learn its maps, which is what it is charged for."""
    return replace(config, growth=replace(config.growth, ligo_steps=0))

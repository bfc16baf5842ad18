"""What is compared: arms over one pair of models and one dataset, and how much each may cost."""

from dataclasses import dataclass

from megagrow import flops
from megagrow.compare.pair import Pair
from megagrow.config import Config, ModelConfig, require
from megagrow.timeline import step_tokens

SMALL, SCRATCH, NEVER_GROWN = "small", "scratch", "never_grown"
TUNING_SEED = 0  # on which rates are chosen; no figure is reported of it


@dataclass(frozen=True)
class Suite:
    """One comparison.

    Every arm may spend what `steps` steps of the large model from random weights take, all-in: what the small model, a
    teacher or learning maps take, it trains for fewer steps.

    Attributes:
        name, size: what it is called, and in which size it is run.
        source, target: the two models; their vocabulary is that of the tokenizer unless they are encoders.
        base: what all runs have in common: batch, length, precision, schedule, evaluation. Model, steps, learning rate,
            seed and paths are set for each run.
        arms: names of recipes, without the baseline, which is always there.
        steps: see above.
        source_share: of that budget, which trains the small model.
        scratch_budgets: of the baseline, as shares of the budget; each is a run of its own whose schedule ends there.
        rates: learning rates that every arm is tried at.
        refines: whether two more follow for every arm, as they always do for the small model; see sweep.
        seeds: those that are reported; none of them is TUNING_SEED.
        winner_seeds: further ones, of the arm that was best on TUNING_SEED and of what it is compared with.
        ligo_steps: see Pair.
        vocab_size: of the tokenizer.
        num_questions: of each downstream task; 0: none are asked.
    """

    name: str
    size: str
    source: ModelConfig
    target: ModelConfig
    base: Config
    arms: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    ligo_steps: int
    vocab_size: int
    source_share: float = 0.2
    scratch_budgets: tuple[float, ...] = (0.6, 1.0, 1.7)
    refines: bool = True
    winner_seeds: tuple[int, ...] = ()
    num_questions: int = 0

    def __post_init__(self) -> None:
        require(len(self.scratch_budgets) >= 3, f"{self.name}: savings are interpolated between 3 scratch budgets")
        require(
            max(self.scratch_budgets) >= 1, f"{self.name}: scratch must get what the arms get all-in, a budget of 1"
        )
        reported = (*self.seeds, *self.winner_seeds)
        require(TUNING_SEED not in reported, f"{self.name}: rates are chosen on seed {TUNING_SEED}; report others")

    @property
    def budget(self) -> float:
        """FLOPs of every arm, all-in."""
        return self.steps * self.step_flops(self.target)

    @property
    def source_steps(self) -> int:
        """Steps of the small model."""
        return max(round(self.source_share * self.budget / self.step_flops(self.source)), 1)

    @property
    def small_arms(self) -> dict[str, int]:
        """The runs of the small model by name, and their steps: on its share of the budget, and on all of it."""
        return {SMALL: self.source_steps, NEVER_GROWN: int(self.budget // self.step_flops(self.source))}

    @property
    def scratch_arms(self) -> dict[str, int]:
        """The baseline's runs by name, and their steps."""
        return {f"{SCRATCH}-{budget:g}": max(round(budget * self.steps), 1) for budget in self.scratch_budgets}

    def step_flops(self, model: ModelConfig) -> float:
        """FLOPs of one step of plain training."""
        return flops.training_flops(model, step_tokens(self.base), self.base.data.seq_length)

    def pair(self, small: str) -> Pair:
        """The two models, with the small one's run directory."""
        return Pair(self.source, self.target, small, self.ligo_steps)

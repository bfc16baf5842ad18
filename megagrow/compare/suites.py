"""The suites: which arms on which pair of models.

    llama_width    width x 2            llama_depth    depth x 2          llama_both    both
    gpt2           base to medium       bert           small to base      salt          a student of twice its teacher

Four sizes each: `core` (six arms, three seeds), `full` (all arms, one seed, of the best three), `gpu` (the arms of
`core`, shapes for one large GPU) and `tiny` (seconds, for tests). What they take: docs/compare.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megagrow import flops
from megagrow.compare.recipes import RECIPES
from megagrow.compare.suite import SCRATCH, Suite
from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from megagrow.presets import bert_model, gpt2_model, llama_model

SIZES = ("core", "full", "gpu", "tiny")
SUITES: dict[str, Callable[[str], Suite]] = {}


@dataclass(frozen=True)
class Scale:
    """What the suites of one size have in common.

    Attributes:
        vocab_size: of the tokenizer.
        seq_length, batch: of a step.
        head_dim: of all models.
        unit: width in heads that a suite's widths are multiples of.
        depth: layers that a suite's depths are multiples of.
        budget: FLOPs of an arm, all-in, so that all suites take about as long.
        evaluations, eval_batches: held-out losses of a run, and batches of each.
        num_questions: of each downstream task.
        rates: learning rates of the first round.
    """

    vocab_size: int
    seq_length: int
    batch: int
    head_dim: int
    unit: int
    depth: int
    budget: float
    evaluations: int
    eval_batches: int
    num_questions: int
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)


# The budget has to be one for which the large model is the better buy, or growing is a way of getting the wrong one: at
# 5 TFLOP 3x32 ends at 2.805, 3x48 at 2.749, 6x48 at 2.714, 6x64 at 2.705. Rates: 6x64 ends at 3.070, 3.017 and 3.043
# for 2.8, 5.6 and 11e-3 after 2 TFLOP, 3x32 at 3.043, 3.023 and 3.053 for 5.6, 11 and 22e-3 after 1.
RATES = (3e-3, 6e-3, 1.2e-2)
CPU = Scale(
    512, 128, 8, 16, unit=1, depth=1, budget=5e12, evaluations=10, eval_batches=24, num_questions=400, rates=RATES
)
GPU = Scale(4096, 512, 32, 64, unit=1, depth=1, budget=1e15, evaluations=10, eval_batches=8, num_questions=1000)
TINY = Scale(512, 64, 2, 8, unit=1, depth=1, budget=1e9, evaluations=3, eval_batches=2, num_questions=4)
SCALES = {"core": CPU, "full": CPU, "gpu": GPU, "tiny": TINY}

# Learned positions hold a model at the frequencies of tokens until they are known, which takes so many tokens, whatever
# the batch. After 5 TFLOP on 128 tokens GPT-2 3x48 is at 2.823 and 6x64 at 3.098 (2.833 and 3.111 with half the batch),
# BERT 3x32 at 4.329 and 6x48 at 4.397, which is that plateau. So there are fewer positions, as many tokens to a step,
# and two layers at first: GPT-2 2x48 ends at 2.770, 4x64 at 2.751, BERT 2x32 at 2.592, 4x48 at 2.506. Rates: BERT 4x48
# ends at 2.535, 2.506 and 2.537 for 2, 3 and 4.2e-3, and on the plateau for 6. BERT's loss is of 15 % of the tokens: it
# is taken from more of them.
LOWER = (1.5e-3, 3e-3, 6e-3)
CPU_OF = {
    "gpt2": replace(CPU, seq_length=64, batch=16, rates=LOWER),
    "bert": replace(CPU, seq_length=16, batch=64, eval_batches=96, rates=LOWER),
}

Shape = tuple[int, int]  # layers and heads, in units of the scale


def suite(name: str, size: str) -> Suite:
    """A suite by name, in one of SIZES.

    Raises:
        ConfigError: there is no such suite or size.
    """
    require(name in SUITES, f"no suite {name}; there are {', '.join(SUITES)}")
    require(size in SIZES, f"no size {size}; there are {', '.join(SIZES)}")
    return SUITES[name](size)


def _suite(function: Callable[[str], Suite]) -> Callable[[str], Suite]:
    SUITES[function.__name__] = function
    return function


@_suite
def llama_width(size: str) -> Suite:
    """A Llama that becomes twice as wide."""
    arms = "rms_random", "clone_asymmetric", "fpi", "ligo", "ligo_0", "ligo_full_rank"
    return _make("llama_width", size, llama, (4, 2), (4, 4), arms)


@_suite
def llama_depth(size: str) -> Suite:
    """A Llama that becomes twice as deep."""
    arms = "stack", "interleave", "mslt", "ligo", "ligo_0", "stack_salt"
    made = _make("llama_depth", size, llama, (3, 3), (6, 3), arms)
    if size not in ("core", "full"):
        return made
    return replace(made, scratch_budgets=(*made.scratch_budgets, 2.9))  # MSLT ends below scratch at 1.7


@_suite
def llama_both(size: str) -> Suite:
    """A Llama that becomes twice as wide and as deep."""
    arms = "rms_random", "aki", "ligo", "ligo_0", "ligo_full_rank", "ligo_salt"
    return _make("llama_both", size, llama, (3, 2), (6, 4), arms)


@_suite
def gpt2(size: str) -> Suite:
    """GPT-2 base to medium: twice the layers, 4/3 of the width."""
    arms = "rms_random", "fpi", "aki", "ligo", "ligo_0", "ligo_target_layer"
    return _make("gpt2", size, gpt2_of, (2, 3), (4, 4), arms)


@_suite
def bert(size: str) -> Suite:
    """BERT small to base, by masked language modelling: twice the layers, 3/2 of the width."""
    arms = "interleave", "fpi", "aki", "ligo", "ligo_0", "ligo_target_layer"
    return _make("bert", size, bert_of, (2, 2), (4, 3), arms)


@_suite
def salt(size: str) -> Suite:
    """A student of about twice its teacher's size: what teaching and growing give, apart and together."""
    arms = "salt", "kd", "ki", "salt_selected", "rms_random", "ligo_salt"
    return _make("salt", size, llama, (4, 3), (4, 4), arms)


def llama(scale: Scale, layers: int, heads: int) -> ModelConfig:
    """A Llama, its FFN of 8/3 of the width rounded up to pairs of heads, so that it doubles where the width does."""
    hidden, pair = heads * scale.head_dim, 2 * scale.head_dim
    ffn = -(-hidden * 8 // 3 // pair) * pair
    return llama_model(layers, hidden, scale.head_dim, ffn, scale.vocab_size, scale.seq_length)


def gpt2_of(scale: Scale, layers: int, heads: int) -> ModelConfig:
    """A GPT-2."""
    return _resized(gpt2_model(layers, 64 * heads), scale, scale.vocab_size)


def bert_of(scale: Scale, layers: int, heads: int) -> ModelConfig:
    """A BERT; its mask token comes after those of the tokenizer."""
    return _resized(bert_model(layers, 64 * heads), scale, scale.vocab_size + 1)


def _resized(model: ModelConfig, scale: Scale, vocab_size: int) -> ModelConfig:
    hidden = model.num_heads * scale.head_dim
    sizes: dict[str, Any] = {"hidden_size": hidden, "head_dim": scale.head_dim, "ffn_size": 4 * hidden}
    return replace(model, vocab_size=vocab_size, max_seq_length=scale.seq_length, **sizes)


def _make(
    name: str,
    size: str,
    model: Callable[[Scale, int, int], ModelConfig],
    source: Shape,
    target: Shape,
    core: tuple[str, ...],
) -> Suite:
    scale = CPU_OF.get(name, CPU) if SCALES[size] is CPU else SCALES[size]
    small, large = (model(scale, layers * scale.depth, heads * scale.unit) for layers, heads in (source, target))
    everything = tuple(arm for arm in RECIPES if arm != SCRATCH)
    step_flops = flops.training_flops(large, scale.batch * scale.seq_length, scale.seq_length)
    steps = round(scale.budget / step_flops)
    return Suite(
        name=name,
        size=size,
        source=small,
        target=large,
        base=_base(scale, large, steps, size),
        arms=everything if size == "full" else core,
        steps=steps,
        rates=scale.rates,
        seeds=(1, 2, 3) if size in ("core", "gpu") else (1,),
        winner_seeds=(2, 3) if size == "full" else (),
        ligo_steps=max(steps // 20, 1),
        vocab_size=scale.vocab_size,
        refines=size == "core",
        num_questions=scale.num_questions,
    )


def _base(scale: Scale, model: ModelConfig, steps: int, size: str) -> Config:
    mask, is_gpu = -1 if model.is_causal else scale.vocab_size, size == "gpu"
    interval = max(steps // scale.evaluations, 1)
    return Config(
        model=model,
        data=DataConfig(seq_length=scale.seq_length, mask_token=mask),
        train=TrainConfig(
            steps=steps,
            global_batch_size=scale.batch,
            precision="bf16" if is_gpu else "fp32",
            eval_interval=interval,
            eval_after_growth=interval,  # how soon a loss is recovered is told to a factor of two
            eval_batches=scale.eval_batches,
            threads=0 if is_gpu else 1,
            # Chunks of 1,024 tokens would be most of the launches of a step of such models
            loss_chunk=scale.batch * scale.seq_length if is_gpu else TrainConfig.loss_chunk,
        ),
        optim=OptimConfig(warmup_steps=max(steps // 30, 1), decay_fraction=0.4),
        checkpoint=CheckpointConfig(interval=max(steps // 4, 1), keep_last=1),
        init=InitConfig(skip_source_check=size == "tiny"),  # whose small model has hardly learned anything
    )

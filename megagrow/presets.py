"""A run is one function that returns one complete configuration.

The docstring says what to expect, what it costs, and the command. Paths are relative to where the command is run.
"""

import dataclasses
from collections.abc import Callable

from megagrow.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    GrowthConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SaltConfig,
    TrainConfig,
)
from megagrow.earlier_growth import EarlierGrowth
from megagrow.salt_config import GROWN

_PRESETS: dict[str, Callable[[], Config]] = {}


def _preset(function: Callable[[], Config]) -> Callable[[], Config]:
    _PRESETS[function.__name__] = function
    return function


def names() -> list[str]:
    """All presets, in the order of this file."""
    return list(_PRESETS)


def get(name: str) -> Config:
    """The configuration of a preset.

    Raises:
        KeyError: no such preset.
    """
    return _PRESETS[name]()


def docstring(name: str) -> str:
    """What a preset says about itself."""
    return _PRESETS[name].__doc__ or ""


# Shapes


def llama_model(layers: int, hidden: int, head_dim: int, ffn: int, vocab: int, length: int) -> ModelConfig:
    """A Llama shape with as many heads as head_dim divides the width into."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // head_dim,
        ffn_size=ffn,
        max_seq_length=length,
    )


def gpt2_model(layers: int, hidden: int) -> ModelConfig:
    """A GPT-2 shape (Radford et al., 2019): heads of 64, FFN of 4 x width, learned positions, tied head."""
    return ModelConfig(
        family="gpt2",
        vocab_size=50_257,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        ffn_size=4 * hidden,
        max_seq_length=1024,
        norm="layer_norm",
        positions="learned",
        activation="gelu",
        attention_bias="all",
        mlp_bias=True,
        tied_embeddings=True,
    )


def bert_model(layers: int, hidden: int) -> ModelConfig:
    """A BERT shape (Devlin et al., 2018): heads of 64, FFN of 4 x width, 512 positions, two types of tokens."""
    return ModelConfig(
        family="bert",
        vocab_size=30_522,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        ffn_size=4 * hidden,
        max_seq_length=512,
        objective="mlm",
        norm="layer_norm",
        norm_eps=1e-12,
        norm_place="after",
        positions="learned",
        num_token_types=2,
        activation="gelu_erf",
        attention_bias="all",
        mlp_bias=True,
        tied_embeddings=True,
    )


def roberta_model(layers: int, hidden: int) -> ModelConfig:
    """A RoBERTa shape (Liu et al., 2019): BERT's without token types that differ, positions counted from 2 on."""
    return dataclasses.replace(
        bert_model(layers, hidden),
        family="roberta",
        vocab_size=50_265,
        norm_eps=1e-5,
        num_token_types=1,
        position_offset=2,
    )


# Training from scratch


@_preset
def llama_125m() -> Config:
    """A Llama of 134M parameters (12 x 768, vocabulary 32,000) on 2.6B tokens, Chinchilla's 20 per parameter.

    Cost: 2.3e18 FLOPs. Not yet run to its end here.
    torchrun --nproc-per-node 8 -m megagrow llama_125m --data.train PREFIX --data.validation PREFIX --data.tokenizer T
    """
    return Config(
        model=llama_model(12, 768, 64, 2048, 32_000, 2048),
        data=DataConfig(seq_length=2048),
        train=TrainConfig(steps=10_000, global_batch_size=128, precision="bf16", eval_interval=500),
        optim=OptimConfig(lr=6e-4, warmup_steps=500, min_lr_ratio=0.1),
        checkpoint=CheckpointConfig(interval=500, keep_last=3),
        run=RunConfig(dir="runs/llama_125m"),
    )


@_preset
def gpt2_124m() -> Config:
    """GPT-2 base (124M parameters) on 2.5B tokens.

    Cost: 2.1e18 FLOPs. Not yet run to its end here.
    torchrun --nproc-per-node 8 -m megagrow gpt2_124m --data.train PREFIX --data.validation PREFIX --data.tokenizer T
    """
    return Config(
        model=gpt2_model(12, 768),
        data=DataConfig(seq_length=1024),
        train=TrainConfig(steps=10_000, global_batch_size=240, precision="bf16", eval_interval=500),
        optim=OptimConfig(lr=6e-4, warmup_steps=500, schedule="cosine", min_lr_ratio=0.1),
        checkpoint=CheckpointConfig(interval=500, keep_last=3),
        run=RunConfig(dir="runs/gpt2_124m"),
    )


@_preset
def bert_base() -> Config:
    """BERT base (110M parameters) by masked language modelling alone, with the paper's batch, steps and optimizer.

    Its sequences are packed text of 512 tokens all along, without next-sentence prediction. Cost: 9.3e19 FLOPs for
    131B tokens. Not yet run to its end here.
    torchrun --nproc-per-node 8 -m megagrow bert_base --data.train PREFIX --data.validation PREFIX --data.tokenizer T
    """
    return Config(
        model=bert_model(12, 768),
        data=DataConfig(seq_length=512),
        train=TrainConfig(
            steps=1_000_000, global_batch_size=256, precision="bf16", dropout=0.1, eval_interval=10_000, eval_batches=16
        ),
        optim=OptimConfig(lr=1e-4, beta2=0.999, eps=1e-6, weight_decay=0.01, warmup_steps=10_000, decay_fraction=0.99),
        checkpoint=CheckpointConfig(interval=10_000, keep_last=3),
        run=RunConfig(dir="runs/bert_base"),
    )


@_preset
def roberta_base() -> Config:
    """RoBERTa base (125M parameters) with the paper's batch, steps and optimizer.

    Cost: 1.7e21 FLOPs for 2.1T tokens. Not yet run to its end here.
    torchrun --nproc-per-node 8 -m megagrow roberta_base --data.train PREFIX --data.validation PREFIX --data.tokenizer T
    """
    return Config(
        model=roberta_model(12, 768),
        data=DataConfig(seq_length=512),
        train=TrainConfig(
            steps=500_000, global_batch_size=8_192, precision="bf16", dropout=0.1, eval_interval=5_000, eval_batches=1
        ),
        optim=OptimConfig(
            lr=6e-4,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=0.0,
            warmup_steps=24_000,
            decay_fraction=0.952,
        ),
        checkpoint=CheckpointConfig(interval=5_000, keep_last=3),
        run=RunConfig(dir="runs/roberta_base"),
    )


# Growing


@_preset
def grow_llama_125m() -> Config:
    """Doubles the depth and the width of `llama_125m`: new units at random, of the old ones' size, and stacked layers.

    Cost: 1.38e19 FLOPs for 2.6B tokens; growing itself takes a moment. Not yet run to its end here. The method rests on
    docs/results.md, llama_both: at toy scale it saved 26 % of the FLOPs, the small model charged, more than copies
    (`aki`) and learned maps (`ligo`); SALT after growing ended higher than growing alone.
    torchrun --nproc-per-node 8 -m megagrow grow_llama_125m --init.from runs/llama_125m --data.train PREFIX …
    """
    return dataclasses.replace(
        llama_125m(),
        model=llama_model(24, 1536, 64, 4096, 32_000, 2048),
        growth=GrowthConfig(method="rms_random+stack", optimizer="reset"),
        optim=OptimConfig(lr=4e-4, warmup_steps=500, min_lr_ratio=0.1),
        run=RunConfig(dir="runs/grow_llama_125m"),
    )


@_preset
def mslt_llama_125m() -> Config:
    """Trains `llama_125m` in stages of 3, 6 and 12 layers; at each growth the new layers learn alone at first.

    Multi-stage layerwise training (MSLT, Yang et al., 2020): the new layers, on top, are copies of the older ones,
    which stand still, so that their backward pass is left out; the last stage trains all.

    Cost: 75 % of the FLOPs of `llama_125m`. Not yet run to its end here. At toy scale, with stages of these steps, it
    saved 46 % of the FLOPs all-in, the most of six arms that end with one depth (docs/results.md, llama_depth).
    torchrun --nproc-per-node 8 -m megagrow mslt_llama_125m --data.train PREFIX --data.validation PREFIX …
    """
    whole = llama_125m()
    steps = whole.train.steps
    return dataclasses.replace(
        whole,
        growth=GrowthConfig(
            method="stack",
            source=dataclasses.replace(whole.model, num_layers=3),
            earlier=(EarlierGrowth(num_layers=6, at_step=steps // 5, freeze_steps=steps // 10),),
            at_step=2 * steps // 5,
            freeze_steps=steps // 10,
        ),
        run=RunConfig(dir="runs/mslt_llama_125m"),
    )


# Learning from a smaller model


def _student() -> Config:
    """A Llama of 271M parameters, twice those of `llama_125m`, which teaches it."""
    return dataclasses.replace(
        llama_125m(),
        model=llama_model(16, 1024, 64, 2816, 32_000, 2048),
        optim=OptimConfig(lr=5e-4, warmup_steps=500, min_lr_ratio=0.1),
    )


@_preset
def salt_llama_125m() -> Config:
    """SALT: `llama_125m` teaches a model of twice its size for 17 % of the run, then leaves it alone.

    Weight, temperature and share are those of docs/salt.md. Cost: 4.80e18 FLOPs for 2.6B tokens, plus 2.8 % for the
    teacher. Not yet run to its end here. Rests on docs/results.md, salt: at toy scale it saved 7 % of the
    FLOPs where the teacher was a gift; with one that took a fifth of the budget charged, it cost 16 % more.
    torchrun --nproc-per-node 8 -m megagrow salt_llama_125m --salt.teacher runs/llama_125m --data.train PREFIX …
    """
    return dataclasses.replace(
        _student(),
        salt=SaltConfig(teacher="runs/llama_125m", steps=1_730),
        run=RunConfig(dir="runs/salt_llama_125m"),
    )


@_preset
def inherit_llama_125m() -> Config:
    """Knowledge inheritance: `llama_125m` teaches a model of twice its size, less with every step.

    The paper's settings: temperature 2 in both models, the teacher's share falls from 1 to 0 over the first 44 % of the
    run. Cost: 4.80e18 FLOPs for 2.6B tokens, plus 7.1 % for the teacher. Not yet run to its end here. Rests on
    docs/results.md, salt (`ki`): at toy scale it saved 21 % of the FLOPs where the teacher was a gift, SALT 7 %; with
    one that took a fifth of the budget charged, it saved 1 %, which three seeds do not tell from nothing.
    torchrun --nproc-per-node 8 -m megagrow inherit_llama_125m --salt.teacher runs/llama_125m --data.train PREFIX …
    """
    return dataclasses.replace(
        _student(),
        salt=SaltConfig(
            teacher="runs/llama_125m",
            steps=4_400,
            weight=1.0,
            schedule="linear",
            temperature=2.0,
            temperature_on="both",
            scale_by_temperature_squared=True,
        ),
        run=RunConfig(dir="runs/inherit_llama_125m"),
    )


# The quickstart: minutes on two CPU cores

QUICKSTART = "runs/quickstart"
QUICKSTART_VOCAB = 2048


def _quickstart(arm: str, model: ModelConfig, steps: int, lr: float) -> Config:
    """One arm. Learning rates come from a sweep of single runs; validation loss at the end, nats per token (the small
    model has the lower of two rates within 0.01):

    small, 400 steps            2e-3 4.29   4e-3 4.20   8e-3 4.19
    large, scratch, 200 steps   5e-4 4.96   1e-3 4.74   2e-3 4.83   4e-3 4.94
    large, scratch, 600 steps   1e-3 3.96   2e-3 3.99
    large, grown, 200 steps     1e-3 4.09   2e-3 4.10   4e-3 4.15   (20 steps of tied maps; 10 of full rank: 1e-3 4.08)
    """
    return Config(
        model=model,
        data=DataConfig(
            train=f"{QUICKSTART}/data/train",
            validation=f"{QUICKSTART}/data/validation",
            tokenizer=f"{QUICKSTART}/data/tokenizer.model",
            seq_length=128,
        ),
        train=TrainConfig(steps=steps, global_batch_size=8, eval_interval=25, eval_batches=8),
        optim=OptimConfig(lr=lr, warmup_steps=10, decay_fraction=0.4),
        checkpoint=CheckpointConfig(interval=25, keep_last=2),
        run=RunConfig(dir=f"{QUICKSTART}/{arm}"),
    )


def _quickstart_small_model() -> ModelConfig:
    return llama_model(3, 96, 32, 256, QUICKSTART_VOCAB, 128)


def _quickstart_large_model() -> ModelConfig:
    return llama_model(6, 192, 32, 512, QUICKSTART_VOCAB, 128)


@_preset
def quickstart_small() -> Config:
    """The quickstart's small model, 0.7M parameters.

    torchrun --nproc-per-node 2 -m megagrow quickstart_small
    """
    return _quickstart("small", _quickstart_small_model(), steps=400, lr=4e-3)


@_preset
def quickstart_scratch() -> Config:
    """The quickstart's large model, 3.4M parameters, from random weights; run at three budgets.

    torchrun --nproc-per-node 2 -m megagrow quickstart_scratch --train.steps 200 --run.dir runs/quickstart/scratch-200
    """
    return _quickstart("scratch-200", _quickstart_large_model(), steps=200, lr=1e-3)


@_preset
def quickstart_grown_salt() -> Config:
    """The quickstart's large model grown from the small one by LiGO and trained with SALT on data that it picked.

    It shows all parts at work; which of them pay, docs/results.md says.
    torchrun --nproc-per-node 2 -m megagrow quickstart_grown_salt
    """
    return dataclasses.replace(
        _quickstart("grown_salt", _quickstart_large_model(), steps=200, lr=1e-3),
        init=InitConfig(from_=f"{QUICKSTART}/small"),
        growth=GrowthConfig(method="ligo", optimizer="reset", ligo_steps=10, ligo_lr=1e-3),
        salt=SaltConfig(
            teacher=f"{QUICKSTART}/small", steps=60, weight=0.3, scores=f"{QUICKSTART}/scores", keep_fraction=0.5
        ),
    )


@_preset
def quickstart_whole() -> Config:
    """The quickstart's large model in one run: small model, growth by LiGO, SALT's stage 1, stage 2.

    The small model learns for 400 steps and grows; then it teaches what it has become for 60 steps, on the half of the
    next samples that it scores highest, and leaves. Needs nothing but the corpus (launch/quickstart.sh, 1/8).
    torchrun --nproc-per-node 2 -m megagrow quickstart_whole
    """
    whole = _quickstart("whole", _quickstart_large_model(), steps=600, lr=2e-3)
    return dataclasses.replace(
        whole,
        growth=GrowthConfig(
            method="ligo",
            source=_quickstart_small_model(),
            at_step=400,
            optimizer="reset",
            rewarmup_steps=10,
            ligo_steps=10,
            ligo_lr=1e-3,
        ),
        salt=SaltConfig(teacher=GROWN, steps=60, weight=0.3, online_buffer=8, keep_fraction=0.5),
        optim=dataclasses.replace(whole.optim, decay_fraction=80 / 600),
    )

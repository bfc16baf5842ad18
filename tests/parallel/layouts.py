"""The layouts whose training is compared with one process, on up to 8 ranks, each the smallest that shows its case.

Every axis alone, every pair of axes, every schedule with tensor parallelism and with FSDP2, and what cuts across them:
tied embeddings, few key/value heads, odd vocabularies, uneven stages, accumulation, recompute, dropout, documents.
"""

from dataclasses import dataclass, replace
from typing import Any

from megagrow.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RopeScaling,
    TrainConfig,
    data_ranks,
    microbatch_size,
    min_microbatches,
)
from tests.models import as_bert, as_gpt2, as_gpt_neox, as_qwen2, as_roberta

BATCH, SEQ = 16, 16

LLAMA = ModelConfig(
    vocab_size=96, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, ffn_size=24, max_seq_length=SEQ
)
DEEP = replace(LLAMA, num_layers=6)  # enough for eight stages
TIED = replace(LLAMA, tied_embeddings=True)
QWEN = replace(LLAMA, family="qwen3", qk_norm=True, vocab_size=101)
# Learned positions shift all keys of a query alike: the gradient of a key's bias is zero but for rounding.
GPT2 = as_gpt2(LLAMA)
NEOX = as_gpt_neox(LLAMA, rope_fraction=0.5)
QWEN2 = as_qwen2(LLAMA, num_kv_heads=1, rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=8, beta_fast=2.0))
LLAMA3 = replace(LLAMA, rope_theta=100.0, rope_scaling=RopeScaling("llama3", 8.0, original_max_positions=8))
LINEAR = replace(LLAMA, rope_scaling=RopeScaling("linear", 3.0))
BERT = as_bert(LLAMA, vocab_size=101)
ROBERTA = as_roberta(LLAMA, vocab_size=101)


@dataclass(frozen=True)
class Layout:
    """One row of the parity table.

    Attributes:
        name: the axes with their sizes, and what is special.
        ranks: processes.
        config: model, mesh and options.
    """

    name: str
    ranks: int
    config: Config

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each data rank."""
        share = BATCH // data_ranks(self.config, self.ranks)
        return share // microbatch_size(self.config, self.ranks)

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes that are larger than 1; `shard` and `replicate` are the two parts of the data axis."""
        parallel = self.config.parallel
        sizes = {name: getattr(parallel, name) for name in ("tensor", "context", "pipeline", "replicate")}
        sizes["shard"] = data_ranks(self.config, self.ranks) // parallel.replicate
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def one_process(self) -> Config:
        """The same training without a mesh, in one pass over the batch, everything kept, nothing compiled."""
        train = replace(self.config.train, microbatch_size=0, recompute="none", compile=False)
        return replace(self.config, parallel=ParallelConfig(), train=train)


def make_layout(
    ranks: int,
    note: str = "",
    model: ModelConfig = LLAMA,
    microbatches: int = 0,
    documents: bool = False,
    restart: bool = False,
    train: dict[str, Any] | None = None,
    **parallel: Any,
) -> Layout:
    """A layout from the fields of `ParallelConfig` (`parallel`) and of `TrainConfig` (`train`).

    Args:
        ranks: processes; the data axis takes what the other axes leave.
        note: what is special about it, for the name.
        model: what is trained.
        microbatches: of each data rank; 0: two, and in a pipeline as many as its stages need, but at least four.
        documents: attention stays inside documents.
        restart: positions begin anew at each document.
    """
    mesh = ParallelConfig(**parallel)
    share = BATCH // (ranks // mesh.model_ranks)
    default = 2 if mesh.pipeline == 1 else min(max(4, min_microbatches(mesh)), share)
    config = Config(
        model=model,
        data=DataConfig(seq_length=SEQ, mask_documents=documents, reset_positions=restart),
        parallel=mesh,
        train=TrainConfig(
            global_batch_size=BATCH, microbatch_size=share // (microbatches or default), loss_chunk=24, **(train or {})
        ),
    )
    layout = Layout("", ranks, config)
    how = {"tensor": "sequence parallel" if mesh.sequence_parallel else "", "pipeline": mesh.schedule}
    axes = [f"{name} {size}" + (f" ({how[name]})" if how.get(name) else "") for name, size in layout.axes.items()]
    return replace(layout, name=" x ".join(axes) + (f", {note}" if note else ""))


SP = {"tensor": 2, "sequence_parallel": True}
TP_PP = {"tensor": 2, "pipeline": 2}  # on 8 ranks: tensor x pipeline x FSDP2
RECOMPUTED = {"recompute": "full", "dropout": 0.2}
SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")

ALONE = [
    make_layout(2, tensor=2),
    make_layout(2, **SP),
    make_layout(4, tensor=4, sequence_parallel=True, model=replace(LLAMA, num_kv_heads=4)),
    make_layout(2, context=2),
    make_layout(4, context=4),
    make_layout(2, pipeline=2),
    make_layout(4, pipeline=4),
    make_layout(2),
    make_layout(8),
    make_layout(2, replicate=2),
    make_layout(4, replicate=2),
]

PAIRS = [
    make_layout(4, tensor=2, context=2),
    make_layout(4, **SP, context=2),
    make_layout(4, tensor=2, pipeline=2),
    make_layout(4, **SP, pipeline=2),
    make_layout(4, tensor=2),
    make_layout(4, **SP),
    make_layout(4, tensor=2, replicate=2),
    make_layout(4, **SP, replicate=2),
    make_layout(4, context=2, pipeline=2),
    make_layout(4, context=2),
    make_layout(4, context=2, replicate=2),
    make_layout(4, pipeline=2),
    make_layout(4, pipeline=2, replicate=2),
]

WITH_SCHEDULES = [
    layout
    for name in SCHEDULES
    for layout in (
        make_layout(4, tensor=2, pipeline=2, schedule=name),
        make_layout(4, pipeline=2, schedule=name),
        make_layout(8, "tied embeddings", **SP, pipeline=2, schedule=name, model=TIED),
    )
]

THREE_AXES = [
    make_layout(8, **TP_PP),
    make_layout(8, "tied embeddings", **TP_PP, model=TIED),
    make_layout(8, "replicated key/value heads", **TP_PP, model=replace(LLAMA, num_kv_heads=1)),
    make_layout(8, "odd vocabulary", **TP_PP, model=replace(LLAMA, vocab_size=101)),
    make_layout(8, "uneven stages", **TP_PP, layers_per_stage=(1, 3)),
    make_layout(8, "accumulation of 8 microbatches", **TP_PP, microbatches=8),
    make_layout(8, "full recompute", **TP_PP, train={"recompute": "full"}),
    make_layout(8, "selective recompute", **TP_PP, train={"recompute": "selective"}),
    make_layout(8, "biases (GPT-2)", **SP, pipeline=2, model=GPT2),
    make_layout(8, "query and key norms, odd vocabulary", **SP, pipeline=2, model=QWEN),
    make_layout(8, "dropout", **SP, pipeline=2, train={"dropout": 0.2}),
    make_layout(8, "documents", **SP, pipeline=2, documents=True),
]

OTHERS = [
    make_layout(4, "ranks without vocabulary, tied", tensor=4, model=replace(GPT2, vocab_size=9)),
    make_layout(8, "replicated key/value heads with norms", tensor=4, sequence_parallel=True, replicate=2, model=QWEN),
    make_layout(8, "replicated key/value heads", tensor=4, context=2, model=replace(LLAMA, num_kv_heads=1)),
    make_layout(8, "full recompute, dropout", **SP, context=2, train=RECOMPUTED),
    make_layout(8, "documents", **SP, context=2, documents=True),
    make_layout(8, "rotary positions from each document's start", **SP, context=2, restart=True),
    make_layout(
        8, "learned positions from each document's start", **SP, pipeline=2, documents=True, restart=True, model=GPT2
    ),
    make_layout(8, "tied embeddings", **SP, context=2, pipeline=2, model=TIED),
    make_layout(8, context=2, pipeline=2),
    make_layout(8, replicate=2, tensor=2),
    make_layout(8, "tied embeddings", replicate=2, pipeline=2, schedule="ZBVZeroBubble", model=TIED),
    make_layout(6, "uneven stages, tied embeddings", pipeline=3, microbatches=4, model=TIED),
    make_layout(
        4,
        "stages without layers",
        pipeline=4,
        schedule="Interleaved1F1B",
        layers_per_stage=(0, 1, 1, 1, 0, 2, 1, 0),
        model=DEEP,
        microbatches=8,
    ),
    make_layout(4, pipeline=4, schedule="DualPipeV", model=DEEP),
    make_layout(8, "full recompute", **SP, pipeline=2, schedule="Interleaved1F1B", train={"recompute": "full"}),
    make_layout(2, "compiled blocks", train={"compile": True}),
    make_layout(
        2,
        "compiled blocks, full recompute, dropout",
        **SP,
        train={"compile": True, "recompute": "full", "dropout": 0.2},
    ),
    make_layout(8, "selective recompute, dropout", **SP, replicate=2, train={"recompute": "selective", "dropout": 0.2}),
    make_layout(8, "biases (GPT-2)", context=2, pipeline=2, model=GPT2),
    make_layout(8, "documents", context=2, pipeline=2, schedule="ZBVZeroBubble", documents=True),
    make_layout(8, "label smoothing, z-loss", **TP_PP, train={"label_smoothing": 0.1, "z_loss": 1e-2}),
]

# Parallel residual, partial rotation and biases everywhere; biases of queries, keys and values alone; scaled rotation.
FAMILIES = [
    *(make_layout(4, "GPT-NeoX", **SP, pipeline=2, schedule=name, model=NEOX) for name in SCHEDULES),
    *(make_layout(4, "Qwen2, one key/value head, YaRN", **SP, pipeline=2, schedule=n, model=QWEN2) for n in SCHEDULES),
    make_layout(8, "GPT-NeoX", **SP, pipeline=2, model=NEOX),
    make_layout(8, "GPT-NeoX", context=2, pipeline=2, model=NEOX),
    make_layout(8, "GPT-NeoX, full recompute, dropout", **SP, context=2, model=NEOX, train=RECOMPUTED),
    make_layout(8, "Qwen2, one key/value head, YaRN", **SP, pipeline=2, model=QWEN2),
    make_layout(8, "Qwen2, one key/value head, YaRN", tensor=4, context=2, model=QWEN2),
    make_layout(8, "Llama 3's rotation", **TP_PP, model=LLAMA3),
    make_layout(4, "Llama 3's rotation", context=4, model=LLAMA3),
    make_layout(4, "linearly scaled rotation", **SP, context=2, model=LINEAR),
    make_layout(2, "GPT-NeoX, compiled blocks", **SP, model=NEOX, train={"compile": True}),
]

# Every axis alone, tensor x pipeline x FSDP2 under every schedule, and what cuts across them.
ENCODERS = [
    *(
        make_layout(ranks, kind, model=model, **parallel)
        for kind, model in (("BERT", BERT), ("RoBERTa", ROBERTA))
        for ranks, parallel in (
            (2, {"tensor": 2}),
            (2, SP),
            (2, {"context": 2}),
            (2, {"pipeline": 2}),
            (2, {}),
            (2, {"replicate": 2}),
        )
    ),
    make_layout(8, "BERT", **SP, pipeline=2, model=BERT),
    *(make_layout(8, "BERT", **SP, pipeline=2, schedule=name, model=BERT) for name in SCHEDULES),
    make_layout(8, "RoBERTa", **SP, context=2, pipeline=2, model=ROBERTA),
    make_layout(
        8,
        "RoBERTa, documents, full recompute",
        **SP,
        context=2,
        documents=True,
        model=ROBERTA,
        train={"recompute": "full"},
    ),
    make_layout(8, "BERT, documents", tensor=2, pipeline=2, documents=True, model=BERT),
    make_layout(
        8, "BERT, selective recompute, dropout", **TP_PP, model=BERT, train={"recompute": "selective", "dropout": 0.2}
    ),
    make_layout(8, "RoBERTa, untied", tensor=4, pipeline=2, model=replace(ROBERTA, tied_embeddings=False)),
    make_layout(4, "BERT, ranks without vocabulary", tensor=4, model=replace(BERT, vocab_size=9)),
    make_layout(
        2, "BERT, compiled blocks, full recompute", **SP, model=BERT, train={"compile": True, "recompute": "full"}
    ),
]

LAYOUTS = [*ALONE, *PAIRS, *WITH_SCHEDULES, *THREE_AXES, *OTHERS, *FAMILIES, *ENCODERS]
BY_NAME = {layout.name: layout for layout in LAYOUTS}

"""Tests ../../megagrow/plan/activations.py against what real blocks leave behind, byte for byte."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.model.rotary import rotary_table
from megagrow.model.tokens import Tokens
from megagrow.model.transformer import make_block
from megagrow.parallel.context import document_masks
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis, Mesh, make_mesh
from megagrow.parallel.shards import shard_parameters
from megagrow.plan import activations
from megagrow.plan.dry_run import fake_ranks
from megagrow.plan.layout import Layout
from megagrow.plan.measure import kept_memory, peak_memory
from tests.models import as_bert, as_gpt2, as_gpt_neox

SAMPLES, LENGTH = 2, 64
LLAMA = ModelConfig(hidden_size=96, num_heads=8, head_dim=16, num_kv_heads=4, ffn_size=160, num_layers=2, vocab_size=97)
QWEN = replace(LLAMA, family="qwen3", qk_norm=True)
GPT2 = as_gpt2(LLAMA, num_heads=4, num_kv_heads=4, head_dim=24, ffn_size=128, vocab_size=96, max_seq_length=LENGTH)
NEOX = as_gpt_neox(LLAMA, num_heads=4, num_kv_heads=4, head_dim=24, rope_fraction=0.5)
BERT = as_bert(GPT2)
MODELS = {"llama": LLAMA, "qwen3": QWEN, "gpt2": GPT2, "gpt_neox": NEOX, "bert": BERT}
MESHES: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor": {"tensor": 2},
    "sequence": {"tensor": 2, "sequence_parallel": True},
    "split backward": {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "schedule": "ZBVZeroBubble"},
    "context": {"context": 2},
}


def layout(
    model: ModelConfig = LLAMA, train: TrainConfig | None = None, masks: bool = False, **parallel: Any
) -> Layout:
    mesh = ParallelConfig(**parallel)
    train = replace(train or TrainConfig(), microbatch_size=SAMPLES, global_batch_size=8 * SAMPLES)
    data = DataConfig(seq_length=LENGTH, mask_documents=masks)
    return Layout(Config(model=model, data=data, parallel=mesh, train=train), mesh.model_ranks)


def blocks_of(given: Layout) -> Callable[[int], Tensor]:
    """Runs the first n of real blocks on real tensors."""
    config, mesh = given.config, make_mesh(given.config.parallel)
    dtype = torch.bfloat16 if given.width == 2 else torch.float32
    holder = nn.Module()
    with torch.device("meta"):
        holder.layers = nn.ModuleDict({str(i): make_block(given.model, mesh, config.train, i) for i in range(2)})
    shard_parameters(holder, given.model, mesh)
    holder.to_empty(device="cpu")
    for parameter in holder.parameters():
        nn.init.normal_(parameter.to_local() if hasattr(parameter, "to_local") else parameter, std=0.1)
    x_BLH = torch.randn(SAMPLES, given.cut_tokens // SAMPLES, given.model.hidden_size, dtype=dtype, requires_grad=True)
    tokens = tokens_of(given, mesh, dtype)

    def run(count: int) -> Tensor:
        y_BLH = x_BLH
        for i in range(count):
            y_BLH = holder.layers[str(i)](y_BLH, tokens)
        return y_BLH

    return run


def tokens_of(given: Layout, mesh: Mesh, dtype: torch.dtype) -> Tokens:
    model, rotary = given.model, None
    if model.positions == "rope":
        place = (mesh.cp.rank, mesh.cp.size)
        rotary = rotary_table(model, LENGTH, *place, dtype, torch.device("cpu"))
    documents = torch.arange(SAMPLES * LENGTH).view(SAMPLES, LENGTH) // 20
    masks = document_masks(documents, mesh.cp, model.is_causal) if given.config.data.mask_documents else None
    rate = given.config.train.dropout
    keys = torch.randint(2**40, (SAMPLES, given.cut_tokens // SAMPLES)) if rate else None
    return Tokens(rotary, masks, keys)


def kept_by_real_block(given: Layout) -> int:
    """What the second of two blocks adds to what the first keeps; both hold on to their outputs."""
    with fake_ranks(given.world_size, 0):
        run = blocks_of(given)
        run(2)  # tables that all blocks share
        return kept_memory(lambda: run(2)) - kept_memory(lambda: run(1))


def kept(given: Layout) -> int:
    return sum(activations.kept_by_block(given, "cpu").values())


RECOMPUTES = ("none", "selective", "full")


def choices() -> Iterator[tuple[str, str, str]]:
    """Every pair of model, mesh and recompute that works together."""
    for i, model in enumerate(MODELS):
        for j, mesh in enumerate(MESHES):
            for recompute in RECOMPUTES if model == "llama" else (RECOMPUTES[(i + j) % 3],):
                yield model, mesh, "none" if mesh == "split backward" else recompute


@pytest.mark.parametrize(("model", "mesh", "recompute"), sorted(set(choices())))
def test_a_block_keeps_what_the_plan_says(model: str, mesh: str, recompute: Any) -> None:
    given = layout(MODELS[model], TrainConfig(recompute=recompute), **MESHES[mesh])
    assert kept_by_real_block(given) == kept(given)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_a_block_keeps_copies_of_its_weights(model: str, recompute: Any) -> None:
    given = layout(MODELS[model], TrainConfig(recompute=recompute, precision="bf16"), tensor=2)
    assert kept_by_real_block(given) == kept(given)
    copies = 2 * sum(
        activations.stored_elements(given, n) for n in activations.layer_names(given.model) if "bias" not in n
    )
    assert activations.weight_copies(given, "cpu") >= copies


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dropout_keeps_no_mask(recompute: Any) -> None:
    given = layout(train=TrainConfig(dropout=0.1, recompute=recompute))
    assert kept_by_real_block(given) == kept(given)
    assert kept(given) == kept(layout(train=TrainConfig(recompute=recompute))) + 8 * given.tokens


@pytest.mark.parametrize("context", [1, 2])
def test_documents_keep_a_mask_in_every_block_of_a_cpu(context: int) -> None:
    given = layout(masks=True, context=context)
    assert kept_by_real_block(given) == kept(given)
    assert kept(given) > kept(layout(context=context))


def test_kernels_keep_less_than_their_twins() -> None:
    given = layout()
    on_gpu, on_cpu = (sum(activations.kept_by_block(given, device).values()) for device in ("cuda", "cpu"))
    size = activations.sizes(given)
    grouped = 2 * size.query  # a GPU's float32 attention wants keys and values for every head
    sums = 4 * given.tokens * LLAMA.num_heads  # and statistics; a CPU's own computes its probabilities again
    assert on_gpu - grouped - sums == on_cpu - 2 * given.activation - activations.weight_copies(given, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [32, 1024])
@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_takes_what_the_plan_says(precision: Any, chunk: int, taught: bool) -> None:
    model = replace(LLAMA, vocab_size=32_001)
    given = layout(model, TrainConfig(precision=precision, loss_chunk=chunk))
    dtype = torch.bfloat16 if given.width == 2 else torch.float32
    head_VH = torch.randn(model.vocab_size, model.hidden_size, requires_grad=True)
    labels_T, weights_T = torch.randint(model.vocab_size, (given.tokens,)), torch.rand(given.tokens)
    hidden_TH = torch.randn(given.tokens, model.hidden_size, dtype=dtype, requires_grad=True)
    teacher = (hidden_TH.detach(), head_VH.detach().to(dtype)) if taught else ()
    options = LossOptions(chunk_tokens=chunk, weight=0.5, temperature=2.0, both=True)

    def forward() -> Tensor:
        return vocab_parallel_loss(
            hidden_TH, head_VH, labels_T, weights_T, model.vocab_size, Axis(), *teacher, options=options
        )[0]

    planned = activations.loss(given, "cpu", model if taught else None)
    states = given.tokens * model.hidden_size * given.width
    assert kept_memory(forward) == pytest.approx(planned.kept, abs=64)
    rest = 2**18  # what is left of a CPU's rows of logits at work, and statistics
    assert peak_memory(forward) == pytest.approx(planned.forward - states, abs=rest)
    assert peak_memory(lambda: forward().backward()) >= planned.backward


def test_what_serves_the_loss_on_a_gpu_decides_what_it_takes() -> None:
    teacher = replace(LLAMA, hidden_size=32)
    twins = layout(train=TrainConfig(kernels="none"))
    for other in (TrainConfig(kernels="all"), TrainConfig(kernels="none", compile=True)):
        saved = [
            activations.loss(twins, "cuda", each).forward - activations.loss(layout(train=other), "cuda", each).forward
            for each in (None, teacher)
        ]
        logits = twins.tokens * LLAMA.vocab_size
        states = activations.sizes(twins).whole  # whose gradient comes when the passes over the logits are over
        assert saved == [4 * logits - states, 20 * logits]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_backward_pass_of_a_block_needs_what_the_plan_says(recompute: Any, precision: Any, dropout: float) -> None:
    """Measured from the end of two blocks' forward passes to the fullest moment of their backward passes."""
    given = layout(replace(LLAMA, ffn_size=264), TrainConfig(recompute=recompute, precision=precision, dropout=dropout))
    with fake_ranks(1, 0):
        run = blocks_of(given)
    gradient = torch.ones_like(run(2))
    run(2).backward(gradient)  # from now on gradients are added to those that are there
    before = kept_memory(lambda: run(2))
    needed = peak_memory(lambda: run(2).backward(gradient)) - before
    cost = activations.block_cost(given, "cpu")
    assert needed == pytest.approx(cost.working - given.activation, rel=0.15)  # the gradient that comes in was there

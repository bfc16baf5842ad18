"""Every layout trains the same model: loss, each gradient and the weights after updates, against one process."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.optim import Optimizer, clip_gradients
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import full
from megagrow.train.part import Part, build_part, initialize_part
from tests.ranks import run_ranks

LLAMA = ModelConfig(
    vocab_size=101, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24, max_seq_length=16
)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    norm="layer_norm",
    positions="learned",
    activation="gelu",
    bias=True,
    tied_embeddings=True,
    num_kv_heads=4,
)
BATCH, SEQ = 8, 12
CLIP = 0.05  # well below the gradient norm, so that clipping is at work


def config_of(model: ModelConfig, tensor: int = 1, pipeline: int = 1, microbatch: int = 1) -> Config:
    return Config(
        model=model,
        data=DataConfig(seq_length=SEQ),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        train=TrainConfig(global_batch_size=BATCH, microbatch_size=microbatch),
    )


def make_inputs(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels and weights [BATCH, SEQ]; the number of tokens that count differs between samples."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocab_size, (BATCH, SEQ + 1), generator=generator)
    lengths = torch.tensor([12, 3, 7, 1, 12, 0, 5, 9])
    counts = (torch.arange(SEQ) < lengths[:, None]).double()
    return tokens[:, :-1], tokens[:, 1:], counts / counts.sum()


def steps(config: Config, mesh: Mesh, num_updates: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss, clip norm, whole gradients of the first step, and whole weights after the updates."""
    torch.set_default_dtype(dtype)
    try:
        part = build_part(config.model, config, mesh)
        initialize_part(part, seed=3)
        optimizer = Optimizer(part.parameters, config.optim)
        ids, labels, weights = (x.chunk(mesh.dp.size)[mesh.dp.rank] for x in make_inputs(config.model.vocab_size))
        result: dict[str, Tensor] = {}
        for update in range(num_updates):
            sums = part.engine.train_step(Batch(ids, labels, weights))
            if update == 0:
                result |= {f"grad.{n}": full(p.grad).clone() for n, p in part.parameters.items() if p.grad is not None}
            norm = clip_gradients(part.parameters, CLIP, mesh)
            result |= {f"loss.{update}": sums[0], f"norm.{update}": torch.tensor(norm)}
            optimizer.step(lr=1e-2)
        evaluated = part.engine.evaluate(Batch(ids, labels, weights))
        result |= {f"weight.{n}": full(p).clone() for n, p in part.parameters.items()}
        return {**result, "evaluated": evaluated[0]}
    finally:
        torch.set_default_dtype(torch.float32)


def sharded_steps(config: Config, num_updates: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return steps(config, make_mesh(config.parallel), num_updates, dtype)


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    scale = max(float(g.abs().max()) for n, g in expected.items() if n.startswith("grad."))
    worst = (0.0, "")
    for name, value in found.items():
        reference = max(float(expected[name].abs().max()), 1e-3 * scale)
        worst = max(worst, (float((value - expected[name]).abs().max()) / reference, name))
    return worst


LAYOUTS = [
    # ranks, tensor, pipeline, microbatch
    (2, 2, 1, 8),
    (2, 1, 2, 2),
    (2, 1, 1, 2),
    (4, 2, 2, 4),
    (4, 2, 1, 1),
    (4, 1, 2, 1),
    (8, 2, 2, 2),
    (6, 2, 3, 2),
]


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_layout_equals_one_process(model: ModelConfig, layout: tuple[int, int, int, int]) -> None:
    ranks, tensor, pipeline, microbatch = layout
    expected = steps(config_of(model), Mesh.single(), num_updates=3)
    results = run_ranks(sharded_steps, ranks, config_of(model, tensor, pipeline, microbatch), 3)
    names = set().union(*results)
    assert names == set(expected)
    for found in results:
        difference, name = worst_difference(found, expected)
        assert difference < 1e-10, (name, difference)


@pytest.mark.parametrize("layout", [(2, 1, 1, 2), (8, 2, 2, 2)], ids=lambda x: "-".join(map(str, x)))
def test_layout_equals_one_process_in_float32(layout: tuple[int, int, int, int]) -> None:
    """One gradient each; float32 takes another path through FSDP's reduction than float64."""
    ranks, tensor, pipeline, microbatch = layout
    expected = steps(config_of(LLAMA), Mesh.single(), 1, torch.float32)
    for found in run_ranks(sharded_steps, ranks, config_of(LLAMA, tensor, pipeline, microbatch), 1, torch.float32):
        gradients = {name: value for name, value in found.items() if not name.startswith("weight.")}
        difference, name = worst_difference(gradients, expected)
        assert difference < 1e-5, (name, difference)


def bf16_sums(config: Config) -> Tensor:
    mesh = make_mesh(config.parallel)
    part = build_part(config.model, config, mesh)
    initialize_part(part, seed=3)
    ids, labels, weights = (x.chunk(mesh.dp.size)[mesh.dp.rank] for x in make_inputs(config.model.vocab_size))
    return part.engine.evaluate(Batch(ids, labels, weights.float()))


def test_bf16_rounds_activations_but_not_the_weights_of_tokens() -> None:
    """1 / 49 in bfloat16 is 0.1 % off, and so would be the loss."""
    config = config_of(LLAMA)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    expected = bf16_sums(config)
    for found in run_ranks(bf16_sums, 2, config):
        assert torch.allclose(found, expected, rtol=1e-5), (found - expected) / expected


def test_a_vocabulary_that_leaves_a_tensor_rank_without_rows() -> None:
    model = dataclasses.replace(GPT2, vocab_size=9)  # chunks of 3, 3, 3 and 0
    expected = steps(config_of(model), Mesh.single(), num_updates=2)
    for found in run_ranks(sharded_steps, 4, config_of(model, tensor=4, microbatch=8), 2):
        difference, name = worst_difference(found, expected)
        assert difference < 1e-10, (name, difference)


def test_microbatches_do_not_change_the_step() -> None:
    expected = steps(config_of(LLAMA, microbatch=8), Mesh.single(), num_updates=2)
    difference, name = worst_difference(steps(config_of(LLAMA, microbatch=1), Mesh.single(), 2), expected)
    assert difference < 1e-10, name


def test_initial_weights_depend_on_the_name_alone() -> None:
    def weights(model: ModelConfig) -> dict[str, Tensor]:
        config = config_of(model)
        part: Part = build_part(model, config, Mesh.single())
        initialize_part(part, seed=5)
        return part.tensors()

    short, long = weights(LLAMA), weights(dataclasses.replace(LLAMA, vocab_size=101, num_layers=3))
    assert all(torch.equal(short[n], long[n]) for n in short)
    assert not torch.equal(short["model.layers.0.mlp.down.weight"], short["model.layers.1.mlp.down.weight"])

"""Attention's back ends: against the definition where they run here, by what they are called with where they do not."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow import attention_ops, ops
from megagrow.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megagrow.errors import ConfigError
from megagrow.parallel.mesh import make_mesh
from megagrow.parallel.pipeline import Batch
from megagrow.parallel.shards import full
from megagrow.train.part import build_part, initialize_part
from tests.ranks import run_ranks

F64, CPU, CUDA = torch.float64, torch.device("cpu"), torch.device("cuda")
B, N, D = 2, 4, 16


def tensors(S: int, T: int, K: int, dtype: torch.dtype = F64, head_dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, S, N, head_dim), (B, T, K, head_dim), (B, T, K, head_dim)
    made = (torch.randn(shape, dtype=F64).to(dtype).transpose(1, 2) for shape in shapes)  # as a model makes them
    q_BNSD, k_BKTD, v_BKTD = (x.requires_grad_() for x in made)
    return q_BNSD, k_BKTD, v_BKTD


def definition(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    k_BNTD, v_BNTD = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (k, v))
    scores_BNST = (q @ k_BNTD.mT / q.shape[3] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores_BNST.softmax(-1) @ v_BNTD


def visible_keys(S: int, T: int, causal: bool, documents: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[B or 1, 1, S, T], position by position."""
    visible = torch.ones(B if documents else 1, 1, S, T, dtype=torch.bool)
    for b in range(len(visible)):
        for s in range(S):
            for t in range(T):
                future = causal and t > T - S + s
                stranger = documents is not None and documents[0][b, s] != documents[1][b, t]
                visible[b, 0, s, t] = not (future or stranger)
    return visible


def documents_of(S: int, T: int, ordered: bool = True, num: int = 5) -> tuple[Tensor, Tensor]:
    key_documents_BT = torch.randint(0, num, (B, T))
    if ordered:
        key_documents_BT = key_documents_BT.sort(-1).values
    return key_documents_BT[:, T - S :], key_documents_BT


def assert_same_with_gradients(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, leaves, seed) for y in (actual, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("S", "T", "K", "causal"), [(3, 9, 2, True), (8, 9, 4, True), (1, 7, 1, True), (3, 9, 2, False)]
)
def test_fewer_queries_are_the_last_ones(S: int, T: int, K: int, causal: bool) -> None:
    qkv = tensors(S, T, K)
    assert_same_with_gradients(ops.attention(*qkv, causal), definition(*qkv, visible_keys(S, T, causal)), qkv)


def test_queries_without_a_key_are_refused() -> None:
    with pytest.raises(AssertionError, match="last ones"):
        ops.attention(*tensors(5, 4, 2))


@pytest.mark.parametrize(
    ("S", "T", "K", "causal"), [(9, 9, 2, True), (4, 9, 1, True), (9, 9, 4, False), (4, 9, 2, False)]
)
def test_documents(S: int, T: int, K: int, causal: bool) -> None:
    qkv, documents = tensors(S, T, K), documents_of(S, T, ordered=False)
    expected = definition(*qkv, visible_keys(S, T, causal, documents))
    assert_same_with_gradients(ops.attention(*qkv, causal, documents), expected, qkv)
    mask = ops.document_mask(*documents, causal=causal)
    assert torch.equal(ops.attention(*qkv, causal, mask), ops.attention(*qkv, causal, documents))


def test_documents_are_attention_document_by_document() -> None:
    q, k, v = tensors(9, 9, 2)
    ends = [0, 2, 3, 9]
    documents_BS = torch.tensor([7, 7, 1, 4, 4, 4, 4, 4, 4]).expand(B, -1)
    alone = [ops.attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    actual = ops.attention(q, k, v, documents=(documents_BS, documents_BS))
    assert_same_with_gradients(actual, torch.cat(alone, dim=2), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_rounding_is_that_of_the_definition(dtype: torch.dtype, masked: bool) -> None:
    S, T = 24, 32
    qkv, documents = tensors(S, T, 2, dtype), documents_of(S, T) if masked else None
    exact = tuple(x.detach().double().requires_grad_() for x in qkv)
    visible, seed = visible_keys(S, T, True, documents), torch.randn(B, N, S, D).to(dtype)

    def with_gradients(y: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.double() for x in (y, *torch.autograd.grad(y, leaves, seed.to(y.dtype)))]

    actual = ops.attention(*qkv, documents=documents)
    assert actual.dtype == dtype
    found, plain = with_gradients(actual, qkv), with_gradients(definition(*qkv, visible), qkv)
    for x, y, true in zip(found, plain, with_gradients(definition(*exact, visible), exact), strict=True):
        assert (x - true).abs().max() <= 4 * (y - true).abs().max()  # measured: up to 2.9


class LargestResult(TorchDispatchMode):
    """Notes the largest floating-point tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.num_elements = max(self.num_elements, x.numel())
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_all_heads_never_exist(masked: bool) -> None:
    S, T = 96, 128
    qkv, documents = tensors(S, T, 2, torch.float32), documents_of(S, T) if masked else None
    with LargestResult() as largest:
        ops.attention(*qkv, documents=documents).sum().backward()
    assert largest.num_elements < B * N * S * T / 2
    with LargestResult() as largest:
        definition(*qkv, visible_keys(S, T, True)).sum().backward()
    assert largest.num_elements == B * N * S * T  # the instrument works


CASES = [
    (300, 300, True, True),
    (200, 300, True, True),
    (128, 384, True, False),
    (150, 150, False, True),
    (7, 9, True, True),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("S", "T", "causal", "ordered"), CASES)
def test_flex_attention_with_our_blocks(
    S: int, T: int, causal: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_ops, "_compiled_flex", lambda: flex_attention)
    qkv = tuple(x.detach() for x in tensors(S, T, 2, torch.float32))
    documents = documents_of(S, T, ordered)
    blocks = attention_ops._block_mask(*documents, causal)
    expected = ops.attention(*qkv, causal, documents)
    torch.testing.assert_close(ops.attention(*qkv, causal, blocks), expected, rtol=1e-5, atol=1e-6)


def chosen(num_blocks: Tensor, indices: Tensor) -> list[set[int]]:
    rows = zip(num_blocks.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [set(row[:n]) for n, row in rows]


@pytest.mark.parametrize(("S", "T", "causal", "ordered"), [*CASES, (512, 1024, True, True)])
def test_blocks_are_those_of_every_pair(S: int, T: int, causal: bool, ordered: bool) -> None:
    documents = documents_of(S, T, ordered, num=3)
    ours = attention_ops._block_mask(*documents, causal)
    theirs = create_block_mask(ours.mask_mod, B, None, S, T, device="cpu")
    assert (ours.shape, ours.BLOCK_SIZE) == (theirs.shape, theirs.BLOCK_SIZE)
    needed, whole, all_needed, all_whole = (
        chosen(*pair)
        for pair in (
            (ours.kv_num_blocks, ours.kv_indices),
            (ours.full_kv_num_blocks, ours.full_kv_indices),
            (theirs.kv_num_blocks, theirs.kv_indices),
            (theirs.full_kv_num_blocks, theirs.full_kv_indices),
        )
    )
    for i in range(len(needed)):
        assert whole[i] <= all_whole[i]  # not one too many: they are not masked
        assert needed[i] | whole[i] >= all_needed[i] | all_whole[i]  # not one too few
        assert not needed[i] & whole[i]
        if ordered:
            assert (needed[i], whole[i]) == (all_needed[i], all_whole[i])
    assert S < 512 or any(whole)


@pytest.mark.parametrize(("dtype", "head_dim"), [(F64, 16), (torch.float32, 8)])
def test_what_flex_attention_does_not_take_is_masked_whole(dtype: torch.dtype, head_dim: int) -> None:
    S, T = 130, 140
    qkv, documents = tensors(S, T, 2, dtype, head_dim), documents_of(S, T)
    actual = ops.attention(*qkv, True, attention_ops._block_mask(*documents, True))
    assert torch.equal(actual, ops.attention(*qkv, True, documents))


class Recorder:
    """Stands in for a kernel: keeps what it is called with, answers with `function`'s result."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("K", [4, 2])
def test_what_flex_attention_is_called_with(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flex = Recorder(lambda q, k, v, **options: q)
    monkeypatch.setattr(attention_ops, "_compiled_flex", lambda: flex)
    qkv = tensors(6, 9, K, torch.bfloat16)
    blocks = attention_ops._block_mask(*documents_of(6, 9), True)
    ops.attention(*qkv, documents=blocks)
    ((given, options),) = flex.calls
    assert all(x is mine and type(x) is Tensor for x, mine in zip(given, qkv, strict=True))
    assert options == {"block_mask": blocks, "enable_gqa": K < N}  # its default scale is 1 / sqrt(D)


def test_documents_on_a_gpu_become_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Recorder(lambda *given: "blocks")
    monkeypatch.setattr(attention_ops, "_block_mask", blocks)
    with FakeTensorMode():
        documents_BS = torch.empty(B, 300, dtype=torch.int64, device="cuda")
    assert ops.document_mask(documents_BS, documents_BS, causal=False) == "blocks"
    ((given, _),) = blocks.calls
    assert given == (documents_BS, documents_BS, False)


@pytest.mark.parametrize(
    ("dtype", "K", "heads", "grouped"),
    [(torch.bfloat16, 2, 2, True), (torch.bfloat16, 4, 4, False), (torch.float32, 2, N, False), (F64, 1, N, False)],
)
def test_what_sdpa_is_called_with_on_a_gpu(
    dtype: torch.dtype, K: int, heads: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa = Recorder(lambda q, k, v, **options: q)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    for T in (6, 9):
        with FakeTensorMode():
            q_BNSD = torch.empty(B, N, 6, D, dtype=dtype, device="cuda")
            k_BKTD = torch.empty(B, K, T, D, dtype=dtype, device="cuda")
        ops.attention(q_BNSD, k_BKTD, k_BKTD)
    (square_given, square), (given, options) = sdpa.calls
    assert {x.shape[1] for x in (*square_given[1:], *given[1:])} == {heads}
    assert square == {"attn_mask": None, "is_causal": True, "enable_gqa": grouped}
    mask = options.pop("attn_mask")
    assert isinstance(mask, CausalBias)  # no mask in memory: the kernels align by themselves
    assert torch.equal(mask._materialize(), visible_keys(6, 9, True)[0, 0])
    assert options == {"enable_gqa": grouped}


def test_the_gpu_path_is_the_definition() -> None:
    qkv = tensors(6, 9, 2)
    expected = definition(*qkv, visible_keys(6, 9, True))
    assert_same_with_gradients(attention_ops._sdpa_lower_right(*qkv, grouped=True), expected, qkv)


def fake_flash_attn(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, deterministic: bool) -> Tensor:
    """flash-attn's function for [B, S, N, D], its causal mask aligned to the lower right."""
    S, T = q.shape[1], k.shape[1]
    mask = torch.ones(S, T, dtype=torch.bool).tril(T - S) if causal else None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
    return y.transpose(1, 2)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(fake_flash_attn)
    module = ModuleType("flash_attn")
    module.flash_attn_func = recorder
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return recorder


@pytest.mark.parametrize("causal", [True, False])
def test_what_flash_attn_is_called_with(causal: bool, flash: Recorder) -> None:
    qkv = tensors(6, 9, 2)
    expected = ops.attention(*qkv, causal)
    actual = ops.attention(*qkv, causal, backend="flash_attn")
    assert_same_with_gradients(actual, expected, qkv)
    ((given, options),) = flash.calls
    assert [tuple(x.shape) for x in given] == [(B, 6, N, D), (B, 9, 2, D), (B, 9, 2, D)]
    assert all(type(x) is Tensor and x.is_contiguous() for x in given)  # no copies: that is how the model made them
    assert options == {"softmax_scale": D**-0.5, "causal": causal, "deterministic": True}


def test_flash_attn_in_a_compiled_block(flash: Recorder) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, backend="flash_attn")

    sys.modules["flash_attn"].flash_attn_func = fake_flash_attn
    qkv = tensors(6, 9, 2)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*qkv), block(*qkv))


def loss_and_gradients(attention: str) -> tuple[Tensor, dict[str, Tensor], list[Any]]:
    """Of a model on all ranks of a tensor axis; with what flash-attn was called with."""
    config = Config(
        model=ModelConfig(vocab_size=32, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=32),
        data=DataConfig(seq_length=6),
        parallel=ParallelConfig(tensor=dist.get_world_size()),
        train=TrainConfig(global_batch_size=B, attention=attention),
    )
    flash = Recorder(fake_flash_attn)
    sys.modules["flash_attn"] = ModuleType("flash_attn")
    sys.modules["flash_attn"].flash_attn_func = flash
    torch.set_default_dtype(F64)
    try:
        mesh = make_mesh(config.parallel)
        part = build_part(config.model, config, mesh)
        initialize_part(part, seed=1)
        tokens = torch.arange(B * 7).view(B, 7) % 32
        losses = part.engine.train_step(Batch(tokens[:, :-1], tokens[:, 1:], torch.full((B, 6), 1 / (6 * B))))
        seen = [(type(x), tuple(x.shape), x.stride(-1)) for given, _ in flash.calls for x in given]
        return losses, {name: full(p.grad).clone() for name, p in part.parameters.items()}, seen
    finally:
        torch.set_default_dtype(torch.float32)
        del sys.modules["flash_attn"]


def test_a_model_hands_its_local_heads_to_flash_attn() -> None:
    plain = run_ranks(loss_and_gradients, 2, "sdpa")
    for (loss, gradients, none), (found, found_gradients, seen) in zip(
        plain, run_ranks(loss_and_gradients, 2, "flash_attn"), strict=True
    ):
        assert none == []
        layer = [(Tensor, (B, 6, heads, 8), 1) for heads in (2, 1, 1)]  # [B, S, heads / 2, head_dim], no DTensor
        assert seen == 2 * layer
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found_gradients, gradients, rtol=1e-9, atol=1e-12)


def refusal(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ops.check_attention_backend(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checks_before_anything_is_built(flash: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    ops.check_attention_backend("sdpa", torch.float32, CPU)
    ops.check_attention_backend("flash_attn", torch.bfloat16, CUDA)
    assert "GPUs, not on the cpu" in refusal("flash_attn", torch.bfloat16, CPU)
    assert "float32; use train.precision=bf16" in refusal("flash_attn", torch.float32, CUDA)
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_func")
    assert "does not load (cannot import name" in refusal("flash_attn", torch.bfloat16, CUDA)
    monkeypatch.delitem(sys.modules, "flash_attn")
    message = refusal("flash_attn", torch.bfloat16, CUDA)
    assert "pip install flash-attn --no-build-isolation" in message
    assert message.endswith("or use train.attention=sdpa")


def test_flash_attn_without_what_it_needs_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "flash_attn.py").write_text("import flash_attn_2_cuda\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert "needs flash_attn_2_cuda" in refusal("flash_attn", torch.bfloat16, CUDA)

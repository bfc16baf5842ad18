"""The table of what gpu_kernels.py measures: sizes of training, bytes at the floor, and aims.

Bytes are those that no design can do without: every input read once, every output written once. What a row or a
parameter adds (statistics, weights, sums of their gradients) is below a percent and not counted.
"""

from collections.abc import Iterator
from typing import Any

import torch
from gpu_train import CASES as MODELS
from kernel_cases import DTYPE, AdamW, Case, Differentiable, Inputs, LinearLoss, Pass, Vocabulary, liger, normal, ours
from kernel_growth import growth
from kernel_measure import DEVICE
from torch import Tensor
from torch.nn import functional as F

from megagrow import torch_ops, torch_vocab_ops
from megagrow.roles import parameter_shapes

# Device time as a multiple of the floor's bytes at the speed of a copy, by file of kernels.
SHARE = 0.85
AIMS = {"vocab_loss": 1.15, "distill_loss": 1.2}
AIMS |= dict.fromkeys(("norm", "glu", "gelu", "dropout_add", "rope", "adamw"), 1 / SHARE)
AIMS |= dict.fromkeys(("layer_mix", "sparse_map", "dense_map"), 1 / SHARE)

SIZE = DTYPE.itemsize
EPS, RATE, PLACE, BITS = 1e-5, 0.1, 3, 44
ALL = ("ours", "eager", "compiled", "liger")
CHECK_ONLY = {"providers": (), "rivals": (), "huge": True}


def cases(tiny: bool) -> list[Case]:
    """Every case, those first that say most; `tiny` ones compute the same on few elements."""
    makers = (
        norms,
        gated_activations,
        activations,
        dropouts,
        ropes,
        losses,
        distillations,
        linear_losses,
        updates,
        growth,
    )
    found = [case for maker in makers for case in maker(tiny)]
    return sorted(found, key=lambda case: (not case.first, not case.judged))


def norms(tiny: bool) -> Iterator[Case]:
    sizes = [(6, 64)] if tiny else [(8192, 4096), (16384, 2048), (8192, 8192), (8192, 16384)]
    for T, H in sizes:
        for name in ("rms_norm", "layer_norm"):
            for has_residual in (False, True):
                yield norm(name, T, H, has_residual, f"{T} x {H}" + " + residual" * has_residual)
    many = (4, 32) if tiny else (2**31 // 16384 + 64, 16384)
    yield norm("rms_norm", *many, False, f"{many[0]} x {many[1]}, over 2^31 elements", **CHECK_ONLY)


def norm(name: str, T: int, H: int, has_residual: bool, size: str, **changes: Any) -> Case:
    keys = ("weight", "bias") if name == "layer_norm" else ("weight",)

    def inputs() -> Inputs:
        x = {"x": normal(T, H, seed=0)} | {key: normal(H, seed=i + 1) for i, key in enumerate(keys)}
        x |= {f"dy{i}": normal(T, H, seed=4 + i) for i in range(1 + has_residual)}
        return x | ({"residual": normal(T, H, seed=3)} if has_residual else {})

    def function(norm):
        def run(x: Inputs) -> tuple[Tensor, ...]:
            y = norm(x["x"], *(x[key] for key in keys), EPS, *([x["residual"]] if has_residual else []))
            return y if has_residual else (y,)

        return run

    functions = {"ours": function(ours(name)), "eager": function(getattr(torch_ops, name))}
    if name == "rms_norm" and has_residual:
        peer = liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        functions["liger"] = lambda x: peer(x["x"], x["residual"], x["weight"], EPS)
    elif name == "rms_norm":
        peer = liger("rms_norm", "LigerRMSNormFunction")
        functions["liger"] = lambda x: (peer(x["x"], x["weight"], EPS),)
    elif not has_residual:
        peer = liger("layer_norm", "LigerLayerNormFunction")
        functions["liger"] = lambda x: (peer(x["x"], x["weight"], x["bias"], EPS),)
    per_element = (4, 4) if has_residual else (2, 3)
    return Differentiable(
        kernel=name,
        file="norm",
        size=size,
        bytes=tuple(SIZE * each * T * H for each in per_element),
        formula="forward x, residual -> y, sum; backward sum, dy, dsum -> dx" if has_residual else
        "forward x -> y; backward x, dy -> dx",
        launches=("norm_fwd", "norm_bwd") if (name == "rms_norm") == has_residual else (),
        columns=H,
        first=H == 4096,
        whole=frozenset(keys),
        inputs=inputs,
        functions=functions,
        **{"providers": tuple(p for p in ALL if p == "compiled" or p in functions)} | changes,
    )  # fmt: skip


def gated_activations(tiny: bool) -> Iterator[Case]:
    T, size = (6, 48) if tiny else (8192, 14336)
    for name, activation, module, peer_name in (
        ("swiglu", "silu", "swiglu", "LigerSiLUMulFunction"),
        ("geglu", "gelu", "geglu", "LigerGELUMulFunction"),
    ):
        kernel, peer = ours(name), liger(module, peer_name)
        yield Differentiable(
            kernel=name,
            file="glu",
            size=f"{T} x 2 * {size}",
            bytes=(SIZE * 3 * T * size, SIZE * 5 * T * size),
            formula="per output element: forward gate, up -> y; backward gate, up, dy -> dgate, dup",
            launches=("glu", "glu"),
            columns=T * size,
            providers=ALL,
            first=True,
            inputs=lambda: {"gate_up": normal(T, 2 * size, seed=0), "dy0": normal(T, size, seed=1)},
            functions={
                "ours": lambda x, kernel=kernel: (kernel(x["gate_up"]),),
                # A GPU's order of columns, on a CPU too.
                "eager": lambda x, activation=activation: (torch_ops.glu(x["gate_up"], activation, True),),
                "liger": lambda x, peer=peer: (peer(x["gate"], x["up"]),),
            },
            adapt={"liger": _apart},
        )


def _apart(x: Inputs) -> Inputs:
    """Gate and up as two tensors, as Liger takes them."""
    return {"gate": x["gate_up"][:, 0::2].contiguous(), "up": x["gate_up"][:, 1::2].contiguous(), "dy0": x["dy0"]}


def activations(tiny: bool) -> Iterator[Case]:
    T, size = (6, 48) if tiny else (8192, 16384)
    yield Differentiable(
        kernel="bias_gelu",
        file="gelu",
        size=f"{T} x {size}",
        bytes=(SIZE * 2 * T * size, SIZE * 3 * T * size),
        formula="forward x -> y; backward x, dy -> dx",
        launches=("bias_gelu", "bias_gelu"),
        columns=size,
        first=True,
        whole=frozenset({"bias"}),
        inputs=lambda: {
            "x": normal(T, size, seed=0),
            "bias": normal(size, seed=1),
            "dy0": normal(T, size, seed=2),
        },
        functions={
            "ours": lambda x: (ours("bias_gelu")(x["x"], x["bias"]),),
            "eager": lambda x: (torch_ops.bias_gelu(x["x"], x["bias"]),),
        },
    )


def dropouts(tiny: bool) -> Iterator[Case]:
    T, H = (6, 48) if tiny else (8192, 8192)

    def function(dropout_add):
        return lambda x: (dropout_add(x["x"], x["y"], x["bias"], RATE, x["keys"], PLACE),)

    def inputs() -> Inputs:
        keys = torch.randint(-(2**63), 2**63 - 1, (T,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        x = {"x": normal(T, H, seed=0), "y": normal(T, H, seed=1), "bias": normal(H, seed=2), "keys": keys}
        return x | {"dy0": normal(T, H, seed=4)}

    yield Differentiable(
        kernel="dropout_add",
        file="dropout_add",
        size=f"{T} x {H}",
        bytes=(SIZE * 3 * T * H, SIZE * 2 * T * H),
        formula="forward x, y -> sum; backward dsum -> dy; dx is dsum",
        launches=("dropout_add", "dropout_add"),
        columns=H,
        providers=("ours", "eager", "compiled", "torch"),  # torch: another mask, which it stores
        first=True,
        whole=frozenset({"bias"}),
        inputs=inputs,
        functions={
            "ours": function(ours("dropout_add")),
            "eager": function(torch_ops.dropout_add),
            "torch": lambda x: (x["x"] + F.dropout(x["y"] + x["bias"], RATE),),
        },
    )


def ropes(tiny: bool) -> Iterator[Case]:
    B, S, N, K, D = (2, 4, 4, 2, 16) if tiny else (4, 4096, 32, 8, 128)
    q_bytes, k_bytes = (2 * SIZE * B * S * heads * D for heads in (N, K))

    def inputs() -> Inputs:
        angles_SR = torch.outer(torch.arange(S), 1e4 ** -(torch.arange(0, D, 2) / D)).repeat(1, 2).to(DEVICE)
        q_BSND, kv_BSKPD = normal(B, S, N, D, seed=0), normal(B, S, K, 2, D, seed=1)
        upstream = {f"dy{i}": normal(B, S, heads, D, seed=2 + i) for i, heads in enumerate((N, K, K))}
        return {"q": q_BSND, "kv": kv_BSKPD, "cos": angles_SR.cos(), "sin": angles_SR.sin()} | upstream

    def function(rope_):
        return lambda x: tuple(rope_(x["q"], x["kv"], x["cos"], x["sin"]))

    def for_liger(x: Inputs) -> Inputs:
        """Keys apart from values; its floor has no copy of the values' gradients."""
        q, k, *dy = (each.transpose(1, 2) for each in (x["q"], x["kv"][..., 0, :].contiguous(), x["dy0"], x["dy1"]))
        return {"q": q, "k": k, "cos": x["cos"][None], "sin": x["sin"][None], "dy0": dy[0], "dy1": dy[1]}

    peer = liger("rope", "LigerRopeFunction")
    yield Differentiable(
        kernel="rope_",
        file="rope",
        size=f"{B} x {S}, {N} + {K} heads of {D}",
        bytes=(q_bytes + k_bytes, q_bytes + 2 * k_bytes),
        formula="forward q, k -> q, k; backward dq, dk, dv -> dq, packed dk and dv",
        launches=("rope", "rope"),
        columns=N * D,
        providers=ALL,
        first=True,
        whole=frozenset({"cos", "sin"}),
        fixed=frozenset({"cos", "sin"}),
        inputs=inputs,
        functions={
            "ours": function(ours("rope_")),
            "eager": function(torch_ops.rope_),
            "liger": lambda x: tuple(peer(x["q"], x["k"], x["cos"], x["sin"])),
        },
        # It overwrites its arguments, which for autograd have to be results of something.
        adapt={"ours": lambda x: x | {"q": x["q"].clone(), "kv": x["kv"].clone()}, "liger": for_liger},
    )


def logsumexps(logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    rows = (part.double() / temperature for part in logits_TV.split(128))
    return torch.cat([part.logsumexp(-1) for part in rows]).float()


def logits_and_labels(T: int, V: int) -> Inputs:
    logits_TV = normal(T, V, seed=0).mul_(3)
    labels_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return {"logits": logits_TV, "labels": labels_T}


def named_stats(stats_TK: Tensor, _: Inputs) -> Inputs:
    return dict(zip(("max", "sum_exp", "label", "rank"), stats_TK.unbind(-1), strict=False))


def losses(tiny: bool) -> Iterator[Case]:
    sizes = [(3, 600), (3, 130)] if tiny else [(8192, 131072), (8192, 32000)]
    yield from (cross_entropy(*size, f"{size[0]} x {size[1]}") for size in sizes)
    T, V = sizes[0]

    def inputs() -> Inputs:
        x = logits_and_labels(T, V)
        label_logits_T = x["logits"].gather(1, x["labels"][:, None])[:, 0].float()
        return x | {"label_logits": label_logits_T, "max": x["logits"].amax(-1).float()}

    common = {"file": "vocab_loss", "size": f"{T} x {V}", "bytes": (SIZE * T * V,), "formula": "logits"}
    rows = Pass(
        "vocab_stats",
        lambda logits, labels, _, wholes: torch_vocab_ops.stats_of_rows(logits, labels, wholes),
        lambda x: (x["logits"], x["labels"], None, x["label_logits"]),
    )
    yield Vocabulary(kernel="rank", inputs=inputs, forward=rows, named=named_stats, **common)
    rows = Pass(
        "vocab_scores", _scores_of_rows, lambda x: (x["logits"], x["labels"], x["label_logits"], x["max"], BITS)
    )
    yield Vocabulary(kernel="vocab_scores", inputs=inputs, forward=rows, named=_named_scores, **common)
    many = (3, 70) if tiny else (2**31 // 131072 + 16, 131072)
    yield cross_entropy(*many, f"{many[0]} x {many[1]}, over 2^31 elements", **CHECK_ONLY)


def cross_entropy(T: int, V: int, size: str, **changes: Any) -> Case:
    def inputs() -> Inputs:
        x = logits_and_labels(T, V)
        return x | {"lse": logsumexps(x["logits"]), "scale": torch.linspace(0.5, 1.5, T, device=DEVICE)}

    def for_peers(x: Inputs, dy: Tensor) -> Inputs:
        return {"logits": x["logits"].requires_grad_(), "labels": x["labels"], "dy0": dy}

    peer = liger("cross_entropy", "LigerCrossEntropyFunction")
    given = {
        "kernel": "cross_entropy",
        "file": "vocab_loss",
        "size": size,
        "bytes": (SIZE * T * V, SIZE * 2 * T * V),
        "formula": "forward logits; backward logits -> gradient, in place",
        "launches": ("vocab", "vocab"),
        "columns": V,
        "providers": (*ALL, "torch"),
        "first": True,
        "inputs": inputs,
        "named": named_stats,
        "forward": Pass("vocab_stats", torch_vocab_ops.stats_of_rows, lambda x: (x["logits"], x["labels"])),
        "backward": Pass(
            "vocab_grad_",
            torch_vocab_ops.write_vocab_grad,
            lambda x: (x["logits"], x["labels"], x["lse"], x["scale"]),
        ),
        "peers": {
            "torch": (
                lambda x: (F.cross_entropy(x["logits"], x["labels"], reduction="none"),),
                lambda x: for_peers(x, x["scale"].to(DTYPE)),
            ),
            # Its forward pass writes the gradient too; the last word is the reduction.
            "liger": (
                lambda x: (peer(x["logits"], x["labels"], None, -100, 0.0, 0.0, "sum")[0],),
                lambda x: for_peers(x, torch.ones((), dtype=DTYPE, device=DEVICE)),
            ),
        },
    }
    return Vocabulary(**given | changes)


def _scores_of_rows(logits_TV: Tensor, labels_T: Tensor, label_logits_T: Tensor, max_T: Tensor, bits: int):
    """The twin of `vocab_scores`, of all rows at once."""
    wide_TV = logits_TV.to(max_T.dtype)
    other_TV = labels_T[:, None] != torch.arange(logits_TV.shape[1], device=logits_TV.device)
    rank_T = ((wide_TV > label_logits_T[:, None]) & other_TV).sum(-1, dtype=torch.int32)
    return ((wide_TV - max_T[:, None]).exp() * 2.0**bits).to(torch.int64).sum(-1), rank_T


def _named_scores(scores: tuple[Tensor, Tensor], x: Inputs) -> Inputs:
    units_T, rank_T = scores
    return {"sum_exp": (units_T.double() / 2**BITS).to(x["max"].dtype), "rank": rank_T.to(x["max"].dtype)}


def distillations(tiny: bool) -> Iterator[Case]:
    T, V = (3, 600) if tiny else (8192, 131072)
    for rho, sigma in ((2.0, 1.0), (2.0, 2.0)):
        yield distillation(T, V, rho, sigma)


def distillation(T: int, V: int, rho: float, sigma: float) -> Case:
    names = ("max", "sum_exp", "label", "soft_sum", "t_max", "t_sum", "cross", "t_mean")

    def inputs() -> Inputs:
        x = logits_and_labels(T, V) | {"teacher": normal(T, V, seed=2).mul_(3)}
        parts = logsumexps(x["logits"]), logsumexps(x["logits"], sigma), logsumexps(x["teacher"], rho)
        scale_T = torch.linspace(0.5, 1.5, T, device=DEVICE)
        return x | {"lse": torch.stack(parts, dim=-1), "ce": scale_T, "kd": 2 - scale_T}

    return Vocabulary(
        kernel="distillation",
        file="distill_loss",
        size=f"{T} x {V}, temperatures {rho:g} and {sigma:g}",
        bytes=(SIZE * 2 * T * V, SIZE * 3 * T * V),
        formula="forward student, teacher; backward student, teacher -> gradient, in place",
        launches=("distill", "distill"),
        columns=V,
        first=sigma != 1,
        inputs=inputs,
        named=lambda stats_TK, _: dict(zip(names, stats_TK.unbind(-1), strict=True)),
        forward=Pass(
            "distill_stats",
            torch_vocab_ops.distill_stats_of_rows,
            lambda x: (x["logits"], x["teacher"], x["labels"], rho, sigma),
        ),
        backward=Pass(
            "distill_grad_",
            torch_vocab_ops.write_distill_grad,
            lambda x: (x["logits"], x["teacher"], x["labels"], x["lse"], x["ce"], x["kd"], rho, sigma),
        ),
    )


def linear_losses(tiny: bool) -> Iterator[Case]:
    T, H, V = (8, 16, 96) if tiny else (8192, 4096, 131072)
    chunks = (4, 8) if tiny else (1024, 256, 512, 2048, 4096)
    for chunk in chunks:
        yield LinearLoss(
            kernel="vocab_parallel_loss",
            file="vocab_loss",
            size=f"{T} x {H} x {V} by {chunk}",
            providers=ALL if chunk == chunks[0] else ALL[:3],  # Liger chooses its chunk by itself
            judged=False,
            flops=6.0 * T * H * V,
            T=T,
            H=H,
            V=V,
            chunk=chunk,
        )


def updates(tiny: bool) -> Iterator[Case]:
    shapes = ((5, 7), (3,), (300,)) if tiny else tuple(parameter_shapes(MODELS["1.3B"].model).values())
    num_params = sum(torch.Size(shape).numel() for shape in shapes)
    for grad_dtype in dict.fromkeys((torch.float32, DTYPE)):
        for copies in (True, False):
            size = f"{num_params / 1e9:.2f} B, {str(grad_dtype).removeprefix('torch.')} gradients" + ", copy" * copies
            yield AdamW(
                kernel="adamw_",
                file="adamw",
                size=size,
                bytes=((24 + grad_dtype.itemsize + 2 * copies) * num_params,),
                formula="weights and moments read and written, gradients read, copy written",
                launches=("adamw",),
                columns=max(torch.Size(shape).numel() for shape in shapes),
                providers=("ours", "eager", "fused", "foreach"),
                rivals=("eager", "fused", "foreach"),
                first=copies,
                shapes=shapes,
                grad_dtype=grad_dtype,
                copies=copies,
            )

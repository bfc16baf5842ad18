"""The vocabulary kernels: the widest block, and the others in bfloat16.

The rows are aligned, the number of valid columns is not: both are ordinary.
"""

from collections.abc import Iterator

from megagrow_kernels.launch import ANY, pick
from megagrow_kernels.vocab_loss import vocab_grad_kernel, vocab_scores_kernel, vocab_stats_kernel
from tests.kernels.build import DTYPES, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        yield from vocab(dtype, 128256, target)
    for entry in ANY["vocab"][:-1]:
        yield from vocab("bf16", entry.block, target)


def vocab(dtype: str, vocab_size: int, target: str) -> Iterator[Build]:
    chosen = pick("vocab", vocab_size)
    common = {"p_logits": f"*{dtype}", "p_labels": "*i64", "stride_t": "i32", "num_valid": "i32"}
    wholes = pointers("fp32", "p_label_logits")
    scores = {"p_max": "*fp32", "p_units": "*i64", "p_rank": "*i32", "unit": "fp32"}
    gradient = {"p_logsumexp": "*fp32", "p_scale": "*fp32", "V": "i32"}
    for name, kernel, own, more in (
        ("stats", vocab_stats_kernel, {"p_stats": "*fp32"}, {"HAS_RANK": False, "p_label_logits": None}),
        ("stats_rank", vocab_stats_kernel, {"p_stats": "*fp32"} | wholes, {"HAS_RANK": True}),
        (
            "scores",
            vocab_scores_kernel,
            scores | wholes,
            {},
        ),
        ("grad", vocab_grad_kernel, gradient, {"SMOOTH": False, "p_smooth": None}),
        ("grad_smooth", vocab_grad_kernel, gradient | pointers("fp32", "p_smooth"), {"SMOOTH": True}),
    ):
        yield Build(
            f"vocab_{name}-{dtype}-{vocab_size}",
            kernel,
            common | own,
            {"BLOCK_V": chosen.block} | more,
            chosen.num_warps,
            target,
            aligned=("stride_t",),
        )

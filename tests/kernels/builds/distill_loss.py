"""The distillation kernels: the widest block with a temperature for the student, the others without."""

from collections.abc import Iterator

from megagrow_kernels.distill_loss import distill_grad_kernel, distill_stats_kernel
from megagrow_kernels.launch import ANY, pick
from tests.kernels.build import DTYPES, Build, pointers


def pinned(target: str) -> Iterator[Build]:
    for dtype in DTYPES:
        yield from distill(dtype, 128256, target, soft=True)
    yield from distill("bf16", 128256, target, soft=True, all_options=True)
    yield from distill("bf16", 128257, target, soft=False)
    for entry in ANY["distill"][:-1]:
        yield from distill("bf16", entry.block, target, soft=False)


def distill(dtype: str, vocab_size: int, target: str, soft: bool, all_options: bool = False) -> Iterator[Build]:
    """With all options the divergence is the reverse one, and the cross-entropy is smoothed."""
    chosen = pick("distill", vocab_size)
    numbers = {"stride_t": "i32", "stride_teacher_t": "i32", "num_valid": "i32", "r_rho": "fp32", "r_sigma": "fp32"}
    common = pointers(dtype, "p_logits", "p_teacher") | {"p_labels": "*i64"} | numbers
    constants = {"BLOCK_V": chosen.block, "SOFT": soft, "REVERSE": all_options}
    per_token = pointers("fp32", "p_logsumexps", "p_ce_scale", "p_kd_scale") | {"V": "i32"}
    if all_options:
        per_token |= pointers("fp32", "p_smooth")
    smoothing = {"SMOOTH": all_options} | ({} if all_options else {"p_smooth": None})
    for kernel, own, more in (
        (distill_stats_kernel, pointers("fp32", "p_label_logits", "p_stats"), {"HAS_RANK": True}),
        (distill_grad_kernel, per_token, smoothing),
    ):
        yield Build(
            f"{kernel.__name__.removesuffix('_kernel')}{'_all' if all_options else ''}-{dtype}-{vocab_size}",
            kernel,
            common | own,
            constants | more,
            chosen.num_warps,
            target,
            aligned=("stride_t", "stride_teacher_t"),
        )

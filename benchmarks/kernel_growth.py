"""Growth's rows of the table of what gpu_kernels.py measures: the shapes of GPT-2's growth and of a Llama's.

Parameters and moments are float32. Copies and mixtures are bound by memory; products by arithmetic, so that they have
no floor in bytes: their share of the products that the GPU can do is told (of bfloat16, which float32 cannot reach).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from kernel_cases import Case, Differentiable, Inputs, compiled, normal, ours, wide
from kernel_measure import DEVICE, Work
from torch import Tensor

from megagrow import torch_growth_ops as twins

F32, SIZE = torch.float32, 4
MOMENTS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class Written(Case):
    """A function that overwrites its targets, those inputs whose names begin with `target`.

    Attributes:
        inputs: makes them.
        functions: by provider; that of `compiled` is made of the twin.
    """

    inputs: Callable[[], Inputs]
    functions: Mapping[str, Callable[[Inputs], object]]

    def make(self) -> Inputs:
        return self.inputs()

    def _function(self, provider: str) -> Callable[[Inputs], object]:
        return compiled(self.functions["eager"]) if provider == "compiled" else self.functions[provider]

    def work(self, provider: str) -> Work:
        function, given = self._function(provider), self.make()
        return Work(lambda: function(given))

    def results(self, provider: str, inputs: Inputs) -> Inputs:
        given = {name: torch.empty_like(x) if name.startswith("target") else x for name, x in inputs.items()}
        self._function(provider)(given)
        return {name: x for name, x in given.items() if name.startswith("target")}

    def truths(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs, Inputs]]:
        yield slice(None), self.results("eager", {name: wide(x) for name, x in inputs.items()}), {}


def growth(tiny: bool) -> Iterator[Case]:
    mixes = [(3, 5, 96)] if tiny else [(12, 24, 3072 * 768), (32, 64, 2048 * 2048)]
    yield from (layer_mix(*sizes) for sizes in mixes)
    copies = [(5, 6, 12, 16)] if tiny else [(3072, 768, 4096, 1024), (4096, 4096, 8192, 8192)]
    for sizes in copies:
        yield from (sparse_map(*sizes, MOMENTS[:count]) for count in (3, 1))
    dense = [(6, 8, 12, 16)] if tiny else [(3072, 768, 4096, 1024), (4096, 4096, 8192, 8192)]
    for sizes in dense:
        yield dense_map(*sizes)
        yield dense_blocks(*sizes)


def layer_mix(J: int, K: int, N: int) -> Case:
    return Differentiable(
        kernel="layer_mix",
        file="layer_mix",
        size=f"{J} to {K} layers of {N}",
        bytes=(SIZE * (J + K) * N, SIZE * (J + K) * N),
        formula="forward sources -> mixtures; backward sources, gradients of mixtures -> gradients of weights",
        launches=("layer_mix", "layer_mix_bwd"),
        columns=N,
        whole=frozenset({"sources"}),
        fixed=frozenset({"sources"}),
        inputs=lambda: {
            "sources": normal(J, N, seed=0, dtype=F32),
            "weights": normal(K, J, seed=1, dtype=F32),
            "dy0": normal(K, N, seed=2, dtype=F32),
        },
        functions={
            "ours": lambda x: (ours("layer_mix")(x["sources"], x["weights"]),),
            "eager": lambda x: (twins.layer_mix(x["sources"], x["weights"]),),
        },
    )


def sparse_map(A: int, B: int, R: int, C: int, names: tuple[str, ...]) -> Case:
    """Replicas side by side on both dims."""

    def inputs() -> Inputs:
        found = {f"target {name}": torch.empty(R, C, device=DEVICE) for name in names}
        found |= {name: normal(A, B, seed=i, dtype=F32) for i, name in enumerate(names)}
        found |= {"rows": torch.arange(R, device=DEVICE) * A // R, "columns": torch.arange(C, device=DEVICE) * B // C}
        return found | {"row scales": normal(2, R, seed=4, dtype=F32), "column scales": normal(2, C, seed=5, dtype=F32)}

    def function(write: Callable[..., None]) -> Callable[[Inputs], object]:
        def run(x: Inputs) -> None:
            lists = [x[f"target {name}"] for name in names], [x[name] for name in names]
            write(*lists, x["rows"], x["columns"], x["row scales"], x["column scales"])

        return run

    return Written(
        kernel="sparse_map_",
        file="sparse_map",
        size=f"{A} x {B} to {R} x {C}" + ", weight and moments" * (len(names) > 1),
        bytes=(SIZE * len(names) * (A * B + R * C),),
        formula="source -> target, of each tensor",
        launches=("sparse_map",),
        columns=C,
        inputs=inputs,
        functions={"ours": function(ours("sparse_map_")), "eager": function(twins.sparse_map_)},
    )


def dense_map(A: int, B: int, R: int, C: int) -> Case:
    by_rows, by_columns = R * B * (A + C), A * C * (B + R)
    return Differentiable(
        kernel="dense_map",
        file="dense_map",
        size=f"{A} x {B} to {R} x {C}",
        launches=("dense_map", "dense_map"),
        columns=C,
        whole=frozenset({"source", "columns"}),
        fixed=frozenset({"source"}),
        flops=2.0 * (min(by_rows, by_columns) + R * C * B + R * B * A + A * R * C + A * C * B),
        inputs=lambda: {
            "source": normal(A, B, seed=0, dtype=F32),
            "rows": normal(R, A, seed=1, dtype=F32).mul_(A**-0.5),
            "columns": normal(C, B, seed=2, dtype=F32).mul_(B**-0.5),
            "dy0": normal(R, C, seed=3, dtype=F32),
        },
        functions={
            "ours": lambda x: (ours("dense_map")(x["source"], x["rows"], x["columns"]),),
            "eager": lambda x: (twins.dense_map(x["source"], x["rows"], x["columns"]),),
        },
    )


def dense_blocks(A: int, B: int, R: int, C: int) -> Case:
    def inputs() -> dict[str, Tensor]:
        return {
            "target": torch.empty(R, C, device=DEVICE),
            "source": normal(A, B, seed=0, dtype=F32),
            "rows": normal(R - A, A, seed=1, dtype=F32).mul_(A**-0.5),
            "columns": normal(C - B, B, seed=2, dtype=F32).mul_(B**-0.5),
        }

    return Written(
        kernel="dense_blocks_",
        file="dense_map",
        size=f"{A} x {B} to {R} x {C}",
        columns=C,
        flops=2.0 * (A * (C - B) * B + (R - A) * A * C),
        inputs=inputs,
        functions={
            "ours": lambda x: ours("dense_blocks_")(x["target"], x["source"], x["rows"], x["columns"]),
            "eager": lambda x: twins.dense_blocks_(x["target"], x["source"], x["rows"], x["columns"]),
        },
    )

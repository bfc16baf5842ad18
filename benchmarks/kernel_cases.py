"""The kinds of cases that gpu_kernels.py measures; which ones stands in kernel_table.py.

A case makes its inputs, gives the work of each provider (`ours`, the twin `eager` and `compiled`, peers), and the
results by which it is judged.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_measure import DEVICE, ON_GPU, Work
from torch import Tensor

import megagrow_kernels
from megagrow import ops, torch_ops, torch_vocab_ops
from megagrow.parallel.loss import LossOptions, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from megagrow_kernels.adamw import AdamWTable

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]

DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter is wrong in bfloat16, in silence
CHECKED = 2**24  # elements of which the truth is made at a time


def ours(name: str) -> Callable[..., Any]:
    """A kernel's function; one that is not there fails when it is called, in its own rows."""
    return lambda *args: getattr(megagrow_kernels, name)(*args)


def liger(module: str, name: str) -> Callable[..., Any]:
    """One of Liger's functions, if it is installed."""
    return lambda *args: getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply(*args)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile as it is by default; without a GPU only as far as it takes no C++ compiler."""
    return torch.compile(function, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")


def normal(*shape: int, seed: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), dtype=dtype, device=DEVICE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case(ABC):
    """One kernel at one size.

    Attributes:
        kernel: its public function.
        file: the file of kernels, by the name that `ops.MEASURED` knows.
        size: of the tensors, in words.
        bytes: at the floor, of forward and of backward.
        formula: where they come from.
        launches: the launch table's names for forward and backward, to be tuned here; None: elsewhere.
        columns: what the launch is picked by.
        providers: who is measured; none where the case is a check only.
        rivals: whom the kernel has to beat.
        judged: whether the verdict on the file rests on it.
        first: whether it is measured before all that are not.
        whole: inputs without rows.
        huge: the twin is computed in parts, too: offsets of its own are not what is tested.
        flops: of products, if there are any.
    """

    kernel: str
    file: str
    size: str
    bytes: tuple[float, ...] = ()
    formula: str = ""
    launches: tuple[str, ...] = ()
    columns: int = 0
    providers: tuple[str, ...] = ("ours", "eager", "compiled")
    rivals: tuple[str, ...] = ("eager", "compiled")
    judged: bool = True
    first: bool = False
    whole: frozenset[str] = frozenset()
    huge: bool = False
    flops: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.size}"

    @abstractmethod
    def make(self) -> Inputs:
        """The same inputs each time."""

    @abstractmethod
    def work(self, provider: str) -> Work:
        """With inputs of its own."""

    @abstractmethod
    def results(self, provider: str, inputs: Inputs) -> Inputs:
        """All that is to be right, by name; the inputs stay as they are."""

    def truths(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs, Inputs]]:
        """Results in float64 and which rows of them, and the twin's where it is `huge`; what sums over rows is last."""
        rows = [x for name, x in inputs.items() if name not in self.whole]
        step = max(1, CHECKED // max(x[0].numel() for x in rows))
        sums: tuple[Inputs, Inputs] = {}, {}
        for start in range(0, len(rows[0]), step):
            part = slice(start, start + step)
            chosen = {name: x if name in self.whole else x[part] for name, x in inputs.items()}
            truth = self.results("eager", {name: wide(x) for name, x in chosen.items()})
            twin = self.results("eager", chosen) if self.huge else {}
            for found, totals in zip((truth, twin), sums, strict=True):
                for name in [name for name in found if name.removeprefix("d") in self.whole]:
                    totals[name] = totals.get(name, 0) + found.pop(name).double()
            yield part, truth, twin
        yield slice(None), *sums


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@dataclass(frozen=True, kw_only=True, eq=False)
class Differentiable(Case):
    """A function that autograd knows.

    Attributes:
        inputs: makes them; those whose names begin with `dy` are the gradients of the outputs.
        functions: by provider; that of `compiled` is made of the twin.
        adapt: brings inputs, untimed, into the form in which a provider takes them.
        fixed: inputs that need no gradient.
    """

    inputs: Callable[[], Inputs]
    functions: Mapping[str, Function]
    adapt: Mapping[str, Callable[[Inputs], Inputs]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def make(self) -> Inputs:
        return self.inputs()

    def _given(self, provider: str, inputs: Inputs) -> Inputs:
        for name, x in inputs.items():
            x.requires_grad_(x.is_floating_point() and name not in self.fixed and not name.startswith("dy"))
        return self.adapt[provider](inputs) if provider in self.adapt else inputs

    def work(self, provider: str) -> Work:
        return differentiable_work(self._function(provider), self._given(provider, self.make()))

    def _function(self, provider: str) -> Function:
        return compiled(self.functions["eager"]) if provider == "compiled" else self.functions[provider]

    def results(self, provider: str, inputs: Inputs) -> Inputs:
        given = self._given(provider, {name: x.detach().clone() for name, x in inputs.items()})
        outputs = self._function(provider)(given)
        names, upstream = wanted_and_upstream(given, len(outputs))
        gradients = torch.autograd.grad(outputs, [given[name] for name in names], upstream)
        found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
        return found | {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


def wanted_and_upstream(given: Inputs, num_outputs: int) -> tuple[list[str], list[Tensor]]:
    """Inputs that need a gradient, and the gradients of the outputs."""
    return [name for name, x in given.items() if x.requires_grad], [given[f"dy{i}"] for i in range(num_outputs)]


def differentiable_work(function: Function, given: Inputs) -> Work:
    """Before each repetition the inputs are restored, which some overwrite, and before a backward pass the graph is
    built anew: no provider is made to keep it."""
    kept = {name: x.detach().clone() for name, x in given.items() if x.is_floating_point()}
    outputs: list[Tensor] = []

    @torch.no_grad()
    def restore() -> None:
        for name, x in kept.items():
            given[name].copy_(x)

    def build() -> None:
        outputs.clear()
        restore()
        outputs.extend(function(given))

    def backward() -> object:
        names, upstream = wanted_and_upstream(given, len(outputs))
        return torch.autograd.grad(outputs, [given[name] for name in names], upstream)

    return Work(lambda: function(given), backward, restore, build)


@dataclass(frozen=True)
class Pass:
    """A kernel for the loss that is called by itself, and its twin.

    Attributes:
        name: of both.
        rows: the twin in the form that a compiler makes one pass of.
        arguments: of all three.
    """

    name: str
    rows: Callable[..., Any]
    arguments: Callable[[Inputs], tuple[Any, ...]]

    def of(self, provider: str) -> Callable[[Inputs], Any]:
        twin = compiled(self.rows) if provider == "compiled" else getattr(torch_vocab_ops, self.name)
        function = ours(self.name) if provider == "ours" else twin
        return lambda x: function(*self.arguments(x))


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary(Case):
    """Statistics of logits, and perhaps their gradient in place.

    Attributes:
        inputs: makes them; `logits` are overwritten.
        named: the results of the forward pass.
        peers: a function that autograd knows, and its inputs.
    """

    inputs: Callable[[], Inputs]
    forward: Pass
    named: Callable[[Any, Inputs], Inputs]
    backward: Pass | None = None
    peers: Mapping[str, tuple[Function, Callable[[Inputs], Inputs]]] = field(default_factory=dict)

    def make(self) -> Inputs:
        return self.inputs()

    def work(self, provider: str) -> Work:
        x = self.make()
        if provider in self.peers:
            function, adapt = self.peers[provider]
            return differentiable_work(function, adapt(x))
        forward = self.forward.of(provider)
        if self.backward is None:
            return Work(lambda: forward(x))
        kept, backward = x["logits"].clone(), self.backward.of(provider)
        return Work(lambda: forward(x), lambda: backward(x), None, lambda: x["logits"].copy_(kept))

    def results(self, provider: str, inputs: Inputs) -> Inputs:
        found = self.named(self.forward.of(provider)(inputs), inputs)
        if self.backward is not None:
            found["grad"] = inputs["logits"].clone()
            self.backward.of(provider)({**inputs, "logits": found["grad"]})
            # The label's is the largest gradient of a row: its bound says nothing about the others.
            found["other grad"] = found["grad"].scatter(1, inputs["labels"][:, None], 0.0)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearLoss(Case):
    """The product with the output matrix, loss and gradients, by chunks of tokens; it has no floor in bytes."""

    T: int
    H: int
    V: int
    chunk: int

    def make(self) -> Inputs:
        labels_T = torch.randint(self.V, (self.T,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        weights_T = torch.full((self.T,), 1 / self.T, device=DEVICE)
        head_VH = normal(self.V, self.H, seed=2).mul_(self.H**-0.5)
        return {"hidden": normal(self.T, self.H, seed=0), "head": head_VH, "labels": labels_T, "weights": weights_T}

    def _run(self, provider: str, x: Inputs) -> tuple[Tensor, ...]:
        if provider == "liger":
            function = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
            loss = function(x["hidden"], x["head"], x["labels"])[0]
        else:
            ops.let_kernels_serve("all" if provider == "ours" else "none")
            options = LossOptions(chunk_tokens=self.chunk, compiled=provider == "compiled")
            arguments = (x["hidden"], x["head"], x["labels"], x["weights"], self.V, Axis())
            loss, _ = vocab_parallel_loss(*arguments, options=options)
        return loss.detach(), *torch.autograd.grad(loss, (x["hidden"], x["head"]))

    def work(self, provider: str) -> Work:
        x = self.make()
        x["hidden"].requires_grad_(), x["head"].requires_grad_()
        return Work(lambda: self._run(provider, x))

    def results(self, provider: str, inputs: Inputs) -> Inputs:
        x = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in ("hidden", "head")}
        return dict(zip(("loss", "dhidden", "dhead"), self._run(provider, x), strict=True))

    def truths(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs, Inputs]]:
        yield slice(None), self.results("eager", {name: wide(x) for name, x in inputs.items()}), {}


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamW(Case):
    """One update of all tensors of a model.

    Attributes:
        shapes: of the tensors.
        grad_dtype: of the gradients.
        copies: whether 16-bit copies are written too.
    """

    shapes: tuple[tuple[int, ...], ...]
    grad_dtype: torch.dtype
    copies: bool

    def make(self) -> Inputs:
        inputs: Inputs = {}
        for i, shape in enumerate(self.shapes):
            for j, (name, factor) in enumerate(ADAMW_INPUTS.items()):
                dtype = self.grad_dtype if name == "grad" else torch.float32
                inputs[f"{name} {i}"] = normal(*shape, seed=4 * i + j, dtype=dtype).mul_(factor)
            inputs[f"square {i}"].square_()
            if self.copies:
                inputs[f"copy {i}"] = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        return inputs

    def _lists(self, inputs: Inputs) -> list[list[Tensor] | None]:
        """In the order in which `adamw_` takes them."""
        lists = [[x for key, x in inputs.items() if key.split()[0] == name] for name in (*ADAMW_INPUTS, "copy")]
        return [*lists[:-1], lists[-1] or None]

    def work(self, provider: str) -> Work:
        params, grads, averages, squares, copies = self._lists(self.make())
        rates = [[value] * len(params) for value in ADAMW_RATES]
        if provider == "ours":
            table = AdamWTable(params, averages, squares, copies)
            return Work(lambda: table.update(grads, *rates, *ADAMW_BETAS, 7))
        if provider == "eager":
            return Work(lambda: torch_ops.adamw_(params, grads, averages, squares, copies, *rates, *ADAMW_BETAS, 7))
        return self._by_torch(params, grads, copies, {provider: True})

    def _by_torch(self, params: list[Tensor], grads: list[Tensor], copies: list[Tensor] | None, kind: dict) -> Work:
        lr, eps, decay = ADAMW_RATES
        optimizer = torch.optim.AdamW(params, lr=lr, betas=ADAMW_BETAS, eps=eps, weight_decay=decay, **kind)

        @torch.no_grad()
        def update() -> None:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(torch.float32)
            optimizer.step()
            if copies:
                torch._foreach_copy_(copies, params)

        return Work(update)

    def results(self, provider: str, inputs: Inputs) -> Inputs:
        given = {name: x.clone() for name, x in inputs.items()}
        lists = self._lists(given)
        rates = [[value] * len(lists[0]) for value in ADAMW_RATES]
        scale = torch.full((1,), 0.5, dtype=lists[0][0].dtype, device=DEVICE)
        update = ours("adamw_") if provider == "ours" else torch_ops.adamw_
        update(*lists, *rates, *ADAMW_BETAS, 7, scale)
        return {name: x for name, x in given.items() if not name.startswith("grad")}

    def truths(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs, Inputs]]:
        """Tensor by tensor: all of them at once would be too large."""
        for i in range(len(self.shapes)):
            chosen = {name: wide(x) for name, x in inputs.items() if name.endswith(f" {i}")}
            yield slice(None), self.results("eager", chosen), {}


# With what each is multiplied; the names sort the lists.
ADAMW_INPUTS = {"param": 0.02, "grad": 1e-3, "average": 1e-3, "square": 1e-3}
ADAMW_RATES, ADAMW_BETAS = (3e-4, 1e-8, 0.1), (0.9, 0.95)  # lr, eps, weight decay

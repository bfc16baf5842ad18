"""Memory of the loss of a step: mixed with a teacher's, plain, and mixed densely. `salt.py` is the way in.

What counts is what the loss and its gradients take beyond the output matrices, the gradient of the student's, and the
hidden states of both models; measured for each kind in a process of its own, in two ways:

    process        the most anonymous pages at a time, less those before: libraries and their workspaces included
    live tensors   the most bytes that tensors hold at a time, as torch counts on a GPU

Densely means whole logits, torch's cross-entropy and its KL divergence. That is measured on a quarter of the tokens,
and multiplied: all of it grows with them, and whole it does not fit beside much else in 24 GB.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from processes import MIB, anonymous_peak, launch, settle, tell
from results_file import Row
from torch import Tensor

from megagrow.config import TrainConfig
from megagrow.parallel.loss import LossOptions, cache_size, tokens_at_once, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from megagrow.plan.measure import peak_memory

BOUND = 600  # MiB, of the mixed loss
KINDS = {"mixed": 1, "plain": 1, "mixed, densely": 4}  # with what its figures are multiplied by
OMEGA, RHO = 1 / 3, 0.5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sizes:
    """Of a step in float32."""

    vocab: int = 128_000
    tokens: int = 4096
    hidden: int = 512
    teacher_hidden: int = 256


class Step:
    """The loss of one step, and its gradients; what it is given exists from the start on."""

    def __init__(self, sizes: Sizes) -> None:
        self.vocab, tokens = sizes.vocab, sizes.tokens
        self.states = self._normal(tokens, sizes.hidden).requires_grad_()
        self.head = self._normal(self.vocab, sizes.hidden).requires_grad_()
        self.teacher = self._normal(tokens, sizes.teacher_hidden), self._normal(self.vocab, sizes.teacher_hidden)
        self.labels, self.weights = (
            torch.randint(self.vocab, (tokens,), device=DEVICE),
            torch.rand(tokens, device=DEVICE),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).div_(16)

    def run(self, kind: str) -> None:
        self.states.grad = self.head.grad = None
        losses = self.densely() if kind == "mixed, densely" else self.ours(self.teacher if kind == "mixed" else ())
        losses.sum().backward()

    def ours(self, teacher: tuple[Tensor, ...]) -> Tensor:
        """By the default settings of a run."""
        chunk = tokens_at_once(TrainConfig().loss_chunk, self.vocab, 4, cache_size(DEVICE))
        options = LossOptions(OMEGA, RHO, chunk_tokens=chunk)
        given = self.states, self.head, self.labels, self.weights, self.vocab, Axis(), *teacher
        return vocab_parallel_loss(*given, options=options)[0]

    def densely(self) -> Tensor:
        logits, target = self.states @ self.head.T, (self.teacher[0] @ self.teacher[1].T / RHO).log_softmax(-1)
        ce = F.cross_entropy(logits, self.labels, reduction="none")
        kd = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        return ((1 - OMEGA) * ce + OMEGA * kd) * self.weights


def measure(kind: str, sizes: Sizes) -> dict[str, float]:
    """Bytes that a step takes."""
    Step(replace(sizes, vocab=1000, tokens=64)).run(kind)  # libraries make themselves ready
    step = Step(replace(sizes, tokens=sizes.tokens // KINDS[kind]))
    found = {"live tensors": float(_live_peak(lambda: step.run(kind)))}
    if DEVICE.type == "cpu":
        step.head.grad = step.states.grad = None
        held = settle()
        step.run(kind)
        found["process"] = anonymous_peak() - held
    return {name: KINDS[kind] * (size - step.head.nbytes) for name, size in found.items()}


def _live_peak(run: Callable[[], None]) -> int:
    if DEVICE.type == "cpu":
        return peak_memory(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows(sizes: Sizes | None = None) -> list[Row]:
    """Of each kind by each way of measuring; the mixed loss keeps to its bound by all of them."""
    sizes = sizes or Sizes()
    found = []
    for kind in KINDS:
        for way, size in launch(__file__, kind, json.dumps(asdict(sizes)))[0].items():
            name = f"loss, {kind}: {way} ({sizes.tokens} tokens, vocabulary {sizes.vocab}, fp32)"
            judged = (f"< {BOUND} MiB", size < BOUND * MIB) if kind == "mixed" else ()
            found.append(Row(name, size / MIB, "MiB", *judged))
    return found


if __name__ == "__main__":
    tell(measure(sys.argv[1], Sizes(**json.loads(sys.argv[2]))))

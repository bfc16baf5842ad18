"""What SALT costs beside plain training.

    python benchmarks/salt.py               # two minutes, 8 GB of memory; benchmarks/results/salt.json

`loss_memory`: the most that lives at a time while the mixed loss of a step and its gradients are computed, beyond the
output matrices, the gradient of the student's, and the hidden states of both models; and the same done densely, by
whole logits, torch's cross-entropy and its KL divergence. That is measured on a quarter of the tokens, and multiplied:
all of it grows with them, and whole it does not fit beside much else in 24 GB. On a CPU every allocation through torch
counts, on a GPU what its allocator has given out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from results_file import Row, write
from torch import Tensor

from megagrow.config import TrainConfig
from megagrow.parallel.loss import LossOptions, cache_size, tokens_at_once, vocab_parallel_loss
from megagrow.parallel.mesh import Axis
from megagrow.plan.measure import peak_memory

MIB = 2**20
LOSS_MIB = 600  # of the mixed loss in float32
OMEGA, RHO = 1 / 3, 0.5


def peak(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that `run` has allocated at a time."""
    if device.type != "cuda":
        return peak_memory(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def loss_memory(
    device: torch.device, vocab: int = 128_000, tokens: int = 4096, hidden: int = 512, teacher_hidden: int = 256
) -> list[Row]:
    """Peaks of the plain, the mixed and the dense mixed loss, in float32, by the default settings of a run."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device) / 16

    states, head = normal(tokens, hidden).requires_grad_(), normal(vocab, hidden).requires_grad_()
    teacher = normal(tokens, teacher_hidden), normal(vocab, teacher_hidden)
    labels, weights = torch.randint(vocab, (tokens,), device=device), torch.rand(tokens, device=device)
    chunk = tokens_at_once(TrainConfig().loss_chunk, vocab, 4, cache_size(device))
    options = LossOptions(OMEGA, RHO, chunk_tokens=chunk)

    def ours(*of_teacher: Tensor) -> Callable[[], None]:
        given = states, head, labels, weights, vocab, Axis(), *of_teacher
        return lambda: vocab_parallel_loss(*given, options=options)[0].sum().backward()

    def dense(part: slice) -> None:
        logits, target = states[part] @ head.T, (teacher[0][part] @ teacher[1].T / RHO).log_softmax(-1)
        ce = F.cross_entropy(logits, labels[part], reduction="none")
        kd = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
        (((1 - OMEGA) * ce + OMEGA * kd) * weights[part]).sum().backward()

    def beyond_gradient(run: Callable[[], None]) -> float:
        states.grad = head.grad = None
        return (peak(run, device) - 4 * head.numel()) / MIB

    of = f"loss of {tokens} tokens, vocabulary {vocab}, fp32"
    mixed = beyond_gradient(ours(*teacher))
    return [
        Row(f"mixed {of}", mixed, "MiB", f"< {LOSS_MIB} MiB", mixed < LOSS_MIB),
        Row(f"plain {of}", beyond_gradient(ours()), "MiB"),
        Row(f"mixed {of}, densely", 4 * beyond_gradient(lambda: dense(slice(tokens // 4))), "MiB"),
    ]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write("salt", loss_memory(device))


if __name__ == "__main__":
    main()

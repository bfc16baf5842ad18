"""Cross-entropy over a vocabulary on two ranks against megatron-core's, fused and not, and against liger-kernel's.

Theirs run on two gloo ranks, Liger's kernels interpreted; ours on the two shards, whose statistics are merged here.
Compared: weighted losses and the gradient of every logit, with labels on either shard or on none.
Less exact there: Megatron's fused one gives its gradient in bfloat16 whatever the dtype of the logits.
"""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.kernels import interpreter_fix
from tests.kernels.interpreter import on_ranks
from tests.peers.kernels.agreement import BF16, DTYPES, Tensors, assert_agree, normal
from tests.peers.kernels.losses import IGNORED, Tokens, cross_entropy, exact_cross_entropy, of_logits, tokens, weighted

T, V = 13, 206
FUSED = "megatron fused"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocab_parallel_cross_entropy_on_two_ranks(dtype: torch.dtype) -> None:
    logits_TV, given = 3 * normal(0, T, V, dtype=dtype), tokens(T, V)
    ours, truth = cross_entropy(logits_TV, given, num_shards=2), exact_cross_entropy(logits_TV, given)
    first, second = on_ranks(2, their_cross_entropies, logits_TV, given)
    for name in first:
        assert torch.equal(first[name]["loss"], second[name]["loss"])
        dlogits_TV = torch.cat((first[name]["dlogits"], second[name]["dlogits"]), dim=1)
        if name == FUSED:
            narrow_TV = dlogits_TV.to(BF16)
            assert torch.equal(narrow_TV.to(dtype), dlogits_TV)
            dlogits_TV = narrow_TV
        peer = {"loss": first[name]["loss"], "dlogits": dlogits_TV}
        assert_agree(f"{name} vocab_parallel_ce on two ranks", dtype, ours, peer, truth)


def their_cross_entropies(logits_TV: Tensor, given: Tokens) -> dict[str, Tensors]:
    """On one of the ranks. Megatron's is not compiled, which would take each of them most of the suite's time."""
    install()
    from tests.peers.kernels import theirs

    shard_TV, labels_T1 = logits_TV.chunk(2, dim=1)[dist.get_rank()], given.labels_T[:, None]
    world = dist.group.WORLD

    def liger(logits_T1V: Tensor) -> Tensor:
        arguments = world, IGNORED, 0.0, "pytorch", "global"
        return theirs.LigerVocabParallelCEFunction.apply(logits_T1V, labels_T1, *arguments)

    functions = {
        "liger": liger,
        "megatron": lambda logits_T1V: theirs.vocab_parallel_cross_entropy(logits_T1V, labels_T1),
        FUSED: lambda logits_T1V: theirs.fused_vocab_parallel_cross_entropy(logits_T1V, labels_T1, world),
    }
    theirs.parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    try:
        with torch.compiler.set_stance("force_eager"):
            return {name: losses_and_gradients(function, shard_TV, given) for name, function in functions.items()}
    finally:
        theirs.parallel_state.destroy_model_parallel()


def losses_and_gradients(function: Callable[[Tensor], Tensor], shard_TV: Tensor, given: Tokens) -> Tensors:
    """They want the tokens in two dimensions."""
    return of_logits(lambda logits: weighted(function(logits[:, None])[:, 0], given), shard_TV)


@functools.cache
def install() -> None:
    """In a rank: Triton interprets there, since it does in the process that started it."""
    from tests.peers.kernels import lenient

    interpreter_fix.install()
    lenient.install()

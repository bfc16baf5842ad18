"""megagrow's loss from hidden states against cut-cross-entropy, losses and gradients of hidden states and head.

Compared, with ignored labels, the mean, and weights of tokens through reduction="none": impl="torch_compile"; and
impl="cce", its Triton kernels, interpreted, in bfloat16, since their backward pass takes no float32. They leave out
blocks of 128 by 128 logits whose gradients are below eps / 32; here no block is.
Less exact there: impl="cce" adds up gradients in bfloat16, block by block.
Could not run: impl="cce" autotuned, which asks for a GPU; it is off unless CCE_AUTOTUNE is set.
"""

import pytest
import torch
from torch import Tensor

from megagrow.parallel.loss import LossOptions
from tests.peers.kernels import theirs
from tests.peers.kernels.agreement import BF16, F32
from tests.peers.kernels.losses import assert_agree_on_hidden, heads, tokens, weighted

T, V, H = 13, 203, 24


@pytest.mark.parametrize("impl, dtype", [("torch_compile", F32), ("torch_compile", BF16), ("cce", BF16)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_linear_cross_entropy(reduction: str, impl: str, dtype: torch.dtype) -> None:
    of = tokens(T, V).averaged() if reduction == "mean" else tokens(T, V)

    def cut(hidden: Tensor, head: Tensor) -> Tensor:
        losses = theirs.linear_cross_entropy(hidden, head, of.labels_T, reduction=reduction, impl=impl)
        return losses if reduction == "mean" else weighted(losses, of).sum()

    rows = {"of_hidden": 0.5} if impl == "cce" else {}
    name = f"cut_cross_entropy {impl}, {reduction}"
    assert_agree_on_hidden(name, dtype, cut, heads(T, V, H, dtype), of, LossOptions(chunk_tokens=5), **rows)

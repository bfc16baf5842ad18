"""Matrix products: by torch, or on a CPU by what is faster there. `ops` hands them on.

Legend: M, N, K = sizes of a product, R = rows of a piece of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow import cpu_ops

PIECE_BYTES = 2**26  # of a product that a GPU adds to a sum


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias.

    Args:
        x: [..., in]
        weight: [out, in]
        bias: [out] or None.
    """
    if not cpu_ops.serves_product(x, weight):
        return F.linear(x, weight, bias)
    y = cpu_ops.product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def product(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """a·bᵀ [M, N]; without gradients also where `out_MN` is."""
    if not cpu_ops.serves_product(a_MK, b_NK):
        return torch.mm(a_MK, b_NK.T, out=out_MN)
    if out_MN is None:
        return cpu_ops.product(a_MK, b_NK)
    cpu_ops.write_product(out_MN, a_MK, b_NK)
    return out_MN


@torch.no_grad()
def add_product_(total_MN: Tensor, a_MK: Tensor, b_NK: Tensor, is_first: bool = False) -> None:
    """total += a·bᵀ, or for the first total = a·bᵀ; the total may have a wider dtype.

    The product exists for `piece_rows` of the total at a time.
    """
    add = Tensor.copy_ if is_first else Tensor.add_
    num_rows = piece_rows(total_MN.device.type, total_MN.shape[1], a_MK.element_size())
    for total_RN, a_RK in zip(total_MN.split(num_rows), a_MK.split(num_rows), strict=True):
        add(total_RN, product(a_RK, b_NK))


def piece_rows(device_type: str, num_columns: int, width: int) -> int:
    """Rows of a product that exist at a time while it is added to a sum: what a CPU's cache holds, else 64 MiB.

    Args:
        width: bytes of an element of the product.
    """
    return cpu_ops.PIECE_ROWS if device_type == "cpu" else max(PIECE_BYTES // (max(num_columns, 1) * width), 1)

"""AdamW over many tensors in one launch, with the 16-bit copies of the weights written in the same pass.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, as torch.optim.AdamW computes it.
Bytes per parameter: 24 for weights and moments, 2 or 4 for the gradient, 2 for the copy: 28 with 16-bit gradients and a
copy, 30 with float32 gradients and a copy, 28 with those alone. Each is the floor.

Legend: L = tensors of the list, G = blocks of all of them; 2 = (tensor, its first element), 5 = (addresses of weights,
both moments and copy, elements), 3 = (lr·decay, lr over the first bias correction, eps).
Prefixes: i_ index, o_ offsets, p_ pointer, b_ values of a block, m_ mask, a_ address, an integer.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megagrow_kernels.launch import pick

TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def adamw_ref(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: float,
    eps: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition for one tensor, in the precision of its inputs: new weights and moments."""
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    root = (exp_avg_sq / (1 - beta2**step)).sqrt()
    return param * (1 - lr * weight_decay) - lr * exp_avg / (1 - beta1**step) / (root + eps), exp_avg, exp_avg_sq


@triton.jit
def _at(address, i_first, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    p_x = address.to(tl.pointer_type(dtype)) + i_first
    # Four elements to a thread, in whatever dtype: with eight of 16 bits, which 16 bytes would hold, float32 values
    # would change threads through shared memory before they are stored.
    FOUR: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth // 2
    return tl.multiple_of(p_x, FOUR) if ALIGNED else p_x


@triton.jit
def _update(
    addresses,
    factors,
    i_first,
    m_x,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block of one tensor; ALIGNED says that 16 divides the addresses."""
    a_param, a_avg, a_square, a_copy, a_grad = addresses
    weight1, weight2, correction, b_scale, b_decay, b_lr, b_eps = factors
    o_x = tl.arange(0, BLOCK)
    p_param = _at(a_param, i_first, tl.float32, ALIGNED) + o_x
    p_avg = _at(a_avg, i_first, tl.float32, ALIGNED) + o_x
    p_square = _at(a_square, i_first, tl.float32, ALIGNED) + o_x
    b_grad = tl.load(_at(a_grad, i_first, GRAD, ALIGNED) + o_x, mask=m_x).to(tl.float32) * b_scale
    b_param, b_avg, b_square = tl.load(p_param, mask=m_x), tl.load(p_avg, mask=m_x), tl.load(p_square, mask=m_x)
    # As steps towards the new value: rounded to float32, beta and 1 - beta do not add up to 1.
    b_avg += weight1 * (b_grad - b_avg)
    b_square += weight2 * (b_grad * b_grad - b_square)
    # Decay and step together: the weights are rounded once.
    b_param -= b_decay * b_param + b_lr * (b_avg / (tl.sqrt_rn(b_square) * correction + b_eps))
    tl.store(p_param, b_param, mask=m_x)
    tl.store(p_avg, b_avg, mask=m_x)
    tl.store(p_square, b_square, mask=m_x)
    if COPY is not None:
        tl.store(_at(a_copy, i_first, COPY, ALIGNED) + o_x, b_param.to(COPY), mask=m_x)


@triton.jit
def adamw_kernel(
    p_blocks,
    p_table,
    p_grads,
    p_rates,
    p_scale,
    p_skip,
    weight1,
    weight2,
    correction,
    BLOCK: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
):
    """Grid (G,). weight1 and weight2 are 1 - beta; correction is 1 / √(second bias correction)."""
    i_g = tl.program_id(0).to(tl.int64)
    if p_skip is not None:  # noqa: SIM102, since `and` would compile the load of None
        if tl.load(p_skip) != 0:
            return
    b_scale = tl.load(p_scale) if p_scale is not None else 1.0
    i_l, i_first = tl.load(p_blocks + 2 * i_g), tl.load(p_blocks + 2 * i_g + 1)
    p_row = p_table + 5 * i_l
    a_param, a_avg, a_square, a_copy = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 3)
    num_left = tl.load(p_row + 4) - i_first
    a_grad = tl.load(p_grads + i_l)
    p_rate = p_rates + 3 * i_l
    addresses = (a_param, a_avg, a_square, a_copy, a_grad)
    factors = (weight1, weight2, correction, b_scale, tl.load(p_rate), tl.load(p_rate + 1), tl.load(p_rate + 2))
    # Shards may start anywhere: unless 16 bytes divide the starts of all, the tensor goes element by element, as the
    # last block of any tensor does, where a mask would cost the 128-bit accesses anyway. In parts, for few registers.
    is_aligned = ((a_param | a_avg | a_square | a_copy | a_grad) & 15) == 0
    if is_aligned & (num_left >= BLOCK):
        _update(addresses, factors, i_first, None, BLOCK, GRAD, COPY, True)
    else:
        PART: tl.constexpr = BLOCK // 8 if BLOCK > 8 else BLOCK
        for i_part in range(0, tl.minimum(num_left, BLOCK), PART):
            m_x = tl.arange(0, PART) < num_left - i_part
            _update(addresses, factors, i_first + i_part, m_x, PART, GRAD, COPY, False)


def _check_state(params, exp_avgs, exp_avg_sqs, copies) -> None:
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if copies is not None:
        lists["copies"] = copies
        if len({copy.dtype for copy in copies} - {torch.float16, torch.bfloat16}) or len({c.dtype for c in copies}) > 1:
            raise ValueError("adamw_: copies must all be float16, or all bfloat16")
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_: {len(tensors)} {name} for {len(params)} params")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if name != "copies" and tensor.dtype != torch.float32:
                raise ValueError(f"adamw_: {name}[{i}] is {tensor.dtype}, must be float32")
            _check_like(f"{name}[{i}]", tensor, param, params[0].device)


def _check_like(name: str, tensor: torch.Tensor, param: torch.Tensor, device: torch.device) -> None:
    if tensor.shape != param.shape or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"adamw_: {name} is {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device},"
            f" must be {tuple(param.shape)}, contiguous, on {device}"
        )


def _check_scalar(name: str, tensor: torch.Tensor | None, dtypes: tuple[torch.dtype, ...], device: torch.device):
    if tensor is not None and (tensor.numel() != 1 or tensor.dtype not in dtypes or tensor.device != device):
        raise ValueError(
            f"adamw_: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device},"
            f" must be one {' or '.join(str(dtype) for dtype in dtypes)} on {device}"
        )


class AdamWTable:
    """Where weights, moments and copies lie, as the kernel reads it: made once, for as long as they stay there.

    An update then costs the host one launch, one copy to the GPU that nobody waits for, and per tensor some reading of
    addresses. Tensors that have moved are noticed, and the table is made anew.

    Args:
        params: float32, contiguous, of any size, starting anywhere.
        exp_avgs, exp_avg_sqs: the moments, like params.
        copies: all float16 or all bfloat16, of the same sizes, to be overwritten with the rounded weights; or None.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, in one line.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        exp_avgs: Sequence[torch.Tensor],
        exp_avg_sqs: Sequence[torch.Tensor],
        copies: Sequence[torch.Tensor] | None = None,
    ) -> None:
        _check_state(params, exp_avgs, exp_avg_sqs, copies)
        self._params, self._moments, self._copies = list(params), [*exp_avgs, *exp_avg_sqs], list(copies or ())
        self._has_copies = copies is not None
        self._make(self._places())

    def update(
        self,
        grads: Sequence[torch.Tensor],
        lrs: Sequence[float],
        eps: Sequence[float],
        weight_decays: Sequence[float],
        beta1: float,
        beta2: float,
        step: int,
        scale: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> None:
        """One step over all tensors; arguments as of `adamw_`. It bypasses torch's dispatcher."""
        self._check(grads, lrs, eps, weight_decays, step, scale, skip)
        places = self._places()
        if places != self._last_places:
            L = len(self._params)
            _check_state(self._params, self._moments[:L], self._moments[L:], self._copies if self._has_copies else None)
            self._make(places)
        if len(self._blocks_G2) == 0:
            return
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        rates = [(lr * decay, lr / correction1, e) for lr, decay, e in zip(lrs, weight_decays, eps, strict=True)]
        grads_L, rates_L3 = self._to_device([grad.data_ptr() for grad in grads], rates)
        adamw_kernel[(len(self._blocks_G2),)](
            self._blocks_G2,
            self._table_L5,
            grads_L,
            rates_L3,
            scale,
            skip,
            1 - beta1,
            1 - beta2,
            1 / math.sqrt(correction2),
            BLOCK=self._launch.block,
            GRAD=TRITON_DTYPE[grads[0].dtype],
            COPY=TRITON_DTYPE[self._copies[0].dtype] if self._copies else None,
            num_warps=self._launch.num_warps,
        )
        torch.autograd.graph.increment_version(self._params + self._moments + self._copies)

    def _places(self) -> list[int]:
        tensors = self._params + self._moments + self._copies
        return [x.data_ptr() for x in tensors] + [x.numel() for x in self._params]

    def _make(self, places: list[int]) -> None:
        self._last_places = places
        L, device = len(self._params), self._params[0].device if self._params else None
        rows_XL = torch.tensor(places, dtype=torch.int64).view(5 if self._copies else 4, L)
        copies_L = rows_XL[3] if self._copies else torch.zeros(L, dtype=torch.int64)  # which 16 divides
        sizes_L = rows_XL[-1]
        self._launch = pick("adamw", max((x.numel() for x in self._params), default=0), device)
        self._table_L5 = torch.stack((*rows_XL[:3], copies_L, sizes_L), dim=-1).to(device)
        self._blocks_G2 = _blocks(sizes_L, self._launch.block).to(device)

    def _check(self, grads, lrs, eps, weight_decays, step, scale, skip) -> None:
        L = len(self._params)
        for name, given in {"grads": grads, "lrs": lrs, "eps": eps, "weight_decays": weight_decays}.items():
            if len(given) != L:
                raise ValueError(f"adamw_: {len(given)} {name} for {L} params")
        if step < 1:
            raise ValueError(f"adamw_: step is {step}, the first update has 1")
        if L == 0:
            return
        dtypes, device = {grad.dtype for grad in grads}, self._params[0].device
        if len(dtypes) > 1 or not dtypes <= TRITON_DTYPE.keys():
            raise ValueError("adamw_: grads must all be float32, all float16 or all bfloat16")
        for i, (grad, param) in enumerate(zip(grads, self._params, strict=True)):
            _check_like(f"grads[{i}]", grad, param, device)
        _check_scalar("scale", scale, (torch.float32,), device)
        _check_scalar("skip", skip, (torch.bool, torch.int32), device)

    def _to_device(
        self, addresses: list[int], rates: list[tuple[float, float, float]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The addresses [L] and rates [L, 3] of one step, in one copy.

        Host and device memory are new ones: torch's allocators hand neither out again before the copy and the kernel
        that use it are done.
        """
        integers, floats = torch.tensor(addresses, dtype=torch.int64), torch.tensor(rates, dtype=torch.float32)
        words = torch.cat((integers.view(torch.int32), floats.flatten().view(torch.int32)))
        device = self._table_L5.device
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        split = 2 * len(addresses)
        return words[:split].view(torch.int64), words[split:].view(torch.float32)


def _blocks(sizes_L: torch.Tensor, block: int) -> torch.Tensor:
    """(tensor, its first element) of every block of `block` elements."""
    counts_L = (sizes_L + (block - 1)) // block
    tensor_G = torch.repeat_interleave(torch.arange(len(sizes_L)), counts_L)
    first_L = counts_L.cumsum(0) - counts_L
    within_G = torch.arange(len(tensor_G)) - first_L[tensor_G]
    return torch.stack((tensor_G, within_G * block), dim=-1)


@torch.library.custom_op("megagrow_kernels::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def _adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor],
    lrs: Sequence[float],
    eps: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    step: int,
    scale: torch.Tensor | None,
    skip: torch.Tensor | None,
) -> None:
    table = AdamWTable(params, exp_avgs, exp_avg_sqs, copies or None)  # a schema has no list or None
    table.update(grads, lrs, eps, weight_decays, beta1, beta2, step, scale, skip)


@_adamw_.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, copies, lrs, eps, weight_decays, beta1, beta2, step, scale, skip):
    return None


@torch.no_grad()
def adamw_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor] | None,
    lrs: Sequence[float],
    eps: Sequence[float],
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    step: int,
    scale: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """One step of AdamW on every tensor, in one launch; computed in float32.

    It makes a table of the tensors first, which waits for the GPU. Who updates the same tensors again and again keeps
    an `AdamWTable` of them and calls its `update`, which does not.

    Args:
        params, exp_avgs, exp_avg_sqs: float32, contiguous; overwritten.
        grads: all float32, all float16 or all bfloat16; contiguous.
        copies: all float16 or all bfloat16: overwritten with the rounded weights; or None.
        lrs, eps, weight_decays: of every tensor.
        beta1, beta2: of the moments.
        step: the number of this update, from 1.
        scale: one float32 on the device, with which gradients are multiplied first.
        skip: one bool or int32 on the device; unless it is 0, nothing is written.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, in one line.
    """
    _adamw_(
        params, grads, exp_avgs, exp_avg_sqs, copies or [], lrs, eps, weight_decays, beta1, beta2, step, scale, skip
    )

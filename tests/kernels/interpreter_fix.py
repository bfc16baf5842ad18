"""Mends what Triton's interpreter does with bfloat16, which is wrong in silence, for the tests.

It holds bfloat16 as uint16. Casts to it truncate instead of rounding to nearest even, and
arithmetic, comparisons, reductions and `tl.dot` work on the bit patterns. Here casts round as a GPU
does, `tl.dot` multiplies the values, and everything else is refused: a kernel upcasts on load.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import (
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
    _get_np_dtype,
)


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """The bfloat16 bit patterns of numbers, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Just under half a unit of the last place kept, or half of one where that place is odd.
    half = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((bits >> 16) & 1)
    with np.errstate(over="ignore"):
        kept = ((bits + half) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x0040).astype(np.uint16)
    return np.where(np.isnan(values), quiet_nan, kept).reshape(np.shape(values))


def install() -> None:
    """Changes the interpreter of this process; nothing is undone, so it wants one of its own."""
    InterpreterBuilder.cast_impl = _cast_instead(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp_instead(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot_instead(InterpreterBuilder.create_dot)
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt"):
        setattr(InterpreterBuilder, name, _refused(getattr(InterpreterBuilder, name), name))
    ReduceScanOpInterface.check_tensor = _check_tensor_instead(ReduceScanOpInterface.check_tensor)


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    return widened(handle.data) if _is_bfloat16(handle) else handle.data


def _cast_instead(cast_impl):
    def cast(self, src, dst_type):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(rounded(_values(src)), tl.bfloat16)
        return TensorHandle(_values(src).astype(_get_np_dtype(dst_type)), dst_type.scalar)

    return cast


def _fp_to_fp_instead(create_fp_to_fp):
    def fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return create_fp_to_fp(self, src, dst_type, rounding_mode)
        if dst_type.scalar == tl.bfloat16:
            toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
            return TensorHandle(rounded(_values(src), toward_zero), tl.bfloat16)
        return self.cast_impl(src, dst_type)

    return fp_to_fp


def _dot_instead(create_dot):
    def dot(self, a, b, d, *rest):
        a, b = (
            TensorHandle(widened(operand.data), tl.float32) if _is_bfloat16(operand) else operand for operand in (a, b)
        )
        return create_dot(self, a, b, d, *rest)

    return dot


def _refused(operation, name):
    def refusing(self, *args):
        if any(_is_bfloat16(arg) for arg in args):
            raise TypeError(f"{name} on bfloat16: upcast on load and compute in float32")
        return operation(self, *args)

    return refusing


def _check_tensor_instead(check_tensor):
    def check(self, tensors):
        check_tensor(self, tensors)
        if any(_is_bfloat16(tensor.handle) for tensor in tensors):
            raise TypeError("reduction of bfloat16: upcast on load and compute in float32")

    return check

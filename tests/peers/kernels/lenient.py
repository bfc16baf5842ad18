"""Lets Triton's interpreter run other people's kernels as they were shipped, in the process of this suite only.

`tests/kernels/interpreter_fix.py` refuses arithmetic on bfloat16, which our kernels have no business with. Theirs
multiply bfloat16, call libdevice, which the interpreter answers with None, and call `.to` on float arguments, which it
leaves Python floats. Here bfloat16 operands are widened and the result is rounded to nearest even, as a GPU does, and
float arguments are float32, as a GPU gets them. NumPy does not warn of what happens in lanes that are masked off.
"""

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.interpreter_fix import rounded, widened


def install() -> None:
    """On top of the fix, before Liger is imported: it takes libdevice's functions by name. Nothing is undone."""
    for name in ("binary_op", "unary_op"):
        setattr(InterpreterBuilder, name, _widening(getattr(InterpreterBuilder, name)))
    interpreter._implicit_cvt = _floats_too(interpreter._implicit_cvt)
    libdevice.log1p, libdevice.tanh = _elementwise(np.log1p), _elementwise(np.tanh)
    libdevice.rsqrt = _elementwise(lambda x: 1 / np.sqrt(x))
    np.seterr(all="ignore")


def _widening(operation):
    def widen(self, *args):
        *operands, function = args
        if all(operand.dtype.scalar != tl.bfloat16 for operand in operands):
            return operation(self, *args)
        result = function(*(widened(operand.data) for operand in operands))
        return TensorHandle(result if result.dtype == np.bool_ else rounded(result), tl.bfloat16)

    return widen


def _floats_too(convert):
    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    return converted


def _elementwise(function):
    def apply(x):
        return tl.tensor(TensorHandle(function(x.handle.data), x.handle.dtype), x.type)

    return apply

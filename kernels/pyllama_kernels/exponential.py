"""e^x of float32 to about one unit in the last place.

x = n ln 2 + r with a whole n; e^r by its Taylor series, and n goes to the exponent.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.simd import F32, I32, Asm, Value

_LANES = 16
# Added to a small number, this leaves no room for a fraction; the low bits of the sum are then n.
_ROUNDS = 1.5 * 2.0**23
# ln 2 in two parts, the first so short that n times it is exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH


def _exponential(asm: Asm, x: Value) -> Value:
    """For x from -87 to 88: a float32 or a vector of them."""

    def number(value: float) -> Value:
        return asm.constant(x.type, value)

    vector = isinstance(x.type, ir.VectorType)
    integers = ir.VectorType(I32, x.type.count) if vector else I32
    shifted = asm.fused(x, number(1 / math.log(2)), number(_ROUNDS))
    n = shifted - number(_ROUNDS)
    r = asm.fused(n, number(-_LN2_LOW), asm.fused(n, number(-_LN2_HIGH), x))
    series = number(1 / math.factorial(7))
    for degree in range(6, -1, -1):
        series = asm.fused(series, r, number(1 / math.factorial(degree)))
    exponent = shifted.bits_as(integers) << asm.constant(integers, 23)
    return (series.bits_as(integers) + exponent).bits_as(x.type)


def _from(asm: Asm, x: Value, least: float) -> tuple[Value, Any]:
    """x, but where it is below `least`, and whether it was."""
    bound = asm.constant(x.type, least)
    below = asm.builder.fcmp_ordered("<", x.llvm, bound.llvm)
    return Value(asm, asm.builder.select(below, bound.llvm, x.llvm)), below


@intrinsic
def _exp(typingctx, x):
    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        bounded, tiny = _from(asm, Value(asm, args[0]), -87.0)
        most = asm.constant(F32, 88.0).llvm
        huge = builder.fcmp_ordered(">", args[0], most)
        bounded = Value(asm, builder.select(huge, most, bounded.llvm))
        result = _exponential(asm, bounded).llvm
        result = builder.select(tiny, asm.constant(F32, 0.0).llvm, result)
        return builder.select(huge, asm.constant(F32, math.inf).llvm, result)

    return types.float32(types.float32), codegen


@intrinsic
def _exp_of_differences(typingctx, address, top, count):
    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        address, top, count = (Value(asm, value) for value in args)
        kind = ir.VectorType(F32, _LANES)
        total = asm.variable(asm.constant(kind, 0.0))
        with asm.loop(count) as i:
            place = address.plus(i, 4 * _LANES)
            bounded, tiny = _from(asm, asm.load(kind, place) - asm.splat(top, _LANES), -87.0)
            zero = asm.constant(kind, 0.0).llvm
            result = Value(asm, builder.select(tiny, zero, _exponential(asm, bounded).llvm))
            asm.store(result, place)
            total.set(total.get() + result)
        return total.get().sum_across().llvm

    return types.float32(types.int64, types.float32, types.int64), codegen


@exact_kernel
def exp(x: Any) -> Any:
    """e^x; 0 below -87, infinity above 88."""
    return _exp(x)


@exact_kernel
def exp_of_differences(address: int, top: Any, vectors: int) -> Any:
    """Replaces 16 * vectors float32 by e^(x - top), where no x is above top; returns their sum."""
    return _exp_of_differences(address, top, vectors)

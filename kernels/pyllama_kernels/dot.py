"""The dot product of two float32 vectors.

Its order of addition is written down, so that every CPU that fuses a product with a sum, which is
nearly every one, finds the same result to the bit: nodes of different kinds then choose the same
experts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.lowlevel import float32_pointer
from pyllama_kernels.simd import F32, Asm, Value

_LANES = 16
_SUMS = 4  # vectors of sums: one alone would wait for itself at every step
_STEP = _LANES * _SUMS  # products of a step


@intrinsic
def _dot_steps(typingctx, a, b, steps):
    """The sum of 64 * steps products. Addresses and a number."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        a, b, steps = (Value(asm, value) for value in args)
        kind = ir.VectorType(F32, _LANES)
        sums = [asm.variable(asm.constant(kind, 0.0)) for _ in range(_SUMS)]
        with asm.loop(steps) as step:
            first, second = a.plus(step, 4 * _STEP), b.plus(step, 4 * _STEP)
            for i, total in enumerate(sums):
                one, other = (asm.load(kind, line, 4 * _LANES * i) for line in (first, second))
                total.set(asm.fused(one, other, total.get()))
        low, high = (sums[i].get() + sums[i + 1].get() for i in (0, 2))
        return (low + high).sum_across().llvm

    return types.float32(types.int64, types.int64, types.int64), codegen


@exact_kernel
def dot(a: int, b: int, n: int) -> Any:
    """The sum of n products of float32 that lie one after the other at two addresses."""
    steps = n // _STEP
    total = _dot_steps(a, b, steps)
    one, other = carray(float32_pointer(a), (n,)), carray(float32_pointer(b), (n,))
    for i in range(steps * _STEP, n):
        total += one[i] * other[i]
    return total

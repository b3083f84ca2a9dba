"""Quantizes one Q80 block: 32 float32 to 32 int8 and a scale.

The bytes are those of the converter (`blocks.quantize_q80`) on every CPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.extending import intrinsic

from pyllama_kernels.halves import float_to_half
from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.lowlevel import address_of, float_of_bits
from pyllama_kernels.simd import F32, I8, I32, Asm, Value

_LANES = 16
_FLOATS, _INTEGERS = ir.VectorType(F32, _LANES), ir.VectorType(I32, _LANES)
# Added to a small number, this leaves no room for a fraction: it rounds to the nearest even.
_ROUNDS = 1.5 * 2.0**23


@intrinsic
def _largest_bits(typingctx, address):
    """The bits of the largest magnitude of 32 float32."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        no_sign = asm.constant(_INTEGERS, 0x7FFFFFFF)
        # Magnitudes are in the order of their bits.
        halves = [
            (asm.load(_INTEGERS, Value(asm, args[0]), 64 * i) & no_sign).across("umax").llvm
            for i in range(2)
        ]
        return builder.select(builder.icmp_unsigned(">", *halves), *halves)

    return types.uint32(types.int64), codegen


@intrinsic
def _round_block(typingctx, source, inverse, target):
    """Writes 32 float32 times `inverse` as int8; returns their sum. Addresses and a float32."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        source, inverse, target = (Value(asm, value) for value in args)
        factor, rounds = asm.splat(inverse, _LANES), asm.constant(_FLOATS, _ROUNDS)
        total = None
        for i in range(2):
            scaled = asm.load(_FLOATS, source, 64 * i) * factor
            whole = (scaled + rounds - rounds).as_integers()
            asm.store(whole.narrowed(ir.VectorType(I8, _LANES)), target, _LANES * i)
            total = whole if total is None else total + whole
        return total.across("add").llvm

    return types.int32(types.int64, types.float32, types.int64), codegen


@exact_kernel
def _scale(largest: Any) -> Any:
    """A block's scale and its inverse: 0 if there is none."""
    d = largest / float32(127)
    inverse = float32(1) / d
    return d, inverse if inverse < float32(np.inf) else float32(0)


@exact_kernel
def round_block(x: Any, target: int) -> Any:
    """Rounds a block.

    Args:
        x: [32] float32.
        target: address of 32 int8, written.

    Returns:
        The bits of the scale as float16, and the sum of the 32 int8.
    """
    source = address_of(x)
    d, inverse = _scale(float_of_bits(_largest_bits(source)))
    return float_to_half(d), _round_block(source, inverse, target)

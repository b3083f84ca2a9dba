"""NEON: every 64-bit ARM, such as a Raspberry Pi 4.

`smlal` multiplies eight bytes with eight others and adds the products to int16. A product is at
most 15 * 127, so that eight of them fit; then neighbours are added in pairs, twice.
"""

from collections.abc import Sequence

from llvmlite import ir

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I16, I32, Asm, Value

_WORDS, _SUMS = ir.VectorType(I16, 8), ir.VectorType(I32, 4)
_LOW, _HIGH = range(8), range(8, 16)


def nibble_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`."""
    low = high = asm.constant(_WORDS, 0)
    for i, quad in enumerate(quads):
        products = _products(asm, quad, x, i)
        low, high = low + products[0], high + products[1]
    return start + _neighbours(asm, _pairs(asm, low), _pairs(asm, high))


def byte_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`. A product of two bytes leaves no room in int16 for a second one."""
    low = high = asm.constant(_SUMS, 0)
    for i, quad in enumerate(quads):
        products = _products(asm, quad, x, i)
        low, high = low + _pairs(asm, products[0]), high + _pairs(asm, products[1])
    return start + _neighbours(asm, low, high)


def _products(asm: Asm, quad: Value, x: Value, i: int) -> tuple[Value, Value]:
    """Products as int16: those of rows 0 and 1, those of rows 2 and 3; four inputs each."""
    inputs = asm.splat(asm.load(I32, x, 4 * i), 4).bits_as(quad.type)
    few = inputs.part(*_LOW).widened(_WORDS, signed=True)
    low = quad.part(*_LOW).widened(_WORDS, signed=True) * few
    return low, quad.part(*_HIGH).widened(_WORDS, signed=True) * few


def _pairs(asm: Asm, words: Value) -> Value:
    return asm.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", _SUMS, words)


def _neighbours(asm: Asm, low: Value, high: Value) -> Value:
    return asm.call("llvm.aarch64.neon.addp.v4i32", _SUMS, low, high)


ISA = InstructionSet(
    name="neon",
    features=("neon",),
    lanes=4,
    sums=16,
    nibble_dots=nibble_dots,
    byte_dots=byte_dots,
)
matmul_q40 = make_matmul_q40(ISA)

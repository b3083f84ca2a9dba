"""AVX2: nearly every x86 machine since 2013.

`vpmaddubsw` multiplies 32 unsigned bytes with 32 signed ones and adds pairs to int16. A pair is at
most 2 * 15 * 127, so that eight of them fit before `vpmaddwd` adds neighbours to int32.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I16, I32, Asm, Value

_PAIRS = ir.VectorType(I16, 16)


def nibble_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`."""
    pairs = asm.constant(_PAIRS, 0)
    for i, quad in enumerate(quads):
        inputs = asm.splat(asm.load(I32, x, 4 * i), 8).bits_as(quad.type)
        pairs += asm.call("llvm.x86.avx2.pmadd.ub.sw", _PAIRS, quad, inputs)
    return start + _neighbours(asm, pairs, start.type)


def byte_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`. The bytes' signs go over to the inputs: |a| * (sign(a) * b) = a * b."""
    total = start
    for i, quad in enumerate(quads):
        inputs = asm.splat(asm.load(I32, x, 4 * i), 8).bits_as(quad.type)
        signed = asm.call("llvm.x86.avx2.psign.b", quad.type, inputs, quad)
        magnitudes = asm.call("llvm.x86.avx2.psign.b", quad.type, quad, quad)
        pairs = asm.call("llvm.x86.avx2.pmadd.ub.sw", _PAIRS, magnitudes, signed)
        total += _neighbours(asm, pairs, start.type)
    return total


def _neighbours(asm: Asm, pairs: Value, kind: Any) -> Value:
    return asm.call("llvm.x86.avx2.pmadd.wd", kind, pairs, asm.constant(_PAIRS, 1))


ISA = InstructionSet(
    name="avx2",
    features=("avx2", "f16c", "fma"),
    lanes=8,
    sums=8,
    nibble_dots=nibble_dots,
    byte_dots=byte_dots,
)
matmul_q40 = make_matmul_q40(ISA)

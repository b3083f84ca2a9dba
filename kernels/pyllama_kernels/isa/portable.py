"""No instruction set in particular: LLVM makes of plain vector arithmetic what the CPU has."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I8, I16, I32, Asm, Value


def nibble_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`. Eight products of a byte 0 to 15 with an int8 fit into int16."""
    return start + _dots(asm, quads, x, I16)


def byte_dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`."""
    return start + _dots(asm, quads, x, I32)


def _dots(asm: Asm, quads: Sequence[Value], x: Value, integer: Any) -> Value:
    rows = quads[0].type.count // 4
    wide = ir.VectorType(integer, 4 * rows)
    products = asm.constant(wide, 0)
    for i, quad in enumerate(quads):
        inputs = asm.load(ir.VectorType(I8, 4), x, 4 * i).part(*[0, 1, 2, 3] * rows)
        products += quad.widened(wide, signed=True) * inputs.widened(wide, signed=True)
    sums = ir.VectorType(I32, rows)
    total = asm.constant(sums, 0)
    for part in range(4):
        lanes = products.part(*range(part, 4 * rows, 4))
        total += lanes if integer is I32 else lanes.widened(sums, signed=True)
    return total


ISA = InstructionSet(
    name="portable",
    features=(),
    lanes=4,
    sums=8,
    nibble_dots=nibble_dots,
    byte_dots=byte_dots,
    halves=False,
)
matmul_q40 = make_matmul_q40(ISA)

"""NEON with dotprod: Raspberry Pi 5, Apple and server ARM since 2018.

`sdot` multiplies 16 signed bytes with 16 others and adds each four products to an int32: the four
inputs of 4 rows in one instruction.
"""

from collections.abc import Sequence

from llvmlite import ir

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I32, Asm, Value

_QUADS = ir.VectorType(I32, 4)


def dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`."""
    total = start
    for i, quad in enumerate(quads):
        # The instruction takes one lane of a register for all rows: 16 inputs are loaded at once.
        lane = asm.load(_QUADS, x, 16 * (i // 4)).part(*[i % 4] * 4)
        inputs = lane.bits_as(quad.type)
        total = asm.call("llvm.aarch64.neon.sdot.v4i32.v16i8", _QUADS, total, quad, inputs)
    return total


ISA = InstructionSet(
    name="neon_dotprod",
    features=("neon", "dotprod"),
    lanes=4,
    sums=16,
    nibble_dots=dots,
    byte_dots=dots,
)
matmul_q40 = make_matmul_q40(ISA)

"""AVX-512 VNNI: Intel since Ice Lake, AMD since Zen 4.

`vpdpbusd` multiplies 64 unsigned bytes with 64 signed ones and adds each four products to an int32:
the four inputs of 16 rows in one instruction.
"""

from collections.abc import Sequence

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I32, Asm, Value


def nibble_dots(asm: Asm, quads: Sequence[Value], x: Value, offset: Value) -> Value:
    """See `InstructionSet`. For 16 rows, or for 8 in half a register."""
    total, lanes = offset, offset.type.count
    for i, quad in enumerate(quads):
        inputs = asm.splat(asm.load(I32, x, 4 * i), lanes)
        quad = quad.bits_as(total.type)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        total = asm.call(name, total.type, total, quad, inputs)
    return total


def byte_dots(asm: Asm, quads: Sequence[Value], x: Value, offset: Value) -> Value:
    """See `InstructionSet`. A byte plus 128 is unsigned; 128 times the inputs' sum goes again."""
    unsigned = [quad ^ asm.constant(quad.type, -128) for quad in quads]
    return nibble_dots(asm, unsigned, x, offset << asm.constant(offset.type, 4))


ISA = InstructionSet(
    name="avx512_vnni",
    features=("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"),
    lanes=16,
    sums=16,
    nibble_dots=nibble_dots,
    byte_dots=byte_dots,
)
matmul_q40 = make_matmul_q40(ISA)

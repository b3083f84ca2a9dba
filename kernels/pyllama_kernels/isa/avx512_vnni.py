"""AVX-512 VNNI: Intel since Ice Lake, AMD since Zen 4.

`vpdpbusd` multiplies 64 unsigned bytes with 64 signed ones and adds each four products to an int32:
the four inputs of 16 rows in one instruction. Bytes with a sign are taken plus 128.
"""

from collections.abc import Sequence

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I32, Asm, Value


def dots(asm: Asm, quads: Sequence[Value], x: Value, start: Value) -> Value:
    """See `InstructionSet`. For 16 rows, or for 8 in half a register."""
    total, lanes = start, start.type.count
    for i, quad in enumerate(quads):
        inputs = asm.splat(asm.load(I32, x, 4 * i), lanes)
        quad = quad.bits_as(total.type)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        total = asm.call(name, total.type, total, quad, inputs)
    return total


ISA = InstructionSet(
    name="avx512_vnni",
    features=("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"),
    lanes=16,
    sums=16,
    nibble_dots=dots,
    byte_dots=dots,
    bias=128,
)
matmul_q40 = make_matmul_q40(ISA)

"""AVX-VNNI: `vpdpbusd` on 256 bits, for CPUs without AVX-512 (Intel since Alder Lake, AMD Zen 5).

The four inputs of 8 rows in one instruction: see `avx512_vnni`.
"""

from collections.abc import Sequence

from pyllama_kernels.matrix import InstructionSet, make_matmul_q40
from pyllama_kernels.simd import I32, Asm, Value


def nibble_dots(asm: Asm, quads: Sequence[Value], x: Value, offset: Value) -> Value:
    """See `InstructionSet`."""
    total = offset
    for i, quad in enumerate(quads):
        inputs = asm.splat(asm.load(I32, x, 4 * i), 8)
        quad = quad.bits_as(total.type)
        total = asm.call("llvm.x86.avx512.vpdpbusd.256", total.type, total, quad, inputs)
    return total


def byte_dots(asm: Asm, quads: Sequence[Value], x: Value, offset: Value) -> Value:
    """See `InstructionSet`. A byte plus 128 is unsigned; 128 times the inputs' sum goes again."""
    unsigned = [quad ^ asm.constant(quad.type, -128) for quad in quads]
    return nibble_dots(asm, unsigned, x, offset << asm.constant(offset.type, 4))


ISA = InstructionSet(
    name="avx_vnni",
    features=("avx2", "avxvnni", "f16c", "fma"),
    lanes=8,
    sums=8,
    nibble_dots=nibble_dots,
    byte_dots=byte_dots,
)
matmul_q40 = make_matmul_q40(ISA)

"""AVX-VNNI: `vpdpbusd` on 256 bits, for CPUs without AVX-512 (Intel since Alder Lake, AMD Zen 5).

The four inputs of 8 rows in one instruction: see `avx512_vnni`.
"""

from pyllama_kernels.isa.avx512_vnni import dots
from pyllama_kernels.matrix import InstructionSet, make_matmul_q40

ISA = InstructionSet(
    name="avx_vnni",
    features=("avx2", "avxvnni", "f16c", "fma"),
    lanes=8,
    sums=8,
    nibble_dots=dots,
    byte_dots=dots,
    bias=128,
)
matmul_q40 = make_matmul_q40(ISA)

"""Each set of kernels becomes the instructions it is written for, and none that its CPU lacks."""

import json
import os
import re
import subprocess
import sys

import pytest
from llvmlite import binding, ir

from pyllama_kernels.cpu import host, load
from pyllama_kernels.simd import I8, I32, I64, Asm, Value

# Compiles the matrix kernel in a process of its own: Numba's target CPU is one for a process.
_COMPILE = """
import json, sys
from numba import float32, int64, uint8
from pyllama_kernels.cpu import choose, load

matmul = load(sys.argv[1]).matmul_q40
matmul.compile((uint8[::1], int64, uint8[:, :, ::1], float32[::1], float32[:, ::1]))
print(json.dumps([choose().name, *matmul.inspect_asm().values()]))
"""

pytestmark = pytest.mark.slow

_NONE = r"(?!)"  # matches nowhere
_VEX = r"^\s+(\{\w+\}\s*)?v[a-z]|%[yz]mm"  # what came with AVX or later

_X86 = [
    ("avx512_vnni", "icelake-server", r"vpdpbusd\s.*%zmm", r"tdpbf16ps"),
    ("avx_vnni", "alderlake", r"\{vex\}\s+vpdpbusd\s.*%ymm", r"%zmm"),
    ("avx2", "haswell", r"vpmaddubsw\s.*%ymm", r"%zmm|vpdpbusd"),
    ("portable", "generic", r"pmull|pmadd", _VEX + "|pmaddubsw"),
]
_ARM = [
    ("neon_dotprod", "cortex-a76", r"\bsdot\b", _NONE),
    ("neon", "cortex-a72", r"\bsmlal2?\b", r"\bsdot\b"),
]

x86 = pytest.mark.skipif(host().machine != "x86_64", reason="needs an x86-64 machine")
arm = pytest.mark.skipif(host().machine != "aarch64", reason="needs an aarch64 machine")


@pytest.fixture
def compiled(tmp_path):
    """The kernels that a CPU gets by itself, and the assembly of `matmul_q40` for it."""

    def compile_for(kernels: str, cpu: str) -> tuple[str, str]:
        changed = {
            "NUMBA_CPU_NAME": cpu,
            "NUMBA_CPU_FEATURES": "",
            "PYLLAMA_DIST_CACHE_DIR": str(tmp_path),  # nothing compiled lies there yet
            "PYLLAMA_KERNELS": "",
        }
        command = [sys.executable, "-c", _COMPILE, kernels]
        done = subprocess.run(command, env=os.environ | changed, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        chosen, *assembly = json.loads(done.stdout)
        assert assembly
        return chosen, "\n".join(assembly)

    return compile_for


def found(pattern: str, assembly: str) -> list[str]:
    return [line for line in assembly.splitlines() if re.search(pattern, line)]


@pytest.mark.parametrize(
    ("kernels", "cpu", "wanted", "missing"),
    [
        *(pytest.param(*row, marks=x86) for row in _X86),
        *(pytest.param(*row, marks=arm) for row in _ARM),
    ],
)
def test_a_cpu_gets_its_kernels_and_no_instruction_that_it_lacks(
    compiled, kernels, cpu, wanted, missing
):
    chosen, assembly = compiled(kernels, cpu)
    assert chosen == kernels
    assert found(wanted, assembly)
    assert not found(missing, assembly)


@x86
def test_amx_multiplies_tiles(compiled):
    _, assembly = compiled("amx", "sapphirerapids")
    assert found(r"\btdpbf16ps\b", assembly)


@pytest.mark.parametrize(("kernels", "cpu", "wanted", "missing"), _ARM)
def test_arm_instructions_from_any_machine(kernels, cpu, wanted, missing):
    """The same for the heart of the ARM kernels, which LLVM compiles for ARM wherever it runs."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM compiles only for its own machine")
    module = ir.Module()
    module.triple = "aarch64-linux-gnu"
    lanes = ir.VectorType(I32, 4)
    function = ir.Function(module, ir.FunctionType(lanes, [I64, I64, lanes]), "dots")
    builder = ir.IRBuilder(function.append_basic_block())
    asm = Asm(builder)
    weights, x, start = (Value(asm, argument) for argument in function.args)
    quads = [asm.load(ir.VectorType(I8, 16), weights, 16 * i) for i in range(8)]
    builder.ret(load(kernels).ISA.nibble_dots(asm, quads, x, start).llvm)
    machine = target.create_target_machine(cpu=cpu)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    assert len(found(wanted, assembly)) >= 8  # one for each vector of weights
    assert not found(missing, assembly)

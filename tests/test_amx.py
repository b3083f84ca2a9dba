"""The kernel made of AMX's tiles: on a CPU that has them, or else emulated (`amx_emulation`).

It runs in a process of its own, because that compiles for a CPU with AMX whatever this one is.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pyllama_kernels import reference
from pyllama_kernels.blocks import dequantize_q40, quantize_q40
from pyllama_kernels.cpu import PORTABLE, choose, host
from pyllama_kernels.isa.amx import LEAST
from pyllama_kernels.layout import activation_bytes, pack_weights, unpack_activations

TILES = {"amx-tile", "amx-bf16"}
F32 = np.float32


def lacks() -> set[str] | None:
    """What this machine lacks of what AMX's kernel needs; None: it can run none of it."""
    if sys.platform != "linux" or host().machine != "x86_64":
        return None
    (amx,) = (found for found in choose(PORTABLE).candidates if found.name == "amx")
    return TILES if amx.refused else set(amx.lacks)


LACKS = lacks()
pytestmark = [
    pytest.mark.slow,  # compiles afresh
    pytest.mark.skipif(LACKS is None, reason="needs Linux on x86-64"),
    pytest.mark.skipif(
        bool((LACKS or set()) - TILES),
        reason=f"AMX can be emulated here, but not {', '.join(sorted((LACKS or set()) - TILES))}",
    ),
]

# Before each program: argv is whether to emulate, the file of inputs, the file for the outputs.
_START = """
import sys
import numpy as np
from pyllama_kernels.cpu import choose
emulated, given, found = sys.argv[1] == "emulated", np.load(sys.argv[2]), {}
choose()  # asks the system for AMX, where it can give that
if emulated:
    import amx_emulation
    amx_emulation.install()
"""

_PRODUCTS = """
from pyllama_kernels.isa import amx, avx512_vnni

def product(kernels, case, cuts):
    # As the op loop cuts a matrix among threads, into part of a wider array.
    x, w, bias, (rows, m) = (given[f"{case}.{name}"] for name in ("x", "w", "bias", "shape"))
    wide = np.full((rows, m + 5), np.nan, np.float32)
    out = wide[:, 2 : 2 + m]
    for a, z in zip([0, *cuts], [*cuts, len(w)]):
        part = slice(16 * a, min(m, 16 * z))
        kernels.matmul_q40(x, rows, w[a:z], bias[part], out[:, part])
    return wide

for case in range(given["cases"]):
    groups = len(given[f"{case}.w"])
    found[f"{case}.whole"] = product(amx, case, [])
    found[f"{case}.two"] = product(amx, case, [groups // 2])
    found[f"{case}.each"] = product(amx, case, range(1, groups))
    found[f"{case}.bytes"] = product(avx512_vnni, case, [])
found["emulated"] = amx_emulation.products() if emulated else 0
found["assembly"] = "\\n".join(amx.matmul_q40.inspect_asm().values())
np.savez(sys.argv[3], **found)
"""

_INSTRUCTIONS = """
import ctypes
from llvmlite import binding

binding.initialize_native_target()
binding.initialize_native_asmprinter()
binding.initialize_native_asmparser()
target = binding.Target.from_default_triple()
machine = target.create_target_machine(features="+amx-tile,+amx-bf16")
engine = binding.create_mcjit_compiler(binding.parse_assembly(str(given["program"])), machine)
engine.finalize_object()

def call(name, *arrays):
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arrays))
    function(engine.get_function_address(name))(*[array.ctypes.data for array in arrays])

for case in range(given["cases"]):
    sums = given[f"{case}.sums"]
    call("product", given["shapes"], given[f"{case}.a"], given[f"{case}.b"], sums)
    found[f"{case}.sums"] = sums
memory = given["memory"]
for i in range(given["addresses"]):
    out = np.zeros((2, 8), np.uint8)
    call(f"address_{i}", given["shapes"], memory[4096:], out)
    found[f"address_{i}"] = out
np.savez(sys.argv[3], **found)
call("stranger")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program: what it found, and its exit status."""

    def run_program(program: str, given: dict[str, object]) -> tuple[dict[str, np.ndarray], int]:
        folder = tmp_path_factory.mktemp("amx")
        inputs, outputs = folder / "given.npz", folder / "found.npz"
        np.savez(inputs, **given)
        flags = [flag for flag in host().flags.split(",") if flag and flag[1:] not in TILES]
        changed = {
            "NUMBA_CPU_NAME": host().target,
            "NUMBA_CPU_FEATURES": ",".join([*flags, *(f"+{name}" for name in sorted(TILES))]),
            "PYLLAMA_DIST_CACHE_DIR": str(folder),  # nothing compiled lies there yet
            "PYLLAMA_KERNELS": "",
            "MALLOC_PERTURB_": "1",  # glibc's new memory is full of 0xFE: no zeros by chance
            "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        how = "emulated" if LACKS else "native"
        done = subprocess.run(
            [sys.executable, "-c", _START + program, how, inputs, outputs],
            env=os.environ | changed,
            check=False,
            capture_output=True,
            timeout=220,
        )
        assert outputs.exists(), done.stderr.decode()[-2000:]
        return dict(np.load(outputs)), done.returncode

    return run_program


# --- the kernel


@dataclass(frozen=True)
class Case:
    """A product, with random numbers."""

    rows: int
    m: int
    n: int
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.rows}x{self.m}x{self.n}"

    @property
    def blocks(self) -> np.ndarray:
        """[m, n / 32, 18] uint8; scales of very different sizes."""
        rng = np.random.default_rng(self.m)
        values = rng.standard_normal((self.m, self.n // 32, 32), F32)
        values *= np.exp(rng.uniform(-6, 3, (self.m, self.n // 32, 1))).astype(F32)
        return quantize_q40(values)

    def given(self) -> dict[str, object]:
        rng = np.random.default_rng(self.rows)
        # What the tiles hold beside the batch is never to be seen.
        x = np.full(activation_bytes(self.rows, self.n), 0xFF, np.uint8)
        reference.quantize(rng.standard_normal((self.rows, self.n), F32), x)
        bias = rng.standard_normal(self.m if self.bias else 0, F32)
        w = pack_weights(self.blocks)
        return {"x": x, "w": w, "bias": bias, "shape": np.array([self.rows, self.m])}


FEW = [Case(1, 40, 64), Case(4, 17, 96), Case(LEAST - 1, 33, 64)]
MANY = [
    Case(LEAST, 1, 32),
    Case(LEAST, 33, 64, bias=False),
    Case(25, 40, 0),  # as of a node that holds no block of an FFN
    Case(26, 18, 0, bias=False),
    Case(32, 16, 32),
    Case(36, 47, 544),  # chunks of 16 blocks: one and a bit
    Case(31, 64, 512, bias=False),
    Case(33, 15, 1056),
    Case(48, 31, 96),
    Case(70, 300, 128),  # 19 groups: more than are taken at a time
    Case(530, 20, 64),  # and more rows
]
CASES = FEW + MANY


@pytest.fixture(scope="module")
def products(run):
    given = {f"{i}.{name}": a for i, case in enumerate(CASES) for name, a in case.given().items()}
    found, status = run(_PRODUCTS, given | {"cases": len(CASES)})
    assert status == 0
    return found


def numbers(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [rows, n], weights [m, n] and bias [m] or [1], float64."""
    given = case.given()
    x = unpack_activations(given["x"], case.rows, case.n)
    w = dequantize_q40(case.blocks.reshape(case.m, -1))
    bias = given["bias"] if case.bias else np.zeros(1)
    return x.astype(np.float64), w.astype(np.float64), bias.astype(np.float64)


def bf16(x: np.ndarray) -> np.ndarray:
    """To 8 bits, halves away from zero."""
    mantissa, exponent = np.frexp(x)
    rounded = np.floor(np.abs(mantissa) * 256 + 0.5) / 256
    return np.ldexp(np.copysign(rounded, mantissa), exponent)


def result(products, case: Case, how: str = "whole") -> np.ndarray:
    return products[f"{CASES.index(case)}.{how}"][:, 2 : 2 + case.m]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_the_product_is_as_near_as_two_rounded_factors_allow(products, case):
    x, w, bias = numbers(case)
    error = np.abs(result(products, case) - (x @ w.T + bias))
    assert (error <= 2.0**-8 * (np.abs(x) @ np.abs(w).T) + 2.0**-23 * np.abs(bias)).all()


@pytest.mark.parametrize("case", MANY, ids=str)
def test_nothing_but_the_factors_is_rounded_to_bf16(products, case):
    x, w, bias = numbers(case)
    x, w = bf16(x), bf16(w)
    error = np.abs(result(products, case) - (x @ w.T + bias))
    assert (error <= 2.0**-19 * (np.abs(x) @ np.abs(w).T + np.abs(bias))).all()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_few_rows_are_multiplied_as_bytes(products, case):
    np.testing.assert_array_equal(result(products, case), result(products, case, "bytes"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_shares_give_the_same_bits_and_touch_nothing_else(products, case):
    i = CASES.index(case)
    whole = products[f"{i}.whole"]
    assert np.isnan(whole[:, :2]).all()
    assert np.isnan(whole[:, 2 + case.m :]).all()
    for how in ("two", "each"):
        np.testing.assert_array_equal(products[f"{i}.{how}"].view(np.uint32), whole.view(np.uint32))


def test_the_inner_loop_loads_no_more_tiles_than_it_multiplies(products):
    code = re.split(r"^\S+:$", str(products["assembly"]), flags=re.MULTILINE)
    loops = [part for part in code if "tdpbf16ps" in part]
    assert loops
    for part in loops:
        multiplied = part.count("tdpbf16ps")
        assert multiplied % 4 == 0
        assert part.count("tileloadd") <= multiplied + 4  # with the four tiles of sums


@pytest.mark.skipif(not LACKS, reason="this CPU has AMX")
def test_the_tiles_were_emulated(products):
    assert products["emulated"] > 0


# --- the instructions

PRODUCT = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tileloaddt164(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tilerelease()
declare void @llvm.trap()

define void @product(ptr %shapes, ptr %a, ptr %b, ptr %sums) {
  call void @llvm.x86.ldtilecfg(ptr %shapes)
  call void @llvm.x86.tileloadd64(i8 3, ptr %sums, i64 8)
  call void @llvm.x86.tileloadd64(i8 5, ptr %a, i64 8)
  call void @llvm.x86.tileloaddt164(i8 7, ptr %b, i64 8)
  call void @llvm.x86.tdpbf16ps(i8 3, i8 5, i8 7)
  call void @llvm.x86.tilestored64(i8 3, ptr %sums, i64 8)
  call void @llvm.x86.tilezero(i8 3)
  %after = getelementptr i8, ptr %sums, i64 16
  call void @llvm.x86.tilestored64(i8 3, ptr %after, i64 8)
  call void @llvm.x86.tilerelease()
  ret void
}

define void @stranger() {
  call void @llvm.trap()
  ret void
}
"""

# A tile of two rows of eight bytes is read from memory as this says; `start` is in the first
# register, 24 in the second.
ADDRESS = """
define void @address_{i}(ptr %shapes, ptr %start, ptr %out) {{
  call void @llvm.x86.ldtilecfg(ptr %shapes)
  call void asm sideeffect "tileloadd {operand}, %tmm3", "{{{base}}},{{{index}}},~{{memory}}"
    (ptr %start, i64 24)
  call void @llvm.x86.tilestored64(i8 3, ptr %out, i64 8)
  call void @llvm.x86.tilerelease()
  ret void
}}
"""

# Operand, its two registers, and where the two rows begin.
ADDRESSES = [
    ("(%rsi,%rdx)", "rsi", "rdx", (0, 24)),
    ("64(%rdi,%rcx)", "rdi", "rcx", (64, 88)),
    ("-128(%rax,%rbx,2)", "rax", "rbx", (-128, -80)),
    ("1000(%rsi,%rdx,4)", "rsi", "rdx", (1000, 1096)),
    ("-1000(%r12,%r9,8)", "r12", "r9", (-1000, -808)),
    ("(%r13,%r15)", "r13", "r15", (0, 24)),
    ("8(%r10,%r12)", "r10", "r12", (8, 32)),
    ("16(%rsi)", "rsi", "rdx", (16, 16)),
]

ONE = np.ones((2, 4))
# Activations [2, 4], weights [4, 2] and sums [2, 2] before and after, multiplied by hand.
BY_HAND = {
    "numbers": (
        [[1, 2, 3, 4], [-1, 0.5, 0, 8]],
        [[1, 10], [2, 20], [3, 30], [4, 40]],
        [[100, 200], [300, 400]],
        [[130, 500], [332, 720]],
    ),
    # In the first column 2^24 + 1 is rounded to even; the odd inputs give 2 together. One after
    # the other, 2^24 would swallow three ones. In the second, it does not come before the sum.
    "order of sums": (
        ONE,
        [[2.0**24, 1], [1, 1], [1, 1], [1, 1]],
        [[0, 2.0**24], [1, 0]],
        [[2.0**24 + 2, 2.0**24 + 4], [2.0**24 + 4, 4]],
    ),
    # Times 2^120 the least denormal bf16 is 2^-13; 2^-127 is denormal as a product, and as a sum.
    "denormal numbers": (
        [[2.0**-133, 0, 0, 0], [2.0**-63, 0, 0, 0]],
        [[2.0**120, 2.0**-64], [0, 0], [0, 0], [0, 0]],
        [[0, 2.0**-127], [1, 0]],
        [[0, 0], [1 + 2.0**57, 0]],
    ),
}


def bits(values: object) -> np.ndarray:
    """Numbers that are bf16, as such."""
    return (np.array(values, F32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def instructions(run):
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2], shapes[48:56] = 8, 2
    given = {"shapes": shapes, "cases": len(BY_HAND), "addresses": len(ADDRESSES)}
    for i, (a, b, before, _) in enumerate(BY_HAND.values()):
        # [4, 2] to [2, 2, 2]: inputs 2k and 2k + 1 of a column lie side by side
        pairs = np.array(b, F32).reshape(2, 2, 2).transpose(0, 2, 1)
        sums = np.full((4, 2), np.nan, F32)
        sums[:2] = before
        given |= {f"{i}.a": bits(a), f"{i}.b": bits(pairs), f"{i}.sums": sums}
    given["memory"] = np.random.default_rng(0).integers(0, 256, 8192, np.uint8)
    program = PRODUCT
    for i, (operand, base, index, _) in enumerate(ADDRESSES):
        program += ADDRESS.format(i=i, operand=operand, base=base, index=index)
    found, status = run(_INSTRUCTIONS, given | {"program": program})
    return found | {"memory": given["memory"], "status": status}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_product_by_hand(instructions, name):
    found = instructions[f"{list(BY_HAND).index(name)}.sums"]
    np.testing.assert_array_equal(found[:2], np.array(BY_HAND[name][3], F32))
    np.testing.assert_array_equal(found[2:], 0)


@pytest.mark.parametrize("i", range(len(ADDRESSES)), ids=[row[0] for row in ADDRESSES])
def test_addresses(instructions, i):
    memory = instructions["memory"]
    rows = [memory[4096 + first : 4096 + first + 8] for first in ADDRESSES[i][3]]
    np.testing.assert_array_equal(instructions[f"address_{i}"], rows)


def test_any_other_illegal_instruction_ends_the_process(instructions):
    assert instructions["status"] == -signal.SIGILL

"""What the CPU can do, and which kernels are chosen for it.

What counts is the CPU that Numba compiles for: `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` change
it, and a kernel with an instruction that LLVM believes missing would end the process.
"""

# mypy: disable-error-code="attr-defined, no-untyped-call"

import ctypes
import importlib
import os
import platform
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from llvmlite import binding
from numba.core import codegen
from numba.core import config as numba_config

REFERENCE = "reference"  # the NumPy reference implementations
PORTABLE = "portable"

# The features that each set of kernels needs, best set first. A test holds them against the sets.
_AVX2 = ("avx2", "f16c", "fma")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma")
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*_AVX512, "amx-tile", "amx-bf16"),
        "avx512_vnni": _AVX512,
        "avx_vnni": (*_AVX2, "avxvnni"),
        "avx2": _AVX2,
    },
    "aarch64": {
        "neon_dotprod": ("neon", "dotprod"),
        "neon": ("neon",),
    },
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # other names of the same

# Linux, asm/prctl.h and asm/unistd_64.h: a process must ask before it uses AMX's tiles.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


class KernelsError(ValueError):
    """The kernels that are asked for do not exist, or the CPU cannot run them."""


@dataclass(frozen=True)
class Host:
    """The machine this process runs on, and the CPU that Numba compiles for."""

    cpu: str  # as its maker calls it; the board where, as on ARM, Linux knows no more
    machine: str  # "x86_64", "aarch64" or another
    target: str  # LLVM's name
    flags: str  # LLVM's features of it, as "+avx2,-avx512f"; the name implies others


@dataclass(frozen=True)
class Candidate:
    """A set of kernels for this kind of machine."""

    name: str
    lacks: tuple[str, ...] = ()  # features that the CPU has not
    refused: str = ""  # what the system says, where it does not let the CPU's features be used

    @property
    def possible(self) -> bool:
        """Whether this process can run it."""
        return not self.lacks and not self.refused

    def __str__(self) -> str:
        if self.lacks:
            return f"lacks {', '.join(self.lacks)}"
        return self.refused or "possible"


@dataclass(frozen=True)
class Choice:
    """The kernels to use, and what else there is."""

    name: str
    why: str
    candidates: tuple[Candidate, ...]  # best first


def choose(asked: str | None = None) -> Choice:
    """Chooses the kernels for this process.

    Args:
        asked: a name; None stands for `PYLLAMA_KERNELS`, and without it for the best there are.

    Raises:
        KernelsError: there is no such name, or the CPU cannot run those kernels.
    """
    wish = os.environ.get("PYLLAMA_KERNELS", "") if asked is None else asked
    found = candidates(host().machine, features(), _amx_refused)
    if wish or asked is not None:
        why = "as PYLLAMA_KERNELS says" if asked is None else "as asked"
        return Choice(forced(wish, found), why, found)
    name = next(candidate.name for candidate in found if candidate.possible)
    why = (
        "this CPU can run no better ones" if name == PORTABLE else "the best that this CPU can run"
    )
    return Choice(name, why, found)


def candidates(
    machine: str, has: Collection[str], amx_refused: Callable[[], str]
) -> tuple[Candidate, ...]:
    """The sets of kernels for a kind of machine, best first, and what each misses there.

    Args:
        machine: as `Host.machine`.
        has: LLVM's names of the features of the CPU.
        amx_refused: asks the system for AMX; why that was refused, or "".
    """
    found = []
    for name, needs in NEEDS.get(machine, {}).items():
        lacks = tuple(feature for feature in needs if feature not in has)
        refused = amx_refused() if name == "amx" and not lacks else ""
        found.append(Candidate(name, lacks, refused))
    return (*found, Candidate(PORTABLE))


def forced(asked: str, found: Collection[Candidate]) -> str:
    """The name that is asked for, if it is one of those that are possible.

    Raises:
        KernelsError: it is not.
    """
    possible = [candidate.name for candidate in found if candidate.possible] + [REFERENCE]
    if asked in possible:
        return asked
    can_be = f"PYLLAMA_KERNELS can be {', '.join(possible)}"
    for candidate in found:
        if candidate.name == asked:
            raise KernelsError(f"kernels {asked!r} cannot run on this CPU: {candidate}; {can_be}")
    for machine, sets in NEEDS.items():
        if asked in sets:
            raise KernelsError(f"kernels {asked!r} are for {machine}; here {can_be}")
    raise KernelsError(f"there are no kernels {asked!r}; here {can_be}")


def load(name: str) -> ModuleType:
    """The module of a set of kernels, or of the reference implementations; it has `matmul_q40`."""
    inside = name if name == REFERENCE else f"isa.{name}"
    return importlib.import_module(f"pyllama_kernels.{inside}")


def compiled() -> ModuleType:
    """The chosen set of kernels; where nothing compiled is asked for, one that always runs."""
    name = choose().name
    return load("portable" if name == REFERENCE else name)


@cache
def host() -> Host:
    """What this process runs on and compiles for."""
    machine = platform.machine().lower()
    chosen = numba_config.CPU_FEATURES
    return Host(
        cpu=_cpu_name(),
        machine=_MACHINES.get(machine, machine),
        target=numba_config.CPU_NAME or binding.get_host_cpu_name(),
        flags=codegen.get_host_cpu_features() if chosen is None else chosen,
    )


@cache
def features() -> frozenset[str]:
    """The features, of those that kernels need, that Numba's code may use."""
    here = host()
    wanted = {f for needs in NEEDS.get(here.machine, {}).values() for f in needs}
    return frozenset(known_features(binding.get_process_triple(), here.target, here.flags, wanted))


def known_features(triple: str, cpu: str, flags: str, wanted: Collection[str]) -> set[str]:
    """Those of the wanted features that LLVM uses on a CPU.

    The name of a CPU stands for features that no list has: ARM's dotprod is one. LLVM tells only
    by what it does. It inlines a function into one of the CPU's own exactly if that needs nothing
    more; so there is a function for each feature.

    Args:
        triple: LLVM's name of the kind of machine.
        cpu: LLVM's name of the CPU.
        flags: features added to and taken from it, as "+avx2,-avx512f".
        wanted: features that LLVM has for this kind of machine.
    """
    binding.initialize_native_target()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=flags)
    lines = [f'target triple = "{triple}"']
    for i, feature in enumerate(wanted):
        needs = f"{flags},+{feature}".removeprefix(",")
        lines += [
            f"define internal i32 @needs_{i}(i32 %x) #{i} {{\n %y = mul i32 %x, %x\n ret i32 %y }}",
            f"define i32 @calls_{i}(i32 %x) {{\n %y = call i32 @needs_{i}(i32 %x)\n ret i32 %y }}",
            f'attributes #{i} = {{ "target-features"="{needs}" }}',
        ]
    module = binding.parse_assembly("\n".join(lines))
    options = binding.create_pipeline_tuning_options(speed_level=1)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    left = {function.name for function in module.functions}
    return {feature for i, feature in enumerate(wanted) if f"needs_{i}" not in left}


@cache
def _amx_refused() -> str:
    """Asks Linux for AMX's tiles, for all threads of this process; why not, or ""."""
    if sys.platform != "linux":
        return "only Linux is known to give AMX to a process"
    system = ctypes.CDLL(None, use_errno=True)
    call = [_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA]
    if system.syscall(*map(ctypes.c_long, call)) == 0:
        return ""
    return f"Linux does not give AMX to this process: {os.strerror(ctypes.get_errno())}"


def _cpu_name() -> str:
    for path, key in (("/proc/cpuinfo", "model name"), ("/proc/device-tree/model", "")):
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            if line.startswith(key):
                return line.rpartition(":")[2].strip("\0 \t")
    return platform.processor() or platform.machine()

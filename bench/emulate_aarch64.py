"""Runs the kernel tests and one answer of the built-in model as a Raspberry Pi would, under QEMU.

    python bench/emulate_aarch64.py

Twice: as Cortex-A76 (Raspberry Pi 5; it has the dot product instructions) and as Cortex-A72 (Pi 4;
QEMU ends a program that meets one there). The first run makes an arm64 tree of Debian's Python and
the wheels of this project (450 MB) in the user's cache directory; nothing is installed, and it
needs no root. Exit codes: 0 all passed, 1 something failed, 3 there can be no emulation here.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from platformdirs import user_cache_path

TESTED = "kernels matrix attention latent halves experts selection sampler"
TESTS = tuple(f"test_{name}.py" for name in TESTED.split())  # below tests/
QUESTION, EXPECTED = "What is 17 + 25?", "42"
SECONDS = 1800  # for one test, and for the answer; compiling takes minutes under QEMU

# Raspberry Pi OS of that name has the same Python: the oldest that this project runs on.
MIRROR, SUITE, PYTHON = "http://deb.debian.org/debian", "bookworm", "3.11"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEBIAN_PACKAGES = ("python3", "libstdc++6")
GLIBC_MINORS = range(17, 37)  # wheels for glibc 2.17 and up; bookworm has 2.36

# sdot v0.4s, v0.16b, v0.16b; ret. (Arm Architecture Reference Manual, C7: SDOT (vector).)
PROBE = """
import ctypes, mmap, struct
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(struct.pack("<2I", 0x4E809400, 0xD65F03C0))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""


@dataclass(frozen=True)
class Cpu:
    """A processor, by the name that LLVM and QEMU give it."""

    name: str
    features: str  # Numba cannot see them: QEMU shows programs the /proc/cpuinfo of the host
    has_sdot: bool


CPUS = (
    Cpu("cortex-a76", "+neon,+dotprod", has_sdot=True),
    Cpu("cortex-a72", "+neon", has_sdot=False),
)


class NoEmulationError(Exception):
    """Why there can be no emulation here, and what to do about it."""


@dataclass(frozen=True)
class Tree:
    """Programs and libraries for arm64, and what they leave behind."""

    path: Path

    @property
    def system(self) -> Path:
        return self.path / "debian"

    @property
    def packages(self) -> Path:
        return self.path / "packages"

    @property
    def python(self) -> Path:
        return self.system / "usr/bin/python"

    def make(self, qemu: str, source: Path) -> None:
        """Makes what is missing, or not what the source asks for by now."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.system.exists():
            say(f"unpacking Debian {SUITE} for arm64 below {self.path}")
            _unpack_debian(self.system)
        wanted = requirements(source / "pyproject.toml")
        stamp = self.path / "packages.txt"
        if not stamp.exists() or stamp.read_text() != "\n".join(wanted):
            say(f"fetching {len(wanted)} packages, and what they need, for arm64")
            stamp.unlink(missing_ok=True)
            _install_wheels(self.packages, wanted)
            stamp.write_text("\n".join(wanted))
        # To Python this script is its executable. So Python can start itself again, although the
        # kernel of the host runs no arm64 programs.
        binary = f'"${{0%/*}}/python{PYTHON}"'
        self.python.write_text(f'#!/bin/sh\nexec {shlex.quote(qemu)} -0 "$0" {binary} "$@"\n')
        self.python.chmod(0o755)

    def environment(self, cpu: Cpu, source: Path) -> dict[str, str]:
        """Environment of an emulated Python. `PYLLAMA_KERNELS` stays as the user set it."""
        ours = ("LD_", "NUMBA_CPU_", "PYLLAMA_DIST_", "PYTHON", "QEMU_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = os.pathsep.join(map(str, (source, source / "kernels", self.packages)))
        return kept | {
            "QEMU_CPU": cpu.name,
            "QEMU_LD_PREFIX": str(self.system),
            "NUMBA_CPU_NAME": cpu.name,
            "NUMBA_CPU_FEATURES": cpu.features,
            "PYTHONPATH": path,
            "PYTHONNOUSERSITE": "1",
            # The source stays as it is.
            "PYTHONPYCACHEPREFIX": str(self.path / "bytecode"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.path / "hypothesis"),
            "PYLLAMA_DIST_CACHE_DIR": str(self.path / "kernels"),
        }


def _unpack_debian(target: Path) -> None:
    """Unpacks Python and the libraries it needs. Nothing of it is set up, nor need be."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise NoEmulationError(f"there is no {program}; run this on Debian or Ubuntu")
    if not KEYRING.exists():
        raise NoEmulationError(f"there is no {KEYRING}; apt-get install debian-archive-keyring")
    part, apt = target.with_suffix(".part"), target.with_suffix(".apt")
    for folder in (part, apt):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for folder in (apt / "lists/partial", apt / "archives/partial"):
        folder.mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed yet
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
        "Dir::Cache": apt,
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    apt_get = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    _run_or_give_up([*apt_get, "update", "--error-on=any"])
    _run_or_give_up([*apt_get, "install", "--download-only", "--yes", *DEBIAN_PACKAGES])
    for archive in sorted((apt / "archives").glob("*.deb")):
        _run_or_give_up(["dpkg-deb", "--extract", str(archive), str(part)])
    shutil.rmtree(apt)
    part.rename(target)


def requirements(pyproject: Path) -> list[str]:
    """What the project needs on a root, and for its tests."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    wanted: list[str] = [*project["dependencies"], *extras["root"], *extras["test"]]
    return [requirement for requirement in wanted if not requirement.startswith(project["name"])]


def _install_wheels(target: Path, wanted: Sequence[str]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--target", str(target), "--only-binary", ":all:"]
    pip += ["--implementation", "cp", "--python-version", PYTHON]
    for platform in ("2014", *(f"_2_{minor}" for minor in GLIBC_MINORS)):
        pip += ["--platform", f"manylinux{platform}_aarch64"]
    _run_or_give_up([*pip, *wanted])


def _run_or_give_up(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no message"]
        what = command[0] if command[0] != sys.executable else "pip"
        raise NoEmulationError(f"{what} failed: {lines[-1]}; is there a network?")


def find_qemu() -> str:
    """Path of QEMU's user mode emulator, one that knows our processors."""
    if not sys.platform.startswith("linux"):
        raise NoEmulationError("QEMU's user mode needs Linux")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise NoEmulationError("there is no qemu-aarch64-static; apt-get install qemu-user-static")
    known = subprocess.run([qemu, "-cpu", "help"], capture_output=True, text=True, check=False)
    for cpu in CPUS:
        if cpu.name not in known.stdout:
            raise NoEmulationError(f"{qemu} knows no {cpu.name}; QEMU 7.1 or later is needed")
    return qemu


def check_sdot(tree: Tree, cpu: Cpu, source: Path) -> None:
    """Makes sure that QEMU runs the instruction where there is one, and only there."""
    command = [str(tree.python), "-c", PROBE]
    result = subprocess.run(
        command, env=tree.environment(cpu, source), capture_output=True, text=True, check=False
    )
    if result.returncode != (0 if cpu.has_sdot else -signal.SIGILL):
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise NoEmulationError(
            f"sdot as {cpu.name}: status {result.returncode}, {lines[-1]}; "
            f"remove {tree.path} and try again"
        )


def run_tests(tree: Tree, cpu: Cpu, source: Path, select: str) -> bool:
    """Whether all kernel tests pass; pytest shows its own progress."""
    files = [str(source / "tests" / name) for name in TESTS]
    command = [str(tree.python), "-m", "pytest", "-p", "no:cacheprovider", "--durations", "3"]
    command += ["-o", f"timeout={SECONDS}", "-k", select, *files]
    result = subprocess.run(
        command, cwd=source, env=tree.environment(cpu, source), stdin=subprocess.DEVNULL
    )
    if result.returncode == -signal.SIGILL:
        say(f"{cpu.name} met an instruction that it does not have")
    return result.returncode == 0


def run_answer(tree: Tree, cpu: Cpu, source: Path) -> bool:
    """Whether the built-in model, on one node, knows the sum."""
    command = [str(tree.python), "-m", "pyllama_dist", "root", "--prompt", QUESTION, "--json"]
    command += ["--temperature", "0", "--steps", "64", "--nthreads", "2"]
    try:
        result = subprocess.run(
            command,
            cwd=source,
            env=tree.environment(cpu, source),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        say(f"no answer within {SECONDS} s")
        return False
    if result.returncode:
        say(f"no answer; exit status {result.returncode}")
        return False
    answer = json.loads(result.stdout)
    say(f"{QUESTION} {answer['text']!r}")
    return EXPECTED in answer["text"]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", type=Path, default=Path(__file__).parents[1], help="the project; default: this"
    )
    parser.add_argument(
        "--tree", type=Path, default=user_cache_path("pyllama-dist") / "aarch64", help="%(default)s"
    )
    parser.add_argument("--cpu", choices=[cpu.name for cpu in CPUS], help="only this one")
    parser.add_argument("-k", dest="select", default="", help="which tests, as pytest's -k")
    args = parser.parse_args()
    source, tree = args.source.resolve(), Tree(args.tree.resolve())
    cpus = [cpu for cpu in CPUS if args.cpu in (None, cpu.name)]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # QEMU would leave core files in the source
    try:
        tree.make(find_qemu(), source)
        for cpu in cpus:
            check_sdot(tree, cpu, source)
    except (NoEmulationError, OSError) as error:
        print(f"emulation cannot be had here: {error}", file=sys.stderr)
        sys.exit(3)

    phases: dict[str, Callable[[Tree, Cpu, Path], bool]] = {
        "kernel tests": partial(run_tests, select=args.select),
        "answer": run_answer,
    }
    table, all_passed = [], True
    for cpu in cpus:
        row = f"{cpu.name}  sdot {'runs' if cpu.has_sdot else 'is refused':<10}"
        for name, passes in phases.items():
            say(f"{cpu.name}: {name}")
            start = time.monotonic()
            passed = passes(tree, cpu, source)
            seconds = time.monotonic() - start
            row += f"  {name} {'PASS' if passed else 'FAIL'} {seconds:4.0f} s"
            all_passed &= passed
        table.append(row)
    print("\n" + "\n".join(table))
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()

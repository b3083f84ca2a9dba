"""`pyllama-dist doctor`."""

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import click

from pyllama_dist import __version__
from pyllama_dist.cli.options import option

_OK, _NOTE, _PROBLEM = "ok", "note", "problem"
_COLORS = {_OK: "green", _NOTE: "yellow", _PROBLEM: "red"}
_LIBRARIES = ("numpy", "numba", "llvmlite", "pyzmq", "msgpack")

_BUSY = 0.5  # share of the cores that others may take before steps wait for them
_SCARCE = 0.1  # share of the memory below which little is available

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPUS = Path("/sys/devices/system/cpu")
_ADJUSTS_ITSELF = {"intel_pstate", "amd-pstate-epp"}  # drivers whose "powersave" is fast enough


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: str  # _OK, _NOTE or _PROBLEM
    found: str
    advice: str = ""  # what to do, if not all is well
    facts: dict[str, object] = field(default_factory=dict)  # for programs


@click.command("doctor")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine offers, which kernels it gets, and what slows it down.

    The exit code is 1 if something keeps it from working.
    """
    checks = list(_checks())
    if as_json:
        click.echo(json.dumps({"checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        _print(checks)
    if any(check.state == _PROBLEM for check in checks):
        click.get_current_context().exit(1)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("", "check", Column("found", overflow="fold"), show_header=False)
    for check in checks:
        advice = f"\n[yellow]{escape(check.advice)}[/]" if check.advice else ""
        state = f"[{_COLORS[check.state]}]{check.state}[/]"
        table.add_row(state, check.name, escape(check.found) + advice)
    Console().print(table)


def _checks() -> Iterator[Check]:
    yield from _kernels()
    yield from _cpu()
    yield _cores()
    yield _load(os.getloadavg()[0])
    yield from _memory()
    yield from _versions()
    yield _cache()
    yield from _system_settings()


def _kernels() -> Iterator[Check]:
    from pyllama_kernels.cpu import KernelsError, choose

    try:
        choice = choose()
        facts: dict[str, object] = {"name": choice.name, "why": choice.why}
        yield Check("kernels", _OK, f"{choice.name}: {choice.why}", facts=facts)
    except KernelsError as error:
        yield Check("kernels", _PROBLEM, str(error), "unset PYLLAMA_KERNELS, or give another")
        choice = choose("reference")
    for candidate in choice.candidates:
        # A CPU that cannot do more is as it should be; one that is kept from it is not.
        advice = "ask whoever runs this system" if candidate.refused else ""
        state = _NOTE if candidate.refused else _OK
        facts = {"possible": candidate.possible, "lacks": candidate.lacks}
        yield Check(f"kernels {candidate.name}", state, str(candidate), advice, facts)


def _cpu() -> Iterator[Check]:
    from pyllama_kernels.cpu import host

    here = host()
    found = f"{here.cpu} ({here.machine}, compiled for {here.target})"
    yield Check("cpu", _OK, found, facts=dataclasses.asdict(here))
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        if (value := os.environ.get(name)) is not None:
            yield Check(
                name, _NOTE, repr(value), "unset it, to have kernels compiled for this very CPU"
            )


def _cores() -> Check:
    from pyllama_dist.cores import available_cores

    logical, allowed, threads = os.cpu_count(), _allowed(), available_cores()
    found = f"{logical} logical, of which {allowed} may be used; threads by default: {threads}"
    facts: dict[str, object] = {"logical": logical, "allowed": allowed, "threads": threads}
    return Check("cores", _OK, found, facts=facts)


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load(load: float) -> Check:
    """`load`: programs that wanted to run, on average over the last minute."""
    found = f"{load:.1f} over the last minute"
    if load < _BUSY * _allowed():
        return Check("load", _OK, found, facts={"load": load})
    advice = "others use these cores too: end other programs, or give a lower --nthreads"
    return Check("load", _NOTE, found, advice, {"load": load})


def _memory() -> Iterator[Check]:
    from pyllama_dist.memory_use import memory_here

    memory = memory_here()
    found = f"{memory.total / 1e9:.1f} GB, available {memory.available / 1e9:.1f} GB"
    facts: dict[str, object] = {"total_bytes": memory.total, "available_bytes": memory.available}
    if memory.available < _SCARCE * memory.total:
        advice = "end other programs, or use workers on other machines"
        yield Check("memory", _NOTE, found, advice, facts)
    else:
        yield Check("memory", _OK, found, facts=facts)
    page = os.sysconf("SC_PAGE_SIZE")
    yield Check("page size", _OK, f"{page} bytes", facts={"bytes": page})


def _versions() -> Iterator[Check]:
    yield Check("pyllama-dist", _OK, __version__)
    yield Check("python", _OK, platform.python_version())
    for library in _LIBRARIES:
        yield Check(library, _OK, version(library))


def _cache() -> Check:
    from pyllama_kernels.jit import CACHE

    if CACHE is None:
        advice = "every start compiles; set PYLLAMA_DIST_CACHE_DIR to a directory of yours alone"
        return Check("compiled kernels", _NOTE, "cannot be kept", advice)
    size = sum(file.stat().st_size for file in CACHE.rglob("*") if file.is_file())
    complete = (CACHE / "complete").exists()
    facts: dict[str, object] = {"path": str(CACHE), "bytes": size, "complete": complete}
    found = f"{CACHE}, {size / 1e6:.1f} MB"
    if complete:
        return Check("compiled kernels", _OK, found, facts=facts)
    advice = "the next start compiles them, which takes some twenty seconds, once"
    return Check("compiled kernels", _NOTE, f"{found}, not complete", advice, facts)


def _system_settings() -> Iterator[Check]:
    """Settings of Linux that decide about speed, where they can be read."""
    if enabled := _read(_HUGE_PAGES):
        yield _huge_pages(enabled)
    governors = {
        _read(folder / "scaling_governor"): _read(folder / "scaling_driver")
        for folder in _CPUS.glob("cpu[0-9]*/cpufreq")
    }
    for governor, driver in governors.items():
        if governor:
            yield _governor(governor, driver)


def _huge_pages(enabled: str) -> Check:
    """`enabled`: as Linux writes it, "always [madvise] never"."""
    chosen = enabled.partition("[")[2].partition("]")[0]
    if chosen != "never":
        return Check("huge pages", _OK, chosen)
    advice = f"as root, for faster memory: echo madvise > {_HUGE_PAGES}"
    return Check("huge pages", _NOTE, chosen, advice)


def _governor(governor: str, driver: str) -> Check:
    name, found = f"cpu frequency {governor}", f"by {driver or 'an unknown driver'}"
    if governor != "powersave" or driver in _ADJUSTS_ITSELF:
        return Check(name, _OK, found)
    advice = (
        f"as root, for full speed: echo performance | tee {_CPUS}/cpu*/cpufreq/scaling_governor"
    )
    return Check(name, _NOTE, found, advice)


def _read(path: Path) -> str:
    """The text of a file of the system's, or "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""

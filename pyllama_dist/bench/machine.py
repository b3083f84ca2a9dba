"""The machine that a measurement is made on: what it is, what it can do, what is used of it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil

from pyllama_dist import __version__
from pyllama_dist.cluster import available_cores
from pyllama_kernels.bandwidth import read_bandwidth
from pyllama_kernels.cpu import features, host

_BUFFER = 1 << 30  # bytes: no cache holds a part of it that counts
_LIBRARIES = ("numpy", "numba", "llvmlite", "pyzmq")


def facts() -> dict[str, object]:
    """What the machine is."""
    here = host()
    return {
        "cpu": here.cpu,
        "llvm_cpu": here.target,
        "features": sorted(features()),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of the interpreter and of what decides about speed."""
    return {
        "pyllama-dist": __version__,
        "python": platform.python_version(),
        **{library: version(library) for library in _LIBRARIES},
    }


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def memory_bandwidth(n_threads: int) -> float:
    """Bytes per second that so many threads read from memory: the best of some passes.

    The buffer is 1 GiB, or a quarter of what is available.
    """
    return max(read_bandwidth(n_threads, min(_BUFFER, psutil.virtual_memory().available // 4)))


def resident_bytes(*, peak: bool = False) -> list[int]:
    """Memory that this process and the workers it has started hold, in bytes.

    Args:
        peak: the most since each began, where the system tells (Linux); else what it is now.
    """
    me = psutil.Process()
    return [_resident(process, "VmHWM:" if peak else "VmRSS:") for process in (me, *me.children())]


def _resident(process: psutil.Process, key: str) -> int:
    now: int = process.memory_info().rss
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return now
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), now)

"""The machine that a measurement is made on: what it is, what it can do, what is used of it."""

import os
import platform
from importlib.metadata import version

from pyllama_dist import __version__
from pyllama_dist.cores import available_cores
from pyllama_dist.memory_use import memory_here
from pyllama_kernels.bandwidth import MemoryReader
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
        "memory_bytes": memory_here().total,
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


def memory_reader(n_threads: int) -> MemoryReader:
    """So many threads and a buffer of 1 GiB, or of a quarter of the memory that is available."""
    return MemoryReader(n_threads, min(_BUFFER, memory_here().available // 4))

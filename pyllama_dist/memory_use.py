"""Memory that this process holds, and memory that it may allocate."""

from pathlib import Path
from typing import NamedTuple

import psutil

from pyllama_dist.cgroups import memory_limit


class MemoryHere(NamedTuple):
    """Bytes of this machine's memory, as far as control groups give them to this process."""

    total: int
    available: int  # before the system swaps or kills a process


def memory_here() -> MemoryHere:
    """The memory of this machine, or the part of it that a container or service may use."""
    machine, (limit, left) = psutil.virtual_memory(), memory_limit()
    return MemoryHere(int(min(machine.total, limit)), int(min(machine.available, left)))


def resident_bytes(*, peak: bool = False) -> int:
    """Bytes that this process holds in memory.

    Args:
        peak: the most since it began, where the system tells (Linux); else what it is now.
    """
    now: int = psutil.Process().memory_info().rss
    if not peak:
        return now
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return now
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), now)

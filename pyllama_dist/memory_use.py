"""Memory that this process holds."""

from pathlib import Path

import psutil


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

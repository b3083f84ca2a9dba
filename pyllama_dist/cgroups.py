"""Limits that Linux's control groups set for this process: containers and services have them.

The files of version 1 and 2 are described in the kernel's documentation, admin-guide/cgroup-v1 and
admin-guide/cgroup-v2.rst. A limit holds for a group and all groups within it, so each group from
the process's own up to the root of the mounted hierarchy is looked at.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")


def cpu_limit(proc: Path = _PROC) -> float:
    """CPUs that this process may keep busy on average, such as 0.5; infinite without a limit.

    Args:
        proc: the process's directory in /proc.
    """
    quotas = [_cpu_quota(group) for group in _groups("cpu", proc)]
    return min(quotas, default=math.inf)


def memory_limit(proc: Path = _PROC) -> tuple[float, float]:
    """Bytes that the groups may hold, and how many of these are left; infinite without a limit.

    Beyond `memory.max` (version 1: `memory.limit_in_bytes`) the kernel ends processes, beyond
    `memory.high` it slows them down. Cached files count as left: the kernel drops them first.

    Args:
        proc: the process's directory in /proc.
    """
    limit = left = math.inf
    for group in _groups("memory", proc):
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        most = min(_number(group / name) for name in names)
        used = min(_number(group / "memory.current"), _number(group / "memory.usage_in_bytes"))
        limit = min(limit, most)
        if math.isfinite(most) and math.isfinite(used):
            left = min(left, max(0, most - used + _cached(group)))
    return limit, left


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Directories of a controller's groups of a process, its own first."""
    own: dict[str, str] = {}  # controller: path; "" is version 2, which has one path for all
    for line in _lines(proc / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(proc / "mountinfo"):
        mount, _, kind = line.partition(" - ")
        root, top = map(_unescape, mount.split()[3:5])
        match kind.split():
            case ["cgroup", _, options] if controller in options.split(",") and controller in own:
                path = own[controller]
            case ["cgroup2", *_] if "" in own:
                path = own[""]
            case _:
                continue
        # In a container the mount may show a part of the hierarchy, whose path begins with `root`.
        below = path.removeprefix("" if root == "/" else root).strip("/")
        group = Path(top) / below if ".." not in below else Path(top)
        yield from (each for each in (group, *group.parents) if each.is_relative_to(top))


def _cpu_quota(group: Path) -> float:
    match _lines(group / "cpu.max"):
        case [line]:
            quota, period = line.split()
            return math.inf if quota == "max" else int(quota) / int(period)
    quota_us = _number(group / "cpu.cfs_quota_us")
    period_us = _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if 0 < quota_us < math.inf and period_us > 0 else math.inf


def _cached(group: Path) -> int:
    """Bytes of files in a group's memory; version 1 counts those of groups within it apart."""
    stat = dict(line.split(" ", 1) for line in _lines(group / "memory.stat"))
    names = ("inactive_file", "active_file")
    return sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in names)


def _number(path: Path) -> float:
    """The number in a file; infinite if it says "max", or is not there."""
    match _lines(path):
        case [line] if line.lstrip("-").isdecimal():
            return int(line)
    return math.inf


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(path: str) -> str:
    r"""Undoes how mountinfo writes what would part its columns.

    >>> _unescape(r"/a\040b")
    '/a b'
    """
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)

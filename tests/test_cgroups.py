"""Limits of control groups, in trees laid out like those of the kernel."""

import math

import psutil
import pytest

from pyllama_dist import cores, memory_use
from pyllama_dist.cgroups import cpu_limit, memory_limit
from pyllama_dist.cluster import Cluster

MB = 1_000_000
V1_NONE = (1 << 63) - 4096  # what version 1 shows without a limit


@pytest.fixture
def proc(tmp_path):
    """Makes a process's directory in /proc and its groups' files; its path.

    `proc("0::/a/b", "/ {top} - cgroup2 cgroup2 rw", {"a/cpu.max": "max 100000"})`
    """

    def make(cgroup, mount, files):
        top = tmp_path / "a mount"
        for name, text in files.items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text(f"{text}\n")
        (tmp_path / "cgroup").write_text(f"{cgroup}\n")
        root, options = mount
        shown = str(top).replace(" ", r"\040")
        others = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        line = f"31 24 0:27 {root} {shown} rw,nosuid shared:9 - {options}\n"
        (tmp_path / "mountinfo").write_text(others + line)
        return tmp_path

    return make


V2 = ("/", "cgroup2 cgroup2 rw,nsdelegate")
V1_CPU = ("/", "cgroup cgroup rw,cpu,cpuacct")
V1_MEMORY = ("/", "cgroup cgroup rw,memory")


@pytest.mark.parametrize(
    ("cgroup", "mount", "files", "expected"),
    [
        ("0::/a", V2, {"a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a", V2, {"a/cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", V2, {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", V2, {"a/cpu.max": "300000 100000", "a/b/cpu.max": "25000 50000"}, 0.5),
        ("0::/a", V2, {"b/cpu.max": "50000 100000"}, math.inf),  # another's
        ("0::/", V2, {"cpu.max": "50000 100000"}, 0.5),  # a container with groups of its own
        ("0::/../../b", V2, {"cpu.max": "50000 100000"}, 0.5),  # moved out of its namespace
        ("0::/pod/one", ("/pod/one", V2[1]), {"cpu.max": "50000 100000"}, 0.5),
        (
            "4:cpu,cpuacct:/a\n0::/",
            V1_CPU,
            {"a/cpu.cfs_quota_us": "50000", "a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "4:cpu,cpuacct:/a",
            V1_CPU,
            {"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        (
            "4:cpuacct,cpu:/docker/one",
            ("/docker/one", V1_CPU[1]),
            {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "4:memory:/a\n5:cpu:/b",  # limits of a hierarchy that is not mounted
            V1_MEMORY,
            {"a/cpu.cfs_quota_us": "50000", "a/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
    ],
)
def test_cpu_time(proc, cgroup, mount, files, expected):
    assert cpu_limit(proc(cgroup, mount, files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "mount", "files", "expected"),
    [
        (
            "0::/a",
            V2,
            {"a/memory.max": 400 * MB, "a/memory.high": "max", "a/memory.current": 100 * MB},
            (400 * MB, 300 * MB),
        ),
        (
            "0::/a",
            V2,
            {"a/memory.max": "max", "a/memory.high": 200 * MB, "a/memory.current": 250 * MB},
            (200 * MB, 0),
        ),
        (
            "0::/a/b",  # the group around it has the lower limit, and another group's use of it
            V2,
            {
                "a/memory.max": 400 * MB,
                "a/memory.current": 390 * MB,
                "a/memory.stat": "anon 5\ninactive_file 7\nactive_file 11\nfile_mapped 13",
                "a/b/memory.max": 300 * MB,
                "a/b/memory.current": 10 * MB,
            },
            (300 * MB, 10 * MB + 18),
        ),
        ("0::/a", V2, {"a/memory.max": "max", "a/memory.current": 5}, (math.inf, math.inf)),
        (
            "4:memory:/a",
            V1_MEMORY,
            {
                "a/memory.limit_in_bytes": 400 * MB,
                "a/memory.usage_in_bytes": 390 * MB,
                "a/memory.stat": "inactive_file 1\ntotal_inactive_file 70\ntotal_active_file 30",
                "memory.limit_in_bytes": V1_NONE,
                "memory.usage_in_bytes": 9000 * MB,
            },
            (400 * MB, 10 * MB + 100),
        ),
    ],
)
def test_memory(proc, cgroup, mount, files, expected):
    assert memory_limit(proc(cgroup, mount, files)) == expected


def test_where_there_are_no_groups(tmp_path):
    assert cpu_limit(tmp_path) == math.inf
    assert memory_limit(tmp_path) == (math.inf, math.inf)


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 1), (1.9, 1), (2.0, 2), (math.inf, 8)])
def test_threads_are_whole_cores_of_the_limit(monkeypatch, limit, expected):
    monkeypatch.setattr(cores, "_CAN_CHOOSE", False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(cores, "cpu_limit", lambda: limit)
    assert cores.available_cores() == expected
    assert Cluster().threads == expected


def test_memory_of_a_container_is_what_its_groups_leave(monkeypatch):
    monkeypatch.setattr(memory_use, "memory_limit", lambda: (4 * MB, 3 * MB))
    assert memory_use.memory_here() == (4 * MB, 3 * MB)
    monkeypatch.setattr(memory_use, "memory_limit", lambda: (math.inf, math.inf))
    assert memory_use.memory_here().total == psutil.virtual_memory().total

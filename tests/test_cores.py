"""Which cores nodes keep to."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from pyllama_dist import cores
from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.cluster import Cluster, open_root
from pyllama_dist.conversation import open_model
from pyllama_dist.cores import cpus_of_nodes, keep, kept_to
from pyllama_dist.program import Batch

needs_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")


@pytest.mark.parametrize(
    ("cpus", "n_nodes", "n_threads", "expected"),
    [
        ({4, 6}, 2, 1, [4, 6]),
        ({4, 6}, 5, 1, [4, 6, 4, 6, 4]),
        ({3}, 2, 1, [3, 3]),
        ({0, 1, 2}, 2, 1, [None, None]),  # one CPU is free: the system may use it
        ({0, 1}, 2, 2, [None, None]),
        ({0, 1}, 1, 1, [None]),
        ({0}, 1, 1, [None]),
    ],
)
@needs_linux
def test_nodes_of_one_thread_that_fill_the_machine_keep_their_places(
    monkeypatch, cpus, n_nodes, n_threads, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cpus)
    assert cpus_of_nodes(n_nodes, n_threads) == expected


def test_where_cpus_cannot_be_chosen_nodes_use_any(monkeypatch):
    monkeypatch.setattr(cores, "_CAN_CHOOSE", False)
    assert cpus_of_nodes(64, 1) == [None] * 64


@needs_linux
def test_a_thread_and_those_it_starts_are_kept_for_a_while():
    before = os.sched_getaffinity(0)
    cpu = max(before)
    seen = []
    with kept_to(cpu):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert os.sched_getaffinity(0) == {cpu}
    assert seen == [{cpu}]
    assert os.sched_getaffinity(0) == before
    with pytest.raises(KeyError), kept_to(cpu):
        raise KeyError
    assert os.sched_getaffinity(0) == before
    with kept_to(None):
        assert os.sched_getaffinity(0) == before


@needs_linux
def test_a_process_is_kept_and_one_that_has_gone_is_nobodys_fault():
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        keep(process.pid, None)
        assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0)
        keep(process.pid, cpu)
        assert os.sched_getaffinity(process.pid) == {cpu}
        process.stdin.close()
        process.wait()
    keep(process.pid, cpu)


@pytest.fixture
def two_cpus():
    """Two CPUs, which the test keeps to."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two CPUs")
    cpus = sorted(before)[-2:]
    os.sched_setaffinity(0, cpus)
    yield cpus
    os.sched_setaffinity(0, before)


def threads(process, name=""):
    """The threads of a process whose name begins like that."""
    found = Path(f"/proc/{process}/task").iterdir()
    return {int(thread.name) for thread in found if (thread / "comm").read_text().startswith(name)}


def places(threads):
    """The CPUs that threads keep to."""
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads}


@needs_linux
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_the_nodes_of_a_cluster_keep_their_places(two_cpus, monkeypatch):
    first, second = ({frozenset({cpu})} for cpu in two_cpus)
    cluster = Cluster(local_workers=2, n_threads=1, max_seq_len=16)
    before = threads(os.getpid())
    with (
        open_model(BUILTIN) as parts,
        open_root(parts.file, cluster, lambda done, total: None) as root,
    ):
        step = root.node.step

        def watched(*args):
            assert os.sched_getaffinity(0) == {two_cpus[0]}
            step(*args)

        monkeypatch.setattr(root.node, "step", watched)
        assert root.step([1], Batch((0,), (0,), (0,))).size
        assert os.sched_getaffinity(0) == set(two_cpus)
        assert places(threads(os.getpid(), "ZMQ") - before) == first
        workers = [places(threads(worker.pid)) for worker in psutil.Process().children()]
        assert sorted(workers, key=[first, second].index) == [first, second]

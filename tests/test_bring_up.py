"""Connect, plan, load: what is refused before a weight is sent; trying again after a failure."""

# ruff: noqa: F811 (fixtures that come from elsewhere)

import gc
import sys
import time
from contextlib import closing

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.cluster.bring_up import bring_up
from pyllama_dist.cluster.plan import check_memory, plan
from pyllama_dist.errors import NodeError, UsageError
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.net.transport import ROOT, Address
from pyllama_dist.net.zeromq import ZmqDialer
from pyllama_dist.node_info import node_info
from tests.test_processes import run, worker  # noqa: F401

pytestmark = pytest.mark.timeout(90)

HERE = node_info(1)
# A worker that is killed when a phase begins.
VICTIM = """
import os
from pyllama_dist import worker
from pyllama_dist.cli import main
worker._Session.{phase} = lambda *args: os._exit(9)
main()
"""


def has(gigabytes, machine):
    return replace(HERE, memory=int(gigabytes * 1e9), machine=bytes([machine]) * 16)


@pytest.fixture
def three(tiny):
    """Programs of three nodes that each need 4 GB or more."""
    big = [
        replace(program, n_seqs=1, n_blocks=1 << 17, seq_len=1 << 24)
        for program in tiny().programs(3)
    ]
    assert all(3e9 < planned_bytes(program) < 30e9 for program in big)
    return big


def test_who_cannot_hold_its_part_is_named_with_numbers(three):
    needed = [planned_bytes(program) / 1e9 for program in three]
    nodes = {ROOT: has(99, 0), "a:1": has(needed[1] - 0.1, 1), "b:2": has(needed[2] + 0.1, 2)}
    with pytest.raises(NodeError) as refused:
        check_memory(three, nodes)
    assert str(refused.value) == (
        f"a:1 needs {needed[1]:.2f} GB, {needed[1] - 0.1:.2f} GB are available; use more machines, "
        f"or a lower --max-seq-len"
    )
    check_memory(three, nodes | {"a:1": has(needed[1] + 0.1, 1)})


def test_nodes_of_one_machine_share_its_memory(three):
    needed = [planned_bytes(program) / 1e9 for program in three]
    both = needed[0] + needed[2]
    nodes = {ROOT: has(both - 0.1, 0), "a:1": has(99, 1), "b:2": has(both - 0.1, 0)}
    with pytest.raises(NodeError, match=f"^{ROOT}, b:2 on one machine need {both:.2f} GB"):
        check_memory(three, nodes)


def test_a_plan_is_made_of_what_was_asked_for(tiny):
    model = tiny()
    cluster = Cluster(local_workers=2, max_seq_len=16)
    nodes = dict.fromkeys((ROOT, "a:1", "b:2"), HERE)
    assert plan(model.config, cluster, nodes) == programs(model.config, cluster)
    with pytest.raises(UsageError, match="query heads for at most"):
        plan(model.config, Cluster(local_workers=200), nodes)


@pytest.fixture
def dialer():
    with closing(ZmqDialer()) as dialer:
        yield dialer


@pytest.fixture
def up(tiny, dialer):
    """Brings up the tiny model on these workers."""
    model = tiny()

    def up(*workers, planner=lambda nodes: model.programs(len(nodes))):
        addresses = [Address.parse(worker.address) for worker in workers]
        return bring_up(model, planner, n_threads=1, dialer=dialer, workers=addresses)

    return up


def open_now():
    """Threads and files of this process."""
    gc.collect()
    return psutil.Process().num_threads(), psutil.Process().num_fds()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["hello", "peers", "net", "weights", "steps"])
def test_a_bring_up_that_fails_leaves_nothing_and_the_rest_serve_the_next(
    tiny, run_of, worker, run, up, phase
):
    one, two = worker(), worker()
    script = VICTIM.format(phase=phase)
    victim = run("worker", "--port", "0", command=[sys.executable, "-c", script])
    victim.address = victim.output(r"listens on (\S+),")[1]
    with up(one) as root:  # what libraries open once is open now
        expected = root.step((1, 2), run_of(0, (1, 2))).copy()
    before = open_now()
    with pytest.raises(NodeError, match=f"lost worker {victim.address} in phase"):
        up(one, victim, two).step((1,), run_of(0, (1,)))
    deadline = time.monotonic() + 5
    while open_now() > before and time.monotonic() < deadline:
        time.sleep(0.1)  # last messages have their time to leave
    assert open_now() <= before
    with up(one, two) as root:
        found = root.step((1, 2), run_of(0, (1, 2)))
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_who_lacks_memory_is_sent_no_program(worker, up, tiny):
    one = worker()

    def planner(nodes):
        assert list(nodes) == [ROOT, one.address]
        assert nodes[one.address].machine == nodes[ROOT].machine
        assert nodes[one.address].n_threads == 1
        assert abs(nodes[one.address].memory - nodes[ROOT].memory) < 4e9
        check_memory(tiny().programs(2), {name: has(0, i) for i, name in enumerate(nodes)})

    with pytest.raises(NodeError, match=f"{ROOT} needs .* GB, 0.00 GB .*; {one.address} needs"):
        up(one, planner=planner)
    one.output(r"the root gave up: .* needs .* in phase NET; listening again")
    with up(one):
        pass


def test_one_worker_under_two_names(worker, up):
    one = worker()
    host, _, port = one.address.rpartition(":")
    other = type("Named", (), {"address": f"localhost:{port}"})
    assert host == "127.0.0.1"
    with pytest.raises(UsageError, match=f"names one worker twice: {one.address} and localhost"):
        up(one, other)
    with up(one):
        pass

"""How a node waits for frames: it busy-polls for a short time, then blocks."""

import os
import random
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import zmq

from pyllama_dist.net.transport import LostError
from pyllama_dist.net.zeromq import mesh as mesh_module
from pyllama_dist.net.zeromq.mesh import ZmqMesh
from pyllama_dist.net.zeromq.sockets import open_context

pytestmark = pytest.mark.timeout(30)

FRAME = bytes(range(64))
NAMES = ("first", "second", "third")


@pytest.fixture(params=["beside", "tcp"])
def nodes(request):
    """The meshes of three nodes, as on one machine and as on several."""
    with ExitStack() as stack:
        context = open_context()
        stack.callback(context.destroy, linger=0)
        meshes = [stack.enter_context(closing(ZmqMesh(context, "127.0.0.1"))) for _ in NAMES]
        endpoints = [mesh.bind(range(node)) for node, mesh in enumerate(meshes)]
        assert all(name for some in endpoints for _, name in some) or sys.platform != "linux"
        if request.param == "tcp":
            endpoints = [[(port, "") for port, _ in some] for some in endpoints]
        for node, mesh in enumerate(meshes):
            higher = range(node + 1, len(meshes))
            mesh.connect({other: ("127.0.0.1", endpoints[other][node]) for other in higher})
        greetings = [
            threading.Thread(target=mesh.greet, args=(bytes(16), node, NAMES, 10))
            for node, mesh in enumerate(meshes)
        ]
        for greeting in greetings:
            greeting.start()
        for greeting in greetings:
            greeting.join()
        yield meshes


def send(mesh, node):
    assert mesh.exchange({node: memoryview(FRAME)}, {}, 10.0) == []


def receive(mesh, *nodes, timeout=10.0):
    memory = {node: memoryview(bytearray(len(FRAME))) for node in nodes}
    found = mesh.exchange({}, memory, timeout)
    assert sorted(found) == [(node, len(FRAME)) for node in sorted(nodes)]
    return [bytes(frame) for frame in memory.values()]


def on_yield(monkeypatch, do):
    """Calls `do` at each yield of a core; returns a list with an item for each yield."""
    yields = []

    def yield_once():
        yields.append(None)
        do(len(yields))

    monkeypatch.setattr(mesh_module, "yield_core", yield_once)
    return yields


def test_a_frame_that_comes_soon_is_received_while_busy_polling(nodes, monkeypatch):
    monkeypatch.setattr(mesh_module, "BUSY_POLL", 30.0)
    monkeypatch.setattr(mesh_module, "CROWDED", 30.0)
    yields = on_yield(monkeypatch, lambda count: count == 3 and send(nodes[1], 0))
    assert receive(nodes[0], 1) == [FRAME]
    assert len(yields) >= 3


def test_a_sender_yields_its_core_to_libzmq(nodes, monkeypatch):
    yields = on_yield(monkeypatch, lambda count: None)
    send(nodes[0], 1)
    assert len(yields) == 1


def test_late_frames_are_received_by_a_blocked_thread(nodes, monkeypatch):
    monkeypatch.setattr(mesh_module, "BUSY_POLL", 0.0)
    yields = on_yield(monkeypatch, lambda count: None)
    naps = 3 * mesh_module.NAP_MS / 1000
    late = [threading.Timer(naps / node, send, (nodes[node], 0)) for node in (1, 2)]
    for timer in late:
        timer.start()
    assert receive(nodes[0], 1, 2) == [FRAME, FRAME]
    for timer in late:
        timer.join()
    assert len(yields) == 2  # by the senders


@pytest.mark.slow
def test_polls_that_find_nothing_back_off(nodes, monkeypatch):
    monkeypatch.setattr(mesh_module, "BUSY_POLL", 30.0)
    monkeypatch.setattr(mesh_module, "CROWDED", 0.005)
    monkeypatch.setattr(mesh_module, "BACKOFF", (2, 4))
    yields = on_yield(monkeypatch, lambda count: time.sleep(2 * mesh_module.CROWDED))
    low = nodes[0]
    low._next_blocking = 2

    def polls(soon=False):
        sending = threading.Timer(0.0 if soon else 0.03, send, (nodes[1], 0))
        sending.start()
        while soon and not low._peers[1].socket.poll(1000):
            pass
        assert receive(low, 1) == [FRAME]
        sending.join()
        count = len(yields) - 1  # one by the sender
        yields.clear()
        return count

    assert [polls() for _ in range(13)] == [1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    send(low, 1)  # receives nothing: no poll, so no backoff
    yields.clear()
    assert polls() == 1
    assert [polls() for _ in range(4)] == [0, 0, 0, 0]
    assert polls(soon=True) == 0
    assert [polls() for _ in range(4)] == [1, 0, 0, 1]


@pytest.mark.parametrize("late", [1, 2])
def test_a_deadline_names_the_peer_that_has_not_sent(nodes, monkeypatch, late):
    monkeypatch.setattr(mesh_module, "BUSY_POLL", 0.0)  # or what has come would be taken first
    send(nodes[3 - late], 0)
    while not nodes[0]._peers[3 - late].socket.poll(1000):
        pass
    with pytest.raises(LostError, match=f"^lost {NAMES[late]}: sent nothing for 0 s$"):
        receive(nodes[0], 1, 2, timeout=0.01)


def test_a_blocked_receive_ends_when_a_peer_goes(nodes):
    leaving = threading.Timer(0.1, nodes[2].close)
    leaving.start()
    with pytest.raises(LostError, match="lost third: its connection closed"):
        receive(nodes[0], 1)
    leaving.join()


def test_a_large_frame_has_left_when_an_exchange_is_over(nodes):
    """Its memory can be written again."""
    sent = bytearray(random.Random(0).randbytes(8 << 20))
    expected, memory = bytes(sent), bytearray(len(sent))
    nodes[1].exchange({0: memoryview(sent)}, {}, 10.0)
    sent[-64:] = bytes(64)
    assert nodes[0].exchange({}, {1: memoryview(memory)}, 10.0) == [(1, len(sent))]
    assert memory == expected


class Kept(zmq.MessageTracker):
    """A frame that nobody takes."""

    def wait(self, timeout=-1):
        raise zmq.NotDone


@pytest.fixture
def second_keeps(nodes, monkeypatch):
    """All frames are large, and what the first node sends to the second never leaves."""
    monkeypatch.setattr(mesh_module, "_LARGE", 0)
    send_on = mesh_module.ZmqMesh._send

    def sending(self, node, frame, deadline):
        tracker = send_on(self, node, frame, deadline)
        return Kept() if node == 1 else tracker

    monkeypatch.setattr(mesh_module.ZmqMesh, "_send", sending)


def test_who_does_not_take_a_large_frame_is_named_at_the_deadline(nodes, second_keeps):
    with pytest.raises(LostError, match=r"^lost second: it does not take what is sent$"):
        nodes[0].exchange(dict.fromkeys((2, 1), memoryview(FRAME)), {}, 0.01)


def test_while_a_large_frame_leaves_peers_are_watched(nodes, second_keeps):
    leaving = threading.Timer(0.1, nodes[2].close)
    leaving.start()
    with pytest.raises(LostError, match="lost third: its connection closed"):
        nodes[0].exchange({1: memoryview(FRAME)}, {}, 10.0)
    leaving.join()


def test_large_frames_go_round(nodes, monkeypatch):
    monkeypatch.setattr(mesh_module, "_LARGE", 0)
    rows = np.arange(3 * 4096, dtype=np.uint8).reshape(3, 4096)
    found = np.zeros((3, 3, 4096), np.uint8)  # [who received, who sent]

    def go_round(node):
        others = [other for other in range(3) if other != node]
        memory = {other: memoryview(found[node, other]) for other in others}
        for _ in range(20):
            sent = dict.fromkeys(others, memoryview(rows[node]))
            nodes[node].exchange(sent, memory, 10.0)

    threads = [threading.Thread(target=go_round, args=(node,)) for node in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for node in range(3):
        found[node, node] = rows[node]
        assert (found[node] == rows).all()


def zeromq_threads():
    """The threads of ZeroMQ in this process."""
    threads = Path("/proc/self/task").iterdir()
    return {int(thread.name) for thread in threads if "ZMQ" in (thread / "comm").read_text()}


def policies_of_a_new_context():
    """How the threads of a context are scheduled."""
    before = zeromq_threads()
    context = open_context()
    try:
        with context.socket(zmq.PAIR):
            deadline = time.monotonic() + 10
            while len(zeromq_threads() - before) < 2 and time.monotonic() < deadline:
                time.sleep(0.001)  # a thread takes its policy, then its name
            return {os.sched_getscheduler(thread) for thread in zeromq_threads() - before}
    finally:
        context.destroy(linger=0)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="needs Linux")
def test_threads_of_zeromq_wait_for_their_turn():
    assert policies_of_a_new_context() == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="needs Linux")
def test_where_threads_may_not_choose_they_work_all_the_same(monkeypatch):
    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert policies_of_a_new_context() == {os.SCHED_OTHER}

"""How a node waits for frames: awake for a bounded time, unless others want its core."""

import threading
import time

import pytest
import zmq

from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.net.zeromq import mesh as mesh_module
from pyllama_dist.net.zeromq import sockets
from pyllama_dist.net.zeromq.mesh import ZmqMesh

pytestmark = pytest.mark.timeout(30)

FRAME = bytes(range(64))


@pytest.fixture
def pair():
    """The meshes of two nodes."""
    context = zmq.Context()
    low, high = (ZmqMesh(context, "127.0.0.1") for _ in range(2))
    low.connect({1: Address("127.0.0.1", high.bind([0])[0])})
    names = ("low", "high")
    other = threading.Thread(target=high.greet, args=(bytes(16), 1, names, 10))
    other.start()
    low.greet(bytes(16), 0, names, 10)
    other.join()
    yield low, high
    low.close()
    high.close()
    context.destroy(linger=0)


def receive(mesh, node, timeout=10.0):
    memory = bytearray(len(FRAME))
    assert list(mesh.receive({node: memoryview(memory)}, timeout)) == [(node, len(FRAME))]
    return bytes(memory)


def watch(monkeypatch, module, name):
    """Goes on calling a function, and notes each call."""
    calls, function = [], getattr(module, name)

    def noted(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, noted)
    return calls


def test_a_frame_that_comes_soon_is_met_awake(pair, monkeypatch):
    low, high = pair
    looks = []

    def give_way():
        looks.append(None)
        if len(looks) == 3:
            high.send(0, memoryview(FRAME), 10)

    monkeypatch.setattr(sockets, "_SPIN", 30.0)
    monkeypatch.setattr(sockets, "_TAKEN", 30.0)
    monkeypatch.setattr(sockets, "_yield_core", give_way)
    naps = watch(monkeypatch, mesh_module, "poll")
    assert receive(low, 1) == FRAME
    assert len(looks) >= 3
    assert not naps


def test_a_frame_that_comes_late_is_met_asleep(pair, monkeypatch):
    low, high = pair
    monkeypatch.setattr(sockets, "_TAKEN", 30.0)
    naps, sleep = [], mesh_module.poll

    def sent_meanwhile(watched, deadline):
        naps.append(None)
        if len(naps) == 1:
            high.send(0, memoryview(FRAME), 10)
        return sleep(watched, deadline)

    monkeypatch.setattr(mesh_module, "poll", sent_meanwhile)
    assert receive(low, 1) == FRAME
    assert naps


def test_a_frame_that_never_comes_is_a_deadline(pair):
    with pytest.raises(LostError, match="lost high: sent nothing"):
        receive(pair[0], 1, timeout=0.01)


def test_a_core_that_others_want_is_left_to_them(pair, monkeypatch):
    low, high = pair
    monkeypatch.setattr(sockets, "_SPIN", 30.0)
    monkeypatch.setattr(sockets, "_TAKEN", 0.0005)
    monkeypatch.setattr(sockets, "_REST", 3)
    monkeypatch.setattr(sockets, "_yield_core", lambda: time.sleep(0.001))
    offers = watch(monkeypatch, sockets, "_yield_core")
    counts = []
    for _ in range(6):
        late = threading.Timer(0.05, high.send, (0, memoryview(FRAME), 10))
        late.start()
        assert receive(low, 1) == FRAME
        late.join()
        counts.append(len(offers))
    # Offered once and taken; three waits without an offer; then the same again.
    assert counts == [1, 1, 1, 1, 2, 2]

"""How a node waits for frames: awake for a bounded time, in which others may have its core."""

import threading
import time

import pytest
import zmq

from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.net.zeromq import mesh as mesh_module
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


def send(mesh, node):
    assert mesh.exchange([node], memoryview(FRAME), {}, 10.0) == []


def receive(mesh, node, timeout=10.0):
    memory = bytearray(len(FRAME))
    found = mesh.exchange([], memoryview(b""), {node: memoryview(memory)}, timeout)
    assert found == [(node, len(FRAME))]
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
            send(high, 0)

    monkeypatch.setattr(mesh_module, "SPIN", 30.0)
    monkeypatch.setattr(mesh_module, "yield_core", give_way)
    naps = watch(monkeypatch, mesh_module, "poll")
    assert receive(low, 1) == FRAME
    assert len(looks) >= 3
    assert not naps


def test_a_frame_that_comes_late_is_met_asleep(pair, monkeypatch):
    low, high = pair
    naps, sleep = [], mesh_module.poll

    def sent_meanwhile(watched, deadline):
        naps.append(None)
        if len(naps) == 1:
            send(high, 0)
        return sleep(watched, deadline)

    monkeypatch.setattr(mesh_module, "poll", sent_meanwhile)
    assert receive(low, 1) == FRAME
    assert naps


def test_a_core_that_others_take_is_not_asked_for_again(pair, monkeypatch):
    low, high = pair
    offers = []

    def taken():
        offers.append(None)
        time.sleep(2 * mesh_module.SPIN)

    monkeypatch.setattr(mesh_module, "yield_core", taken)
    late = threading.Timer(0.05, send, (high, 0))
    late.start()
    assert receive(low, 1) == FRAME
    late.join()
    assert len(offers) == 1


def test_a_frame_that_never_comes_is_a_deadline(pair):
    with pytest.raises(LostError, match="lost high: sent nothing"):
        receive(pair[0], 1, timeout=0.01)

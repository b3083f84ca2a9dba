"""Doors of data connections: names where both ends are on one machine, ports elsewhere."""

import secrets
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from pyllama_dist.net.zeromq.doors import endpoint, machine, open_door

ASK = "from pyllama_dist.net.zeromq.doors import machine; print(machine())"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def pair():
    """Two sockets of one context."""
    with zmq.Context() as context:
        one, two = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with closing(one), closing(two):
            one.linger = two.linger = 0
            one.rcvtimeo = 5000
            yield one, two


@pytest.mark.parametrize("beside", [pytest.param(True, marks=linux), False])
def test_who_is_told_of_a_door_reaches_it(pair, beside):
    one, two = pair
    door = open_door(one, "127.0.0.1", beside)
    assert isinstance(door, str if beside else int)
    two.connect(endpoint("127.0.0.1", door))
    two.send(b"hello")
    assert one.recv() == b"hello"


def test_a_door_is_a_port_where_the_system_has_no_names(pair, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda n: n * "too long")
    assert isinstance(open_door(pair[0], "127.0.0.1", beside=True), int)


@linux
def test_processes_of_a_machine_know_that_they_are_on_one():
    asked = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60, check=True
    )
    assert asked.stdout.strip() == machine() != ""


@linux
def test_in_a_network_of_its_own_a_process_is_on_another_machine():
    apart = ["unshare", "--user", "--net", sys.executable, "-c", ASK]
    try:
        asked = subprocess.run(apart, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not make a namespace")
    assert asked.stdout.strip() not in (machine(), "")


def test_a_system_that_tells_nothing_has_no_names(monkeypatch):
    def refuse(path):
        raise OSError

    monkeypatch.setattr(Path, "readlink", refuse)
    assert machine() == ""

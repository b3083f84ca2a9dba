"""Endpoints of data connections: names where both ends are on one machine, ports elsewhere."""

import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from pyllama_dist.net.zeromq import endpoints
from pyllama_dist.net.zeromq.endpoints import bind_endpoint, url

ASK = "import sys; from pyllama_dist.net.zeromq.endpoints import url; print(url('::1', {}))"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def pair():
    """Two sockets of one context."""
    with zmq.Context() as context:
        one, two = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with closing(one), closing(two):
            one.linger = two.linger = 0
            one.ipv6 = two.ipv6 = True
            one.rcvtimeo = 5000
            yield one, two


def met(pair, endpoint, way):
    """Whether one's endpoint is reached that way."""
    one, two = pair
    found = url("127.0.0.1", endpoint)
    two.connect(found)
    two.send(b"hello")
    return found.startswith(way) and one.recv() == b"hello"


@linux
def test_who_is_on_the_same_machine_comes_by_name(pair):
    assert met(pair, bind_endpoint(pair[0], "127.0.0.1"), "ipc://@pyllama-dist-")


def test_others_come_to_the_port(pair):
    port, _ = bind_endpoint(pair[0], "127.0.0.1")
    assert met(pair, (port, "@pyllama-dist-" + 32 * "0"), "tcp://127.0.0.1:")


def test_a_system_without_names_has_ports(pair, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    port, name = bind_endpoint(pair[0], "127.0.0.1")
    assert not name
    assert met(pair, (port, name), "tcp://127.0.0.1:")


def test_a_name_that_cannot_be_had_is_none(pair, monkeypatch):
    monkeypatch.setattr(endpoints.secrets, "token_hex", lambda n: n * "too long")
    assert bind_endpoint(pair[0], "127.0.0.1")[1] == ""


@linux
def test_few_files_are_too_few_for_a_name(pair, monkeypatch):
    limits = [(1024, 1 << 20)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    assert bind_endpoint(pair[0], "127.0.0.1")[1]
    assert limits == [(1024, 1 << 20), (1 << 14, 1 << 20)]
    limits[:] = [(1024, 4096)]
    assert not bind_endpoint(pair[1], "127.0.0.1")[1]
    assert limits == [(1024, 4096)]


@linux
@pytest.mark.parametrize("apart", [False, True])
def test_in_a_network_of_its_own_a_process_does_not_know_a_name(pair, apart):
    endpoint = bind_endpoint(pair[0], "127.0.0.1")
    command = ["unshare", "--user", "--net"] if apart else []
    command += [sys.executable, "-c", ASK.format(endpoint)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not make a namespace")
    way = f"tcp://[::1]:{endpoint[0]}" if apart else f"ipc://{endpoint[1]}"
    assert asked.stdout.strip() == way


def test_a_system_that_tells_no_names_has_ports(pair, monkeypatch):
    def refuse(path):
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert met(pair, bind_endpoint(pair[0], "127.0.0.1"), "tcp://127.0.0.1:")

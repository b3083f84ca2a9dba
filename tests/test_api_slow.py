"""Connections that are odd or slow: each ends at a deadline, and no other one does."""

import http.client
import json
import socket
import time

import pytest

from pyllama_dist.api import app, protocol
from tests.api_server import CHAT, HELLO, Running, send, serving

pytestmark = pytest.mark.timeout(120)

SOON = 0.3  # a deadline for tests
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", SOON)
    monkeypatch.setattr(app, "_BODY_SECONDS", SOON)
    with serving() as running:
        running.say("Hello there.")
        yield running


def connect(server: Running) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def dribble(connection: socket.socket, data: bytes) -> bytes:
    """Sends a byte now and then; what has come when the server closes."""
    connection.settimeout(0.02)
    found = b""
    for number in range(1000):
        try:
            part = connection.recv(65536)
        except TimeoutError:
            connection.sendall(data[number : number + 1])
            continue
        except ConnectionError:
            return found
        if not part:
            return found
        found += part
    raise AssertionError("it was not cut")


def status(connection: socket.socket) -> int:
    """That of an answer, which is read as a whole."""
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status


def refused(answer: bytes, status: int) -> dict:
    """The error of the last answer."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    last = head[head.rindex(b"HTTP/1.1") :]
    assert last.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert b"content-type: application/json" in last.lower()
    return json.loads(body)["error"]


def test_x4_a_body_has_one_length(server):
    with connect(server) as connection:
        connection.sendall(
            f"{HEAD}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_x4_a_slow_header_is_cut(server):
    with connect(server) as connection:
        answer = dribble(connection, HEAD.encode() + b"x-filler: " + b"a" * 2000)
        assert refused(answer, 408)["code"] == "timeout"


def test_x4_silence_is_cut(server):
    with connect(server) as connection:
        refused(connection.recv(65536), 408)
        assert connection.recv(1) == b""


def test_x4_a_slow_header_is_cut_after_a_request_too(server):
    with connect(server) as connection:
        connection.sendall(HEALTH)
        assert status(connection) == 200
        refused(dribble(connection, HEAD.encode() + b"x-filler: " + b"a" * 2000), 408)


def test_x4_a_slow_body_is_cut(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}content-length: 5000\r\n\r\n".encode())
        assert refused(dribble(connection, b" " * 5000), 408)["code"] == "timeout"


def test_x4_a_slow_body_that_nobody_reads_is_cut(server):
    with connect(server) as connection:
        connection.sendall(HEALTH[:-2] + b"content-length: 5000\r\n\r\n")
        assert dribble(connection, b" " * 5000).startswith(b"HTTP/1.1 200")


def test_x4_a_large_header_is_refused(server):
    with connect(server) as connection:
        connection.sendall(HEALTH[:-2] + b"x-filler: " + b"a" * 80_000)
        refused(connection.recv(65536), 400)


def test_x4_a_connection_between_two_requests_is_not_cut(server):
    with connect(server) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert status(connection) == 200
            time.sleep(3 * SOON)


def test_x4_an_answer_that_takes_longer_is_not_cut(server):
    server.root.pause = SOON
    with send(server, HELLO) as connection:
        connection.settimeout(20)
        assert status(connection) == 200

"""Connections that are odd or slow: each ends at a deadline, and no other one does."""

import http.client
import json
import socket
import time
from types import SimpleNamespace

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from pyllama_dist.api import app, protocol
from pyllama_dist.api.server import uvicorn_config
from tests.api_server import CHAT, HELLO, Running, connect, send, serving, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

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
        assert status(connection) == 200


def test_l3_a_slow_reader_holds_up_nobody_and_is_cut(monkeypatch):
    monkeypatch.setattr(protocol, "SEND_SECONDS", 2.0)
    with serving(n_blocks=1024, seq_len=8192, n_seqs=4) as server:
        server.root.says = []
        state = server.server.server_state
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        long = {"stream": True, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        with send(server, HELLO | long, slow):
            wait_until(lambda: _unsent(server) > 0, 60)  # all that is between the two is full
            (connection,) = state.connections
            with server.client() as client:
                for _ in range(5):
                    assert client.post(CHAT, json=HELLO | {"max_tokens": 5}).status_code == 200
                    assert _unsent(server) < 100_000
            wait_until(lambda: connection not in state.connections, 60)
            assert server.root.computed < 8000, "it was not cut: it came to its end"
        server.wait_empty()


def test_l3_the_end_of_an_answer_that_is_not_taken_is_cut(monkeypatch):
    """It is less than what makes the server pause, and the connection is closed after it."""
    monkeypatch.setattr(protocol, "SEND_SECONDS", 2.0)
    with serving() as server:
        (listener,) = server.server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(listener.getsockname())
            slow.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
            wait_until(lambda: 0 < _unsent(server) < 65536)
            wait_until(lambda: not server.server.server_state.connections, 20)


def _unsent(server: Running) -> int:
    return sum(
        one.transport.get_write_buffer_size() for one in server.server.server_state.connections
    )


def test_l3_a_reader_that_takes_parts_is_not_cut():
    """Of what waits for it, each time that it is looked at."""
    waiting, aborted, calls = [200_000, 190_000, 189_000], [], []
    loop = SimpleNamespace(call_later=lambda seconds, call: calls.append(call))
    config = uvicorn_config(None, "127.0.0.1", 0)
    connection = protocol.HttpProtocol(config, ServerState(), {}, loop)
    connection.transport = SimpleNamespace(
        get_write_buffer_size=lambda: waiting[0], abort=lambda: aborted.append(len(calls))
    )
    connection.flow = FlowControl(connection.transport)
    connection.pause_writing()
    while not aborted:
        del waiting[0]
        calls[-1]()
    assert aborted == [2]  # 1,000 bytes are too few

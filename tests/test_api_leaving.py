"""Clients that leave, a server that ends, a node that is lost: nothing stays behind."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from pyllama_dist.api import service
from pyllama_dist.api.errors import ApiError, unavailable
from pyllama_dist.api.service import Limits
from pyllama_dist.errors import NodeError, UsageError
from pyllama_dist.text.tokenizer import Tokenizer
from tests.api_server import CHAT, HELLO, error, send, serving, wait_until
from tests.api_storm import draw, routes_of, storm

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [False, True])
def test_l1_a_client_that_leaves_frees_its_place(server, stream, queued):
    server.say("word " * 100)
    server.root.pause = 0.02
    others = []
    try:
        for _ in range(4 * queued):  # those that run
            others.append(send(server, HELLO | {"stream": True}))
        if queued:
            wait_until(lambda: server.engine.load.running == 4)
        leaving = send(server, HELLO | {"stream": stream})
        wait_until(
            lambda: server.engine.load.waiting == 1 if queued else server.engine.load.running == 1
        )
        leaving.close()
        if queued:
            wait_until(lambda: server.engine.load.waiting == 0)
    finally:
        for other in others:
            other.close()
        server.root.pause = 0.0
    server.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize("count", [50, 200])
def test_l2_many_that_leave_leave_nothing(count):
    with serving(limits=Limits(4, count)) as server:  # who has left may be there for a moment
        server.say("word " * 50)
        server.root.pause = 0.002
        routes = routes_of(server.url)
        assert {CHAT, "/v1/completions"} <= set(routes)
        threads = threading.active_count()
        met = asyncio.run(storm(server.url, [draw(seed, routes) for seed in range(count)]))
        assert {what.partition(": ")[2] for what in met} == {"200", "left"}
        server.wait_empty()
        assert threading.active_count() <= threads


@pytest.mark.slow
def test_b4_many_requests_take_nothing_for_good():
    with serving() as server:
        server.say("Hello there.")
        routes, process = routes_of(server.url), psutil.Process()
        found = []
        for first in (0, 40, 80):
            clients = [draw(first + one, routes, ["end"]) for one in range(40)]
            met = asyncio.run(storm(server.url, clients, first=first, at_once=10))
            assert met == {"end: 200": 40}
            server.wait_empty()
            found.append((process.num_fds(), process.num_threads()))
        assert found[1] == found[2]


def test_l7_the_queue_has_an_end(server):
    server.say("word " * 40)
    server.root.pause = 0.02
    connections = [send(server, HELLO | {"stream": True}) for _ in range(12)]
    try:
        wait_until(lambda: server.engine.load.running + server.engine.load.waiting == 12)
        with server.client() as client:
            answer = client.post(CHAT, json=HELLO)
            assert error(answer, 429)["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
    finally:
        server.root.pause = 0.0
        for connection in connections:
            connection.close()
    server.wait_idle()


def test_l6_before_the_model_is_there():
    with serving() as running, running.client() as client:
        model, running.service.model = running.service.model, None
        answer = client.post(CHAT, json=HELLO)
        assert error(answer, 503)["code"] == "loading"
        assert answer.headers["retry-after"]
        error(client.get("/health"), 503)
        running.service.model = model


def test_l5_a_lost_node_ends_every_stream():
    with serving() as running, running.client() as client:
        running.say("word " * 100)
        running.root.pause = 0.02
        running.root.fails_at = (20, NodeError("lost worker 10.0.0.2:9990 in phase STEP: gone"))
        found: list[str] = []

        def ask() -> None:
            with running.client() as other:
                found.append(other.post(CHAT, json=HELLO | {"stream": True}).text)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        for text in found:
            last = json.loads(text.strip().rpartition("data: ")[2])["error"]
            assert last["code"] == "node_lost"
            assert "10.0.0.2:9990" in last["message"]
        assert len(found) == 3
        assert error(client.get("/health"), 503)["code"] == "node_lost"
        error(client.post(CHAT, json=HELLO), 503)
        assert "10.0.0.2:9990" in client.get("/nodes").json()["error"]


@pytest.mark.parametrize(
    ("why", "status"), [(NodeError("lost worker 10.0.0.2:9990"), 503), (RuntimeError("a bug"), 500)]
)
def test_l5_an_engine_that_has_failed_runs_nothing_and_is_noticed(monkeypatch, why, status):
    monkeypatch.setattr(service, "_WATCH_SECONDS", 0.01)
    running_one = 'vllm:num_requests_running{model_name="tiny"} 1.0'
    with serving() as running, running.client() as client:
        running.say("word " * 100)
        running.root.pause, running.root.check = 0.02, lambda: None
        with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer:
            wait_until(lambda: running_one in client.get("/metrics").text)
            running.root.fails_at = (len(running.root.steps) + 5, why)
            assert "error" in list(answer.iter_lines())[-2]
        loop = running.service.model.bridge._loop
        asyncio.run_coroutine_threadsafe(running.service.watch(), loop).result(20)
        error(client.get("/health"), status)
        assert running_one.replace("1.0", "0.0") in client.get("/metrics").text


def test_l5_a_node_that_is_lost_while_nobody_asks(monkeypatch):
    monkeypatch.setattr(service, "_WATCH_SECONDS", 0.01)
    with serving() as running, running.client() as client:
        looked = []

        def check() -> None:
            looked.append(1)
            if len(looked) == 3:
                raise NodeError("lost worker 10.0.0.2:9990 in phase STEP: gone")

        running.root.check = check
        loop = running.service.model.bridge._loop
        asyncio.run_coroutine_threadsafe(running.service.watch(), loop).result(20)
        assert len(looked) == 3
        assert error(client.get("/health"), 503)["code"] == "node_lost"


def test_l4_streams_are_told_that_the_server_ends():
    with serving() as running:
        running.say("word " * 200)
        running.root.pause = 0.02
        with (
            running.client() as client,
            client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            running.service.stop(unavailable("the server ends", "shutting_down"))
            rest = list(lines)
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_l1_a_text_that_is_refused_ends_those_before_it(server):
    server.say("word " * 100)
    server.root.pause = 0.02
    try:
        with server.client() as client:
            asked = {"prompt": ["Hello", "word " * 2000], "max_tokens": 400, "echo": True}
            found = error(client.post("/v1/completions", json=asked), 400)
        assert found["param"] == "prompt"
        server.wait_idle(2)  # the first text would take eight seconds
    finally:
        server.root.pause = 0.0


def test_an_error_that_is_told_often_keeps_nothing():
    with serving() as running, running.client() as client:
        running.service.stop(unavailable("the server ends", "shutting_down"))
        for _ in range(3):
            with pytest.raises(ApiError, match="the server ends"):
                running.service.ready()
        assert running.service.failure.__traceback__ is None
        error(client.get("/health"), 503)
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, HELLO),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/messages", HELLO | {"max_tokens": 5}),
        ("/v1/messages/count_tokens", HELLO),
        ("/v1/responses", {"input": "hello"}),
        ("/tokenize", {"content": "hello"}),
    ],
)
def test_while_a_long_prompt_is_tokenized_others_are_served(route, body, monkeypatch):
    going, done = threading.Event(), threading.Event()

    def slow(*args):
        going.set()
        assert done.wait(20)
        raise UsageError("that is all that is tested")

    with serving() as server, ThreadPoolExecutor() as pool, server.client() as client:
        for name in ("encode", "encode_raw", "encode_template"):
            monkeypatch.setattr(Tokenizer, name, slow)
        asked = pool.submit(httpx.post, server.url + route, json=body, timeout=30)
        try:
            assert going.wait(10)
            assert client.get("/health", timeout=5).status_code == 200
        finally:
            done.set()
        assert asked.result().status_code == 400

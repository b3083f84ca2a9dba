"""The server as clients meet it; numbers in names are those of the checks that users asked for."""

import json
import math
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from pyllama_dist.api import page
from pyllama_dist.api.errors import unavailable
from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Limits
from tests.api_server import serving

pytestmark = pytest.mark.timeout(120)

HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    server.say("Hello there.")
    server.root.pause = 0.0
    with server.client() as client:
        yield client
    server.wait_idle()


def events(text: str) -> list[dict]:
    """The data of a stream, which must be complete."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


def test_an_answer_in_one_piece(client):
    found = client.post(CHAT, json=HELLO).json()
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_p7_chunks_come_in_order(client):
    answer = client.post(CHAT, json=HELLO | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(list(delta) == ["content"] and delta["content"] for delta in deltas[1:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert not any("usage" in chunk for chunk in chunks)


def test_p7_usage_comes_last_and_only_if_asked_for(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(client.post(CHAT, json=HELLO | options).text)
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["choices"] == []
    whole = client.post(CHAT, json=HELLO).json()
    same = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [chunks[-1]["usage"][key] for key in same] == [whole["usage"][key] for key in same]


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 3, "seed": 5}])
def test_p9_the_stream_is_the_answer(client, server, extra):
    server.root.says = []
    asked = {**HELLO, "temperature": 0.9, "seed": 3, "max_tokens": 20, **extra}
    whole = client.post(CHAT, json=asked).json()
    chunks = events(client.post(CHAT, json=asked | {"stream": True}).text)
    for choice in whole["choices"]:
        parts = [
            part
            for chunk in chunks
            for part in chunk["choices"]
            if part["index"] == choice["index"]
        ]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [
            one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]
        ]
        assert logprobs == (choice["logprobs"] or {"content": []})["content"]


def test_p12_choices_differ_and_come_again(client, server):
    server.root.says = []
    asked = {**HELLO, "temperature": 1, "seed": 3, "max_tokens": 12, "n": 3}
    first, again = (client.post(CHAT, json=asked).json() for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again["choices"]]


BAD = [
    b"",
    b"[]",
    b'"x"',
    b"\0",
    b"\xff{}",
    b'{"messages": "\\ud800"}',
    b"[" * 100_000,
    b'{"messages": ' + b"[" * 100_000,
    b'{"temperature": ' + b"9" * 1_000_000 + b"}",
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_p1_what_is_no_request_is_refused(client, body):
    found = error(
        client.post(CHAT, content=body, headers={"content-type": "application/json"}), 400
    )
    assert found["type"] == "invalid_request_error"


FIELDS = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", True),
    ("temperature", "1"),
    ("top_p", 1.5),
    ("top_k", -2),
    ("min_p", -1),
    ("frequency_penalty", 3),
    ("presence_penalty", -3),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"999999": 1}),
    ("seed", 1 << 64),
    ("seed", 0.5),
    ("n", 0),
    ("n", 10**9),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_completion_tokens", 0),
    ("stop", ["a"] * 5),
    ("stop", ""),
    ("stop", [""]),
    ("stop", 5),
    ("stop", ["a"] * 10**6),
    ("top_logprobs", 21),
    ("top_logprobs", 2),
    ("stream_options", {"include_usage": True}),
    ("tools", [{"type": "function", "function": {"name": "a.b"}}]),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "x"}] * 10**4),
    ("response_format", {"type": "xml"}),
    ("reasoning_effort", "enormous"),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", {"tools": 1}),
    ("chat_template_kwargs", {"a": {"b": 1}}),
    ("chat_template_kwargs", {"a": "x" * 10_000}),
    ("modalities", ["audio"]),
    ("messages", []),
    ("messages", [{"role": "wizard", "content": "a"}]),
    ("messages", [{"role": "tool", "content": "a"}]),
    ("messages", [{"role": "user", "content": "a"}] * 10**5),
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: str(value)[:20])
def test_p2_x3_fields_have_bounds(client, server, name, value):
    found = error(client.post(CHAT, json=HELLO | {name: value}), 400)
    assert name in found["message"]
    assert server.is_idle()


@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream", "model"),
        *("stream_options", "max_tokens", "max_completion_tokens", "logprobs", "logit_bias"),
        *("frequency_penalty", "presence_penalty", "tools", "tool_choice", "response_format"),
        *("reasoning_effort", "chat_template_kwargs", "thinking", "modalities"),
    ],
)
def test_p2_null_is_as_if_it_were_not_there(client, name):
    assert client.post(CHAT, json=HELLO | {name: None}).status_code == 200


def test_p3_unknown_fields_are_ignored(client):
    answer = client.post(CHAT, json=HELLO | {"frobnicate": 1, "user": "x", "store": True})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}]
)
def test_p6_parts_that_are_no_text_are_named(client, part):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    found = error(client.post(CHAT, json={"messages": messages}), 400)
    assert found["param"] == "messages[0].content[1]"


def test_p6_roles_and_parts(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": ""},
        {"role": "system", "content": "in the middle"},
        {"role": "user", "content": "go on"},
    ]
    assert client.post(CHAT, json=HELLO | {"messages": messages}).status_code == 200


def test_p5_a_limit_on_tokens(client, server):
    server.say("one two three four five six seven eight")
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.post(CHAT, json=HELLO | {name: 3}).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 3
    both = {"max_tokens": 9, "max_completion_tokens": 2}
    assert client.post(CHAT, json=HELLO | both).json()["usage"]["completion_tokens"] == 2
    assert client.post(CHAT, json=HELLO | {"max_tokens": 10**9}).status_code == 200


def test_a_prompt_beyond_the_context(client):
    messages = [{"role": "user", "content": "word " * 2000}]
    found = error(client.post(CHAT, json={"messages": messages}), 400)
    assert found["code"] == "context_length_exceeded"
    assert "512" in found["message"]


@pytest.mark.parametrize("stop", ["there", ["zzz", "lo th"], "Hello there.", ["ll", "l"], "H"])
@pytest.mark.parametrize("stream", [False, True])
def test_s1_s3_stop_strings_never_leak(client, stop, stream):
    text, all_ = "Hello there.", [stop] if isinstance(stop, str) else stop
    answer = client.post(CHAT, json=HELLO | {"stop": stop, "stream": stream})
    if stream:
        chunks = events(answer.text)
        found = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        found, reason = choice["message"]["content"], choice["finish_reason"]
    assert found == text[: min(text.find(one) for one in all_ if one in text)]
    assert reason == "stop"


def test_s4_no_character_is_torn(client, server):
    text = "żółć 中文 👩‍👩‍👧 é"
    server.say(text)
    chunks = events(client.post(CHAT, json=HELLO | {"stream": True}).text)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


def test_s6_line_breaks_are_data(client, server):
    text = "a\nb\r\nc\u2028d\n\ndata: x"
    server.say(text)
    chunks = events(client.post(CHAT, json=HELLO | {"stream": True}).text)
    found = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert found == text


def test_s8_logprobs_are_those_of_the_model(client, server):
    server.root.says = []
    asked = HELLO | {"logprobs": True, "top_logprobs": 5, "max_tokens": 6}
    choice = client.post(CHAT, json=asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for one in content:
        top = [pair["logprob"] for pair in one["top_logprobs"]]
        assert top == sorted(top, reverse=True)
        assert one["logprob"] == top[0]  # greedy
        assert sum(map(math.exp, top)) <= 1
        assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"]


def test_s9_the_same_seed_alone_and_beside_others(client, server):
    server.root.says = []
    asked = {**HELLO, "temperature": 0.9, "seed": 7, "max_tokens": 16}
    alone = client.post(CHAT, json=asked).json()["choices"][0]["message"]["content"]
    found: list[str] = []

    def ask(seed: int) -> None:
        with server.client() as other:
            answer = other.post(CHAT, json=asked | {"seed": seed}).json()
            if seed == 7:
                found.append(answer["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone]


def test_c1_a_second_turn_reads_what_is_new(client, server):
    messages = [{"role": "user", "content": "tell me a long story about nothing " * 5}]
    first = client.post(CHAT, json={"messages": messages, "temperature": 0}).json()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    before = server.root.computed
    second = client.post(CHAT, json={"messages": messages, "temperature": 0}).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    made = second["usage"]["completion_tokens"]
    assert server.root.computed - before == second["usage"]["prompt_tokens"] - cached + made


def test_p11_usage_counts_the_tokens_of_the_prompt(client):
    counted = client.post("/tokenize", json={"messages": HELLO["messages"]}).json()
    found = client.post(CHAT, json=HELLO).json()["usage"]
    assert found["prompt_tokens"] == counted["count"] == len(counted["tokens"])
    assert found["prompt_tokens_details"]["cached_tokens"] <= found["prompt_tokens"] - 1


def test_tokens_and_back(client):
    tokens = client.post("/tokenize", json={"content": "Hello there."}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["content"] == "Hello there."
    error(client.post("/detokenize", json={"tokens": [10**6]}), 400)
    error(client.post("/tokenize", json={}), 400)


def test_completions_go_on_with_a_text(client, server):
    server.say(" there.")
    asked = {"prompt": "Hello", "max_tokens": 20, "temperature": 0}
    found = client.post("/v1/completions", json=asked).json()
    assert found["object"] == "text_completion"
    assert found["choices"][0]["text"] == " there."
    chunks = events(client.post("/v1/completions", json=asked | {"stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " there."
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    several = client.post("/v1/completions", json=asked | {"prompt": ["Hello", "Hi"]}).json()
    assert [choice["index"] for choice in several["choices"]] == [0, 1]


def test_completions_echo_the_logprobs_of_a_prompt(client, server):
    server.root.says = []
    tokens = client.post("/tokenize", json={"content": "some words"}).json()["tokens"]
    asked = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    logits = [server.root.logits_of(tokens[:n]).astype(float) for n in range(1, len(tokens))]
    expected = [
        float(row[token] - row.max() - math.log(sum(math.exp(x - row.max()) for x in row)))
        for row, token in zip(logits, tokens[1:], strict=True)
    ]
    assert choice["text"] == "some words"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def test_p10_paths_and_methods_that_are_not_there(client):
    assert error(client.get("/v1/nothing"), 404)["code"] == "not_found"
    answer = client.get(CHAT)
    error(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert "head" in error(client.post("/v1/embeddings", json={}), 404)["message"]
    assert client.request("TRACE", CHAT).status_code == 405


def test_a_model_of_another_name(client):
    found = error(client.post(CHAT, json=HELLO | {"model": "gpt-4"}), 404)
    assert found["code"] == "model_not_found"
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    error(client.get("/v1/models/gpt-4"), 404)


def test_metrics_have_names_that_dashboards_know(client, server):
    client.post(CHAT, json=HELLO)
    text = client.get("/metrics").text
    for name in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        'vllm:request_success_total{finished_reason="stop",model_name="tiny"}',
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="200"}',
    ):
        assert name in text, name
    assert "_created" not in text


def test_the_description_names_every_body(client):
    found = client.get("/openapi.json").json()
    schema = found["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].removeprefix("#/components/schemas/") in found["components"]["schemas"]


def test_the_dashboard_reads_what_is_there(client):
    client.post(CHAT, json=HELLO)
    dashboard = Path(page.__file__).parents[1] / "deploy" / "grafana.json"
    panels = json.loads(dashboard.read_text())["panels"]
    text = client.get("/metrics").text
    there = set(re.findall(r"^([a-z_:]+)\{", text, re.M))
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"[a-z_:]+(?=\{model_name|\[5m\])", target["expr"])
    }
    assert len(asked) > 15
    assert asked <= there


def test_the_page_runs_nothing_but_its_own(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for name in re.findall(r'(?:href|src)="(page/[^"]+)"', answer.text):
        assert client.get("/" + name).status_code == 200
    error(client.get("/page/..%2f__init__.py"), 404)


# Who leaves


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [False, True])
def test_l1_a_client_that_leaves_frees_its_place(server, stream, queued):
    server.say("word " * 100)
    server.root.pause = 0.02
    others = []
    try:
        for _ in range(4 * queued):  # those that run
            others.append(_send(server, HELLO | {"stream": True}))
        if queued:
            _wait(lambda: server.engine.load.running == 4)
        leaving = _send(server, HELLO | {"stream": stream})
        _wait(
            lambda: server.engine.load.waiting == 1 if queued else server.engine.load.running == 1
        )
        leaving.close()
        if queued:
            _wait(lambda: server.engine.load.waiting == 0)
    finally:
        for other in others:
            other.close()
        server.root.pause = 0.0
    server.wait_idle()


def test_l2_many_that_leave_leave_nothing(server):
    server.say("word " * 50)
    threads = threading.active_count()
    for number in range(100):
        connection = _send(server, HELLO | {"stream": bool(number % 2)})
        time.sleep(0.003 * (number % 5))
        connection.close()
    server.wait_idle()
    _wait(lambda: server.service._sequences == 0)
    assert not server.service._by_key
    _wait(lambda: not server.service.bridge._readers)
    assert threading.active_count() <= threads + 1


def test_l7_the_queue_has_an_end(server):
    server.say("word " * 40)
    server.root.pause = 0.02
    connections = [_send(server, HELLO | {"stream": True}) for _ in range(12)]
    try:
        _wait(lambda: server.engine.load.running + server.engine.load.waiting == 12)
        with server.client() as client:
            answer = client.post(CHAT, json=HELLO)
            assert error(answer, 429)["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
    finally:
        server.root.pause = 0.0
        for connection in connections:
            connection.close()
    server.wait_idle()


def _send(server, body) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps(body).encode()
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def _wait(is_so, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Who may ask


KEYED = Access(keys=("secret", "other"), origins=("https://good.example",))


@pytest.fixture(scope="module")
def keyed():
    with serving(KEYED, Limits(4, 8)) as running:
        running.say("Hello there.")
        yield running


ROUTES = [
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/nodes"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "//v1/models"),
    ("GET", "/v1/../metrics"),
    ("GET", "/%2e/metrics"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret"},
        {"authorization": "Basic secret"},
        {"authorization": "Bearer x y"},
        {"x-api-key": "wrong"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_x1_no_route_without_a_key(keyed, method, path, headers):
    with keyed.client() as client:
        answer = client.request(method, keyed.url + path + "?api_key=secret", headers=headers)
        found = error(answer, 401)
    assert found["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_x1_keys_in_their_places(keyed):
    with keyed.client() as client:
        for headers in (
            {"authorization": "Bearer secret"},
            {"authorization": "bearer other"},
            {"x-api-key": "secret"},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 200
        twice = [("authorization", "Bearer secret"), ("authorization", "Bearer wrong")]
        error(client.get("/v1/models", headers=twice), 401)
        assert client.get("/health").status_code == 200


def test_x1_a_host_that_is_a_path_opens_nothing(keyed):
    with keyed.client() as client:
        for host in ("a/?x=", "localhost/health?", "localhost:1/health#"):
            error(client.get("/v1/models", headers={"host": host}), 403)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80"}, 403),
        ({"host": "localhost:1234"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
    ids=str,
)
def test_x2_hosts_and_origins(client, headers, status):
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_x2_origins_that_are_allowed(keyed):
    origin = {"origin": "https://good.example"}
    with keyed.client() as client:
        asked = client.options(CHAT, headers=origin | {"access-control-request-method": "POST"})
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == "https://good.example"
        answer = client.get("/v1/models", headers=origin | {"x-api-key": "secret"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in answer.headers


def test_x2_a_form_cannot_ask(client):
    body = json.dumps(HELLO)
    error(client.post(CHAT, content=body, headers={"content-type": "text/plain"}), 415)
    error(client.post(CHAT, content=body), 415)


def test_x4_a_body_has_one_length(server):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            "content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_x8_the_log_has_neither_prompt_nor_key(keyed, caplog):
    caplog.set_level("DEBUG", logger="pyllama_dist")
    asked = HELLO | {"messages": [{"role": "user", "content": "swordfish"}]}
    with keyed.client() as client:
        client.post(CHAT, json=asked, headers={"x-api-key": "secret"})
    assert CHAT in caplog.text
    assert "swordfish" not in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("id_", ["abc-123", "x" * 64])
def test_x9_a_request_keeps_its_id(client, id_):
    assert client.get("/health", headers={"x-request-id": id_}).headers["x-request-id"] == id_


@pytest.mark.parametrize("id_", ["a b", "x" * 65])
def test_x9_an_odd_id_is_replaced(client, id_):
    found = client.get("/health", headers={"x-request-id": id_}).headers["x-request-id"]
    assert found != id_
    assert found.isalnum()


# What fails


def test_l6_before_the_model_is_there():
    with serving() as running, running.client() as client:
        engine, running.service.engine = running.service.engine, None
        answer = client.post(CHAT, json=HELLO)
        assert error(answer, 503)["code"] == "loading"
        assert answer.headers["retry-after"]
        error(client.get("/health"), 503)
        running.service.engine = engine


def test_l5_a_lost_node_ends_every_stream():
    from pyllama_dist.errors import NodeError

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

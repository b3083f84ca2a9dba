"""Answers of the server as clients meet them; numbers in names are those of the checks."""

import json
import math
import re
import socket
import threading
from pathlib import Path

import pytest

from pyllama_dist.api import page
from pyllama_dist.api.app import DIALECTS, make_app
from pyllama_dist.api.metrics import Metrics
from pyllama_dist.api.server import bind, uvicorn_config
from pyllama_dist.api.service import Service
from tests.api_server import CHAT, HELLO, LIMITS, OPEN, error, events, serving, wait_until

pytestmark = pytest.mark.timeout(120)


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


def test_tokens_do_not_wait_for_the_client_to_acknowledge_those_before():
    config = uvicorn_config(make_app(Service(("x",), LIMITS, Metrics("x")), OPEN), "127.0.0.1", 0)
    with bind(config) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


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


def test_p5_a_limit_on_tokens(client, server):
    server.say("one two three four five six seven eight")
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.post(CHAT, json=HELLO | {name: 3}).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 3
    both = {"max_tokens": 9, "max_completion_tokens": 2}
    assert client.post(CHAT, json=HELLO | both).json()["usage"]["completion_tokens"] == 2
    assert client.post(CHAT, json=HELLO | {"max_tokens": 10**9}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_p11_usage_ends_with_the_answer_wherever_the_engine_is(path, caplog):
    caplog.set_level("INFO", logger="pyllama_dist.api.request_log")
    with serving() as server, server.client() as client:
        bridge = server.service.model.bridge
        wake = bridge._wake

        def wake_late(rows: int, seconds: float) -> None:
            if server.is_idle():  # nothing is read before all tokens are there
                wake(rows, seconds)

        bridge._wake = wake_late
        server.say("Hello there. What else shall I say?")
        asked = HELLO | {"prompt": "hello", "stop": "there", "max_tokens": 50}
        usage = client.post(path, json=asked).json()["usage"]
        said = server.root.says
        count = next(n for n in range(50) if "there" in server.parts.tokenizer.decode(said[:n]))
        assert count < len(said) - 1
        assert usage["completion_tokens"] == count
        wait_until(lambda: caplog.records)
        (record,) = caplog.records
        assert record.fields["completion_tokens"] == count


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


def test_t10_each_of_the_ends_ends(client, server):
    tokenizer = server.parts.tokenizer
    ends = sorted(tokenizer.eos_ids)
    assert len(ends) == 3
    said = tokenizer.encode("Hello there.")
    for end in ends:
        server.root.says = [*said, end, *said, min(ends)]
        choice = client.post(CHAT, json=HELLO).json()["choices"][0]
        assert choice["message"]["content"] == "Hello there."
        assert choice["finish_reason"] == "stop"


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


@pytest.mark.parametrize("text", [" there.", "\n\nIt is so.", "\n"])
def test_completions_tell_the_logprobs_of_all_that_is_said(client, server, text):
    server.say(text)
    asked = {"prompt": "Hello", "max_tokens": 20, "temperature": 0, "logprobs": 0}
    (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
    assert choice["text"] == text
    assert "".join(choice["logprobs"]["tokens"]) == text
    assert choice["logprobs"]["text_offset"][0] == 0


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


def test_the_description_names_every_route(client, server):
    described = client.get("/openapi.json").json()["paths"]
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in server.server.config.app._app._app.routes
        for method in route.methods - {"HEAD"}
    }
    apart = {("/", "get"), ("/page/{name}", "get")}  # for people
    # Only to say why there is none.
    apart |= {("/v1/embeddings", "post"), *(("/v1/responses/{id}", m) for m in ("get", "delete"))}
    assert routes - apart == {
        (path, one) for path, item in described.items() for one in item if one != "parameters"
    }
    for path in DIALECTS:
        content = described[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


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

"""Requests that the server refuses, and what it takes nevertheless."""

import pytest

from tests.api_server import CHAT, HELLO, error

pytestmark = pytest.mark.timeout(120)


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
    ("repetition_penalty", 1e-50),
    ("repeat_penalty", 0),
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
    ("stop", ["a"] * 10**6),
    ("top_logprobs", 21),
    ("top_logprobs", 2),
    ("stream_options", {"include_usage": True}),
    ("tools", [{"type": "function", "function": {"name": "a.b"}}]),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "x"}] * 10**4),
    ("response_format", {"type": "xml"}),
    ("reasoning_effort", "enormous"),
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


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("there", "Hello "),
        (["there"], "Hello "),
        (["a", "b", "zz", "there"], "Hello "),
        ("🙂", "Hello there."),
        (["🙂"], "Hello there."),
        ([], "Hello there."),
        (None, "Hello there."),
    ],
)
def test_p4_stop_strings(client, stop, said):
    choice = client.post(CHAT, json=HELLO | {"stop": stop}).json()["choices"][0]
    assert choice["message"]["content"] == said
    assert choice["finish_reason"] == "stop"


def test_p4_an_emoji_stops(client, server):
    server.say("Hello 🙂 there.")
    choice = client.post(CHAT, json=HELLO | {"stop": "🙂"}).json()["choices"][0]
    assert choice["message"]["content"] == "Hello "


@pytest.mark.parametrize("stop", [["a"] * 5, "", [""], 5, [5], {"a": 1}, "x" * 257], ids=str)
def test_p4_what_is_no_stop_string(client, stop):
    assert "stop" in error(client.post(CHAT, json=HELLO | {"stop": stop}), 400)["param"]


KWARGS = [
    *({name: 1} for name in ("messages", "tools", "documents", "add_generation_prompt")),
    *({name: 1} for name in ("range", "namespace", "dict", "cycler", "joiner", "lipsum")),
    *({name: 1} for name in ("raise_exception", "strftime_now", "bos_token", "chat_template")),
    {"a.b": 1},
    {"a": {"b": 1}},
    {"a": ["b"]},
    {"a": "x" * 10_000},
    {"a": "x" * 10_000_000},
    {str(number): number for number in range(33)},
]


@pytest.mark.parametrize("kwargs", KWARGS, ids=lambda kwargs: str(kwargs)[:30])
def test_x6_what_a_template_may_not_be_given(client, server, kwargs):
    found = error(client.post(CHAT, json=HELLO | {"chat_template_kwargs": kwargs}), 400)
    assert found["param"].startswith("chat_template_kwargs")
    assert len(found["message"]) < 200
    assert server.is_idle()


def test_x6_deep_nesting_is_refused(client):
    nested = '{"a":' * 100_000 + "1" + "}" * 100_000
    body = (
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": ' + nested + "}"
    )
    json_ = {"content-type": "application/json"}
    error(client.post(CHAT, content=body + nested + "}", headers=json_), 400)
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_x6_what_a_template_may_be_given(client):
    kwargs = {"enable_thinking": False, "a_name": "text", "n": 1.5, "none": None}
    assert client.post(CHAT, json=HELLO | {"chat_template_kwargs": kwargs}).status_code == 200


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


def test_a_prompt_beyond_the_context(client):
    messages = [{"role": "user", "content": "word " * 2000}]
    found = error(client.post(CHAT, json={"messages": messages}), 400)
    assert found["code"] == "context_length_exceeded"
    assert "512" in found["message"]


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


def test_x3_more_texts_than_there_is_room_for(client, server):
    for prompt in (["a"] * 13, ["a"] * 10**5, [[1]] * 10**5):
        found = error(client.post("/v1/completions", json={"prompt": prompt}), 400)
        assert "12 at most" in found["message"]
    assert server.is_idle()

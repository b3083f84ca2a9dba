"""Anthropic's API: the bodies, answers, streams and errors of /v1/messages, on the wire."""

import json
from contextlib import contextmanager

import pytest

from pyllama_dist.api import answer as answers
from pyllama_dist.api.anthropic.conversation import conversation
from pyllama_dist.api.anthropic.requests import MessagesRequest
from pyllama_dist.api.prompts import prompt_of
from pyllama_dist.api.requests import decode
from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Limits
from pyllama_dist.errors import NodeError
from tests.api_server import HELLO as CHAT_HELLO
from tests.api_server import send, serving, wait_until

pytestmark = pytest.mark.timeout(120)

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
# Calls as Hermes and Qwen3 write them, and all that templates read besides.
TEMPLATE = """
{%- if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}
{%- if reasoning_effort is defined %}[effort {{ reasoning_effort }}]{% endif %}
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{"name": <function-name>, "arguments": <args-json-object>} in <tool_call></tool_call>
{% endif %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</{{ message.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
WEATHER = {
    "name": "get_weather",
    "description": "The weather of some days.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
SING = {"name": "sing", "input_schema": {"type": "object", "properties": {}}}
INPUT = {"city": "Łódź", "days": 3}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź", "days": 3}}\n</tool_call>'
)
THOUGHT = "<think>Two and two.\n\nSo: four.</think>\n\n"
USER = {"role": "user", "content": "hello"}
HELLO = {"model": "tiny", "max_tokens": 300, "temperature": 0, "messages": [USER]}
SURE = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}
SHAPE = {"output_config": {"format": {"type": "json_schema", "schema": SURE}}}
ASK = HELLO | {"tools": [WEATHER, SING]}


@pytest.fixture(scope="module")
def server():
    with serving(template=TEMPLATE, seq_len=1024, n_blocks=128) as running:
        with running.client() as client:
            # The thread and the process that make grammars stay with the server.
            client.post(MESSAGES, json=HELLO | SHAPE | {"max_tokens": 1})
        yield running


@pytest.fixture
def prompts(server, monkeypatch):
    """The texts that the model has read."""
    found, submit = [], server.engine.submit_all

    def noted(requests):
        found.extend(server.parts.tokenizer.decode(request.prompt) for request in requests)
        return submit(requests)

    monkeypatch.setattr(server.engine, "submit_all", noted)
    return found


def events(answer) -> list[dict]:
    """The events of a stream, whose names are their types."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    found = []
    for block in answer.text[:-2].split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def joined(told: list[dict]) -> dict:
    """The message that the events of a stream add up to."""
    message, inputs = told[0]["message"], {}
    for event in told:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert index == len(message["content"])
                message["content"].append(block)
            case {"type": "content_block_delta", "index": index, "delta": delta}:
                assert index == len(message["content"]) - 1
                block = message["content"][index]
                match delta.pop("type"), delta, block["type"]:
                    case "text_delta", {"text": text}, "text":
                        block["text"] += text
                    case "thinking_delta", {"thinking": text}, "thinking":
                        block["thinking"] += text
                    case "signature_delta", {"signature": text}, "thinking":
                        block["signature"] = text
                    case "input_json_delta", {"partial_json": text}, "tool_use":
                        inputs[index] = inputs.get(index, "") + text
                    case wrong:
                        raise AssertionError(wrong)
            case {"type": "content_block_stop", "index": index} if index in inputs:
                message["content"][index]["input"] = json.loads(inputs[index])
            case {"type": "message_delta", "delta": delta, "usage": usage}:
                message |= delta
                message["usage"] = usage
    return message


def error(answer, status: int, type_: str) -> str:
    """What the error object of an answer says."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert set(found) == {"type", "error", "request_id"}
    assert found["type"] == "error"
    assert found["request_id"] == answer.headers["x-request-id"]
    assert set(found["error"]) == {"type", "message"}
    assert found["error"]["type"] == type_
    return found["error"]["message"]


def invalid(answer) -> str:
    return error(answer, 400, "invalid_request_error")


def content_of(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    return answer.json()["content"]


# Answers.


def test_a_message_in_one_piece(server, client):
    found = client.post(MESSAGES, json=HELLO).json()
    id_, usage = found.pop("id"), found.pop("usage")
    assert id_.startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello there."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage["output_tokens"] == len(server.parts.tokenizer.encode("Hello there."))


def test_p7_events_come_in_order(client):
    told = events(client.post(MESSAGES, json=HELLO | {"stream": True}))
    types = [event["type"] for event in told]
    assert types[:2] == ["message_start", "content_block_start"]
    assert set(types[2:-3]) == {"content_block_delta"}
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    message = told[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert message["usage"]["output_tokens"] == 0
    assert told[1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert "".join(event["delta"]["text"] for event in told[2:-3]) == "Hello there."
    assert told[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


SAID = {
    "text": ("Hello there.", {}, ["text"], "end_turn"),
    "nothing": ("", {}, [], "end_turn"),
    "cut text": ("Hello there, you all.", {"max_tokens": 3}, ["text"], "max_tokens"),
    "stopped text": ("Hello there.", {"stop_sequences": ["zz", "re"]}, ["text"], "stop_sequence"),
    "thought": (THOUGHT + "Four.", {}, ["thinking", "text"], "end_turn"),
    "cut thought": (THOUGHT + "Four.", {"max_tokens": 12}, ["thinking"], "max_tokens"),
    "call": (CALL, {}, ["tool_use"], "tool_use"),
    "calls": (
        THOUGHT + "Let me see." + CALL + "And on." + CALL + CALL,
        {},
        ["thinking", "text", "tool_use", "text", "tool_use", "tool_use"],
        "tool_use",
    ),
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_p9_the_stream_is_the_message(server, client, said):
    text, extra, types, reason = said
    server.say(text)
    whole = client.post(MESSAGES, json=ASK | extra).json()
    found = joined(events(client.post(MESSAGES, json=ASK | extra | {"stream": True})))
    assert [block["type"] for block in whole["content"]] == types
    assert whole["stop_reason"] == reason
    for message in (whole, found):
        message.pop("id")
        for block in message["content"]:
            block.pop("id", None)
        usage = message["usage"]
        usage["read"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
    assert found == whole


def test_blocks_are_what_the_model_wrote(server, client):
    server.say(THOUGHT + "Let me see." + CALL)
    thought, text, call = content_of(client.post(MESSAGES, json=ASK))
    assert thought.pop("signature")
    assert thought == {"type": "thinking", "thinking": "Two and two.\n\nSo: four."}
    assert text == {"type": "text", "text": "Let me see."}
    assert call.pop("id")
    assert call == {"type": "tool_use", "name": "get_weather", "input": INPUT}


def test_t14_a_call_that_is_cut_off_has_no_input(server, client):
    server.say(CALL)
    size = len(server.parts.tokenizer.encode(CALL.partition("days")[0]))
    cut = ASK | {"max_tokens": size}
    found = client.post(MESSAGES, json=cut).json()
    (call,) = found["content"]
    assert (call["name"], call["input"], found["stop_reason"]) == ("get_weather", {}, "max_tokens")
    told = events(client.post(MESSAGES, json=cut | {"stream": True}))
    pieces = [event["delta"].get("partial_json", "") for event in told if "delta" in event]
    assert "".join(pieces).startswith('{"city": "Łódź"')


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_x6_any_depth_is_the_request_s_fault(client, path):
    """Each function that walks a body has a depth of its own."""
    json_ = {"content-type": "application/json"}
    message = (
        '{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": '
    )
    found = set()
    for depth in range(880, 1000):
        nested = '{"a":' * depth + "1" + "}" * depth
        body = f'{{"max_tokens": 1, "messages": [{message}{nested}}}]}}, {json.dumps(USER)}]}}'
        found.add(client.post(path, content=body, headers=json_).status_code)
    assert found == {400}


@pytest.mark.parametrize("stream", [False, True])
def test_c6_a_context_that_is_full_is_no_limit_of_the_client(server, client, stream):
    server.say("word " * 50, end=False)
    answer = client.post(MESSAGES, json=HELLO | {"max_tokens": 10**6, "stream": stream})
    found = joined(events(answer)) if stream else answer.json()
    assert found["stop_reason"] == "model_context_window_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_s1_a_stop_sequence_is_named_and_does_not_leak(client, stream):
    asked = HELLO | {"stop_sequences": ["zzz", "lo th"], "stream": stream}
    answer = client.post(MESSAGES, json=asked)
    found = joined(events(answer)) if stream else answer.json()
    assert found["content"] == [{"type": "text", "text": "Hel"}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "lo th")


def test_c1_tokens_from_the_cache_are_counted_apart(client):
    asked = HELLO | {"system": "Tell what is true. " * 20}
    first, again = (client.post(MESSAGES, json=asked).json()["usage"] for _ in range(2))
    assert first["cache_read_input_tokens"] < 16 < again["cache_read_input_tokens"]
    totals = [one["input_tokens"] + one["cache_read_input_tokens"] for one in (first, again)]
    assert totals[0] == totals[1]
    last = events(client.post(MESSAGES, json=asked | {"stream": True}))[-2]["usage"]
    assert last == again


# Requests.


def test_system_texts(client, prompts):
    header = "x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;"
    blocks = [
        {"type": "text", "text": header},
        {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "You are kind."},
    ]
    for system in ("You are brief.\nYou are kind.", blocks):
        assert client.post(MESSAGES, json=HELLO | {"system": system}).status_code == 200
    assert prompts[0] == prompts[1]
    assert "<system>You are brief.\nYou are kind.</system><user>hello</user>" in prompts[0]
    for system in ("", None, header, [blocks[0]], []):
        assert client.post(MESSAGES, json=HELLO | {"system": system}).status_code == 200
    assert len(set(prompts[2:7])) == 1
    assert "system" not in prompts[2]
    within = [USER, {"role": "system", "content": "Now sing."}, USER]
    assert client.post(MESSAGES, json=HELLO | {"messages": within}).status_code == 200
    assert prompts[7].count("<system>Now sing.</system><user>") == 1


def test_t15_calls_and_results_are_in_the_next_prompt(server, client, prompts):
    server.say(THOUGHT + "Let me see." + CALL)
    content = content_of(client.post(MESSAGES, json=ASK))
    results = [
        {"type": "text", "text": "And tomorrow?"},
        {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "rain"},
        {
            "type": "tool_result",
            "tool_use_id": "x",
            "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "wind"}],
            "is_error": True,
        },
        {"type": "tool_result", "tool_use_id": "y"},
        {"type": "text", "text": "Be brief."},
    ]
    hidden = {"type": "redacted_thinking", "data": "abc"}
    answered = {"role": "assistant", "content": [hidden, *content]}
    history = [USER, answered, {"role": "user", "content": results}]
    assert client.post(MESSAGES, json=ASK | {"messages": history}).status_code == 200
    said = THOUGHT.replace("\n\n<", "<").removesuffix("\n\n") + "Let me see." + CALL
    told = "<tool>rain</tool><tool>Error: no\nwind</tool><tool></tool>"
    question = "<user>And tomorrow?\nBe brief.</user>"
    assert prompts[1] == f"{prompts[0]}{said}</assistant>{told}{question}<assistant>"


def test_results_alone_are_no_message_of_the_user(client, prompts):
    call = {"type": "tool_use", "id": "x", "name": "sing", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "la"}
    history = [
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert client.post(MESSAGES, json=ASK | {"messages": history}).status_code == 200
    assert prompts[0].endswith("</tool_call></assistant><tool>la</tool><assistant>")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
UNREADABLE = [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, "[1]"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "[0]"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}],
                }
            ]
        },
        "[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "[0]"),
    ({"messages": [{"role": "assistant", "content": [IMAGE]}, USER]}, "[0]"),
    ({"messages": [{"role": "system", "content": [IMAGE]}, USER]}, "[0]"),
]


@pytest.mark.parametrize(("body", "place"), UNREADABLE, ids=range(len(UNREADABLE)))
def test_p6_blocks_that_cannot_be_read_are_named(client, body, place):
    for path in (MESSAGES, COUNT):
        said = invalid(client.post(path, json=HELLO | body))
        assert f"messages[0].content{place}: " in said
    block = body["messages"][0]["content"][-1]
    assert repr(block.get("content", [block])[0]["type"]) in said


def test_p6_a_system_block_that_cannot_be_read_is_named(client):
    assert "system[0]: " in invalid(client.post(MESSAGES, json=HELLO | {"system": [IMAGE]}))


def test_p6_a_message_of_the_assistant_is_not_continued(client):
    history = [USER, {"role": "assistant", "content": "The answer is ("}]
    assert "continue" in invalid(client.post(MESSAGES, json=HELLO | {"messages": history}))
    assert client.post(COUNT, json=HELLO | {"messages": history}).status_code == 200


FIELDS = [
    ("max_tokens", 0),
    ("max_tokens", None),
    ("max_tokens", "5"),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 1.5),
    ("top_k", -1),
    ("stop_sequences", [""]),
    ("stop_sequences", "a"),
    ("stop_sequences", ["a"] * 10**5),
    ("messages", []),
    ("messages", [{"role": "tool", "content": "a"}]),
    ("messages", [{"role": "user"}]),
    ("messages", [USER] * 10**5),
    ("system", 5),
    ("tools", [{"name": "a.b", "input_schema": {}}]),
    ("tools", [{"input_schema": {}}]),
    ("tools", [SING] * 10**4),
    ("tool_choice", "auto"),
    ("tool_choice", {"type": "some"}),
    ("tool_choice", {"type": "tool"}),
    ("tool_choice", {"type": "tool", "name": "fly"}),
    ("tool_choice", {"type": "any"}),
    ("thinking", {"type": "perhaps"}),
    ("thinking", {"type": "enabled", "budget_tokens": 0}),
    ("output_config", {"effort": "enormous"}),
    ("output_config", {"format": {"type": "xml", "schema": {}}}),
    ("stream", 1),
]


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: str(value)[:20])
def test_p2_x3_fields_have_bounds(client, server, name, value):
    assert name in invalid(client.post(MESSAGES, json=HELLO | {name: value}))
    assert server.is_idle()


def test_p2_p3_nulls_and_unknown_fields_are_ignored(client):
    names = ("system", "tools", "tool_choice", "thinking", "output_config", "model", "stream")
    names += ("temperature", "top_p", "top_k", "stop_sequences", "cache_control", "container")
    assert client.post(MESSAGES, json=HELLO | dict.fromkeys(names)).status_code == 200
    others = {"metadata": {"user_id": "x"}, "service_tier": "auto", "frobnicate": [1]}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    answer = client.post(f"{MESSAGES}?beta=true", json=HELLO | others, headers=headers)
    assert answer.status_code == 200


def test_sampling_is_as_in_chat(server, client, prompts):
    server.root.says = []
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 1, "max_tokens": 9}
    (block,) = content_of(client.post(MESSAGES, json=HELLO | sampling))
    asked = {"messages": [USER], **sampling, "thinking": {"type": "disabled"}}
    found = client.post("/v1/chat/completions", json=asked).json()
    assert prompts[0] == prompts[1]
    assert block["text"] == found["choices"][0]["message"]["content"]


# Tools and structured answers.


def test_tools_of_the_client_are_read_and_others_skipped(client, prompts):
    other = {"type": "web_search_20260209", "name": "web_search", "max_uses": 2}
    toolset = {"type": "browser_toolset_20260801"}
    custom = WEATHER | {"type": "custom", "cache_control": {"type": "ephemeral"}}
    for tools in ([WEATHER], [other, custom, toolset]):
        assert client.post(MESSAGES, json=HELLO | {"tools": tools}).status_code == 200
    assert prompts[0] == prompts[1]
    schema = json.dumps(WEATHER["input_schema"]["properties"])
    assert schema in prompts[0]
    assert WEATHER["description"] in prompts[0]
    assert client.post(MESSAGES, json=HELLO | {"tools": [other]}).status_code == 200
    assert "<tools>" not in prompts[2]


# As GLM-4-0414 writes calls: here the grammar leaves nothing else.
BARE = """
{%- for tool in tools or [] %}## {{ tool.function.name }}{{ tool.function | tojson }}{% endfor %}
{%- for message in messages %}<{{ message.role }}>{{ message.get("metadata", "") }}
{{ message.content }}{% endfor %}{# observation #}<assistant>"""


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any"}, {"look", "sing"}),
        ({"type": "tool", "name": "look"}, {"look"}),
        ({"type": "tool", "name": "sing"}, {"sing"}),
    ],
    ids=str,
)
def test_t16_a_call_that_is_required_comes(choice, names):
    """Of random logits: only the grammar makes sense of them."""
    days = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]}
    look = {"name": "look", "input_schema": days | {"additionalProperties": False}}
    sing = {"name": "sing", "input_schema": {"type": "object", "additionalProperties": False}}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 3}}
    asked = HELLO | {"tools": [look, sing], "tool_choice": choice, "max_tokens": 800} | thinking
    with (
        serving(Access(), Limits(4, 8), BARE, seq_len=1024, n_blocks=128) as bare,
        bare.client() as client,
    ):
        found = client.post(MESSAGES, json=asked).json()
    calls = [block for block in found["content"] if block["type"] == "tool_use"]
    assert calls
    assert {call["name"] for call in calls} <= names
    assert all(call["name"] == "sing" or call["input"]["days"] in (1, 2) for call in calls)


def test_t15_a_call_of_glm_4_is_in_the_next_prompt_as_the_model_wrote_it():
    call = {"type": "tool_use", "id": "x", "name": "get_weather", "input": INPUT}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "rain"}
    history = [
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    body = json.dumps(ASK | {"messages": history}).encode()
    with serving(template=BARE) as bare:
        asked = conversation(decode(body, MessagesRequest))
        text = bare.parts.tokenizer.decode(prompt_of(bare.service, asked).tokens)
    written = '<assistant>get_weather\n{"city": "Łódź", "days": 3}'
    assert text.endswith(f"{written}<observation>\nrain<assistant>")


@pytest.mark.parametrize("type_", ["auto", "any"])
def test_calls_side_by_side_can_be_forbidden(type_):
    """The grammar is that of chat, where this is `parallel_tool_calls`."""
    for forbidden in (None, False, True):
        choice = {"type": type_, "disable_parallel_tool_use": forbidden}
        body = json.dumps(ASK | {"tool_choice": choice}).encode()
        asked = conversation(decode(body, MessagesRequest))
        assert asked.parallel_tool_calls is (not forbidden)


def test_t16_none_is_none(server, client):
    server.say(CALL)
    found = client.post(MESSAGES, json=ASK | {"tool_choice": {"type": "none"}}).json()
    assert {block["type"] for block in found["content"]} == {"text"}
    assert found["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("thinking", "said"),
    [
        (None, "False"),
        ({"type": "disabled"}, "False"),
        ({"type": "adaptive"}, "True"),
        ({"type": "enabled", "budget_tokens": 2000}, "True"),
    ],
    ids=str,
)
def test_thinking_is_asked_for(client, prompts, thinking, said):
    assert client.post(MESSAGES, json=HELLO | {"thinking": thinking}).status_code == 200
    assert prompts[0].startswith(f"[thinking {said}]<user>")


def test_effort_is_told_to_the_template(client, prompts):
    assert client.post(MESSAGES, json=HELLO | {"output_config": {"effort": "max"}}).is_success
    assert "[effort max]" in prompts[0]


def test_a_thought_ends_with_its_budget(server, client):
    server.root.says = server.parts.tokenizer.encode("<think>" + "on and " * 40)
    asked = {"thinking": {"type": "enabled", "budget_tokens": 6}, "max_tokens": 40}
    found = client.post(MESSAGES, json=HELLO | asked).json()
    assert found["content"][0]["type"] == "thinking"
    assert len(found["content"][0]["thinking"]) < 40
    assert found["usage"]["output_tokens_details"]["thinking_tokens"] < 20


def test_an_answer_has_the_shape_of_a_schema(server, client):
    server.say('{"sure": true} I think.')
    (block,) = content_of(client.post(MESSAGES, json=HELLO | SHAPE))
    assert json.loads(block["text"]) == {"sure": True}
    wrong = {"format": {"type": "json_schema", "schema": {"type": "sausage"}}}
    assert "sausage" in invalid(client.post(MESSAGES, json=HELLO | {"output_config": wrong}))


# Counting.


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"system": "Be brief.", "tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ],
    ids=str,
)
def test_p11_tokens_are_counted_as_the_message_has_them(server, client, extra):
    steps = len(server.root.steps)
    counted = {key: value for key, value in HELLO.items() if key in ("model", "messages")} | extra
    answer = client.post(COUNT, json=counted)
    assert len(server.root.steps) == steps
    count = answer.json()
    assert list(count) == ["input_tokens"]
    extra.pop("tool_choice", None)
    usage = client.post(MESSAGES, json=HELLO | extra).json()["usage"]
    assert count["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


# Errors.


def test_errors_of_the_body(client):
    headers = {"content-type": "application/json"}
    for path in (MESSAGES, COUNT):
        for body in (b"", b"[]", b"{", b"\xff{}", b"[" * 100_000):
            invalid(client.post(path, content=body, headers=headers))
        answer = client.post(path, content=b"{}", headers={"content-type": "text/plain"})
        error(answer, 415, "invalid_request_error")
        answer = client.post(path, content=b" " * (17 << 20), headers=headers)
        error(answer, 413, "request_too_large")


def test_p10_errors_of_paths_methods_and_models(client):
    for path in (MESSAGES, COUNT):
        answer = client.get(path)
        error(answer, 405, "invalid_request_error")
        assert answer.headers["allow"] == "POST"
        said = error(client.post(path, json=HELLO | {"model": "claude"}), 404, "not_found_error")
        assert "claude" in said
        assert "tiny" in said
    error(client.post(f"{MESSAGES}/batches", json={}), 404, "not_found_error")
    # Their names begin alike, but they are no paths of this API.
    assert client.post("/v1/messages_", json={}).json()["error"]["code"] == "not_found"


def test_a_prompt_beyond_the_context(client):
    asked = HELLO | {"messages": [{"role": "user", "content": "word " * 3000}]}
    said = invalid(client.post(MESSAGES, json=asked))
    assert "prompt is too long" in said
    assert "1024" in said


@pytest.mark.parametrize("path", [MESSAGES, COUNT, f"{MESSAGES}/"])
def test_x1_x2_errors_of_access(path):
    with serving(Access(keys=("secret",))) as running, running.client() as client:
        answer = client.post(path, json=HELLO)
        error(answer, 401, "authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer"
        error(client.post(path, headers={"x-api-key": "wrong"}), 401, "authentication_error")
        error(client.post(path, headers={"host": "evil.example"}), 403, "permission_error")
        error(client.post(path, headers={"origin": "https://evil"}), 403, "permission_error")
        running.say("Hello.")
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            status = client.post(path, json=HELLO, headers=headers).status_code
            assert status == (404 if path.endswith("/") else 200)


@contextmanager
def full(running):
    """A server on which the only place is taken."""
    running.root.pause = 0.05
    connection = send(running, CHAT_HELLO | {"stream": True, "ignore_eos": True})
    try:
        wait_until(lambda: running.engine.load.running == 1)
        yield
    finally:
        running.root.pause = 0.0
        connection.close()
        running.wait_idle()


def test_l7_the_queue_has_an_end():
    with serving(limits=Limits(1, 0)) as running, running.client() as client, full(running):
        answer = client.post(MESSAGES, json=HELLO)
        error(answer, 429, "rate_limit_error")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert client.post(COUNT, json=HELLO).status_code == 200


def test_l6_before_the_model_is_there(server, client):
    model, server.service.model = server.service.model, None
    try:
        for path in (MESSAGES, COUNT):
            answer = client.post(path, json=HELLO)
            error(answer, 503, "overloaded_error")
            assert answer.headers["retry-after"]
    finally:
        server.service.model = model


def test_what_nobody_foresaw(server, client, monkeypatch):
    monkeypatch.setattr(server.service, "check_model", None)
    error(client.post(MESSAGES, json=HELLO), 500, "api_error")


@pytest.mark.parametrize("stream", [False, True])
def test_l5_a_lost_node(stream):
    with serving() as running, running.client() as client:
        running.say("word " * 20)
        running.root.fails_at = (5, NodeError("lost worker 1"))
        answer = client.post(MESSAGES, json=HELLO | {"stream": stream})
        if not stream:
            assert "lost worker 1" in error(answer, 503, "overloaded_error")
            return
        last = events(answer)[-1]
        assert last["type"] == "error"
        assert last["error"]["type"] == "overloaded_error"
        assert "lost worker 1" in last["error"]["message"]
        assert last["request_id"] == answer.headers["x-request-id"]


def test_a_silent_stream_has_pings(server, client, monkeypatch):
    monkeypatch.setattr(answers, "PING_SECONDS", 0.01)
    server.root.pause = 0.1
    told = events(client.post(MESSAGES, json=HELLO | {"stream": True}))
    pings = [event for event in told if event["type"] == "ping"]
    assert pings
    assert pings[0] == {"type": "ping"}
    assert joined(told)["content"] == [{"type": "text", "text": "Hello there."}]


def test_the_paths_are_described_and_counted(client):
    found = client.get("/openapi.json").json()
    for path, body in ((MESSAGES, "MessagesRequest"), (COUNT, "CountTokensRequest")):
        post = found["paths"][path]["post"]
        schema = post["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(body)
        refused = post["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert refused["$ref"].endswith("/MessagesError")
        client.post(path, json=HELLO)
        text = client.get("/metrics").text
        assert f'handler="{path}",method="POST",status="200"' in text
    assert found["components"]["schemas"]["MessagesRequest"]["required"] == [
        "messages",
        "max_tokens",
    ]

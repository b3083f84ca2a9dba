"""/v1/responses before a model that says what a test wants."""

import json

import msgspec
import pytest

from pyllama_dist.api.requests import decode
from pyllama_dist.api.responses.conversation import chat_request
from pyllama_dist.api.responses.requests import ResponsesRequest
from pyllama_dist.errors import NodeError
from tests.api_server import CHAT, HELLO, error, serving
from tests.responses import RESPONSES, events, replayed, text_of, types, without_ids
from tests.test_api_tools import BARE, CALL, SCHEMA, TEMPLATE

pytestmark = pytest.mark.timeout(120)

ASK = {"input": "hello", "temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": False}
SING = {"type": "function", "name": "sing"}
THINKS = "<think>Let me see.</think>"


def running(template):
    with serving(template=template, seq_len=1024, n_blocks=128) as server:
        with server.client() as client:  # what checks grammars stays with the server
            body = ASK | {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 1}
            assert client.post(RESPONSES, json=body).status_code == 200
        yield server


def talking(server):
    server.say("Hello there.")
    with server.client() as client:
        yield client
    server.wait_idle()


@pytest.fixture(scope="module")
def server():
    yield from running(TEMPLATE)


@pytest.fixture
def client(server):
    yield from talking(server)


@pytest.fixture(scope="module")
def bare_server():
    yield from running(BARE)


@pytest.fixture
def bare_client(bare_server):
    """Of a model whose calls are text, so that a grammar can be made of them."""
    yield from talking(bare_server)


def ask(client, **body):
    """A response in one piece, which is also what its stream ends with."""
    answer = client.post(RESPONSES, json=ASK | body)
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    told = stream(client, **body)
    assert without_ids(replayed(told)) == without_ids(whole)
    return whole


def stream(client, **body):
    answer = client.post(RESPONSES, json=ASK | body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def test_a_response(client):
    found = ask(client, instructions="Be short.", metadata={"a": "b"}, max_output_tokens=100)
    assert found["id"].startswith("resp_")
    assert (found["object"], found["status"], found["model"]) == ("response", "completed", "tiny")
    assert found["completed_at"] >= found["created_at"]
    assert found["error"] is found["incomplete_details"] is found["previous_response_id"] is None
    assert found["instructions"] == "Be short."
    assert found["metadata"] == {"a": "b"}
    assert found["max_output_tokens"] == 100
    assert found["temperature"] == 0
    assert 0 < found["top_p"] <= 1  # the model's own
    assert found["store"] is found["background"] is False
    assert (found["tools"], found["tool_choice"], found["parallel_tool_calls"]) == (
        [],
        "auto",
        True,
    )
    assert found["text"] == {"format": {"type": "text"}}
    (item,) = found["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello there.", "annotations": [], "logprobs": []}
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert item == message


def test_usage_is_that_of_a_chat(client):
    chat = client.post(CHAT, json=HELLO).json()["usage"]
    usage = ask(client)["usage"]
    assert usage["input_tokens"] == chat["prompt_tokens"]
    assert usage["output_tokens"] == chat["completion_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] - 1
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_events_of_a_thought_a_text_and_calls(server, client):
    server.say(THINKS + "I look." + CALL + CALL)
    found = stream(client, tools=[WEATHER])
    text = ["output_item.added", "content_part.added"]
    end = ["content_part.done", "output_item.done"]
    arguments = [f"function_call_arguments.{name}" for name in ("delta", "done")]
    call = ["output_item.added", *arguments, "output_item.done"]
    assert types(found) == [
        *("created", "in_progress"),
        *(*text, "reasoning_text.delta", "reasoning_text.done", *end),
        *(*text, "output_text.delta", "output_text.done", *end),
        *(*call, *call),
        "completed",
    ]


def test_a_thought_a_text_and_calls(server, client):
    server.say(THINKS + "I look." + CALL + CALL)
    found = ask(client, tools=[WEATHER])
    thought, message, *calls = found["output"]
    assert thought["id"].startswith("rs_")
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert text_of(message) == "I look."
    assert len({call["id"] for call in calls}) == len({call["call_id"] for call in calls}) == 2
    for call in calls:
        assert call["id"].startswith("fc_")
        assert call["call_id"].startswith("call_")
        assert (call["type"], call["name"], call["status"]) == (
            *("function_call", "get_weather", "completed"),
        )
        assert json.loads(call["arguments"]) == {"city": "Łódź", "days": 3}
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert found["tools"] == [WEATHER | {"description": None}]


def test_text_between_calls_is_an_item_of_its_own(server, client):
    server.say("One." + CALL + "Two." + CALL)
    found = ask(client, tools=[WEATHER])
    types_ = [item["type"] for item in found["output"]]
    assert types_ == ["message", "function_call"] * 2


@pytest.mark.parametrize(
    ("says", "last"),
    [("one two three four five six", "message"), ("<think>" + "a b " * 9, "reasoning")],
)
def test_a_response_that_is_cut_off(server, client, says, last):
    server.say(says)
    found = ask(client, max_output_tokens=5)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["completed_at"] is None
    assert found["usage"]["output_tokens"] == 5
    (item,) = found["output"]
    assert (item["type"], item["status"]) == (last, "incomplete")
    assert types(stream(client, max_output_tokens=5))[-1] == "incomplete"


def test_a_call_that_is_cut_off(server, client):
    server.say(CALL)
    found = ask(client, tools=[WEATHER], max_output_tokens=30)
    assert found["status"] == found["output"][-1]["status"] == "incomplete"


def test_a_stop_string_completes_it(server, client):
    server.say("Hello there." + " word" * 50)
    count = len(server.parts.tokenizer.encode("Hello there"))
    for _ in range(5):  # the engine may have come further, now and then
        found = ask(client, stop="there")
        assert found["status"] == found["output"][0]["status"] == "completed"
        assert text_of(found["output"][0]) == "Hello "
        assert found["usage"]["output_tokens"] == count


def test_an_answer_of_nothing(server, client):
    server.say("")
    assert ask(client)["output"] == []


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": []}, {"input": None}], ids=str)
@pytest.mark.parametrize("instructions", [None, "Be short."])
def test_a_probe_without_input_is_answered(client, given, instructions):
    body = {"max_output_tokens": 1, "instructions": instructions, **given}
    for streamed in (False, True):
        answer = client.post(RESPONSES, json=body | {"stream": streamed})
        assert answer.status_code == 200, answer.text


def test_logprobs_are_those_of_a_chat(server, client):
    server.root.says = []
    chat = HELLO | {"logprobs": True, "top_logprobs": 2, "max_tokens": 8}
    expected = client.post(CHAT, json=chat).json()["choices"][0]["logprobs"]["content"]
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = ask(client, max_output_tokens=8, **wanted)
    (part,) = found["output"][0]["content"]
    assert part["logprobs"] == expected
    assert found["top_logprobs"] == 2
    told = stream(client, max_output_tokens=8, **wanted)
    deltas = [one for event in told for one in event.get("logprobs", []) if "delta" in event]
    assert deltas == expected
    (done,) = [event for event in told if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == expected


def test_logprobs_need_their_include(client):
    (part,) = ask(client, top_logprobs=2)["output"][0]["content"]
    assert part["logprobs"] == []


def test_sampling_is_obeyed(server, client):
    server.root.says = []
    hot = [ask(client, temperature=1.5, max_output_tokens=8, seed=n)["output"] for n in range(3)]
    assert len({text_of(output[0]) for output in hot}) == 3
    cold = [ask(client, max_output_tokens=8, seed=n)["output"] for n in range(3)]
    assert len({text_of(output[0]) for output in cold}) == 1
    found = ask(client, temperature=1.5, top_p=0.5, seed=1, max_output_tokens=8)
    assert (found["temperature"], found["top_p"]) == (1.5, 0.5)


# --- what the model reads


def messages(items):
    body = msgspec.json.encode({"input": items})
    found = chat_request(decode(body, ResponsesRequest)).messages
    return [
        {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
        for message in found
    ]


def thought(text):
    return {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def said(text, role="assistant"):
    return {
        "type": "message",
        "role": role,
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


def called(id):
    call = {"call_id": id, "name": "f", "arguments": '{"a": 1}', "id": "fc_1"}
    return {"type": "function_call", "status": "completed", **call}


def gave(id, output="x"):
    return {"type": "function_call_output", "call_id": id, "output": output}


def turn(content=None, calls=(), reasoning=None):
    function = {"name": "f", "arguments": '{"a": 1}'}
    found = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if calls:
        found["tool_calls"] = [{"function": function, "id": id, "type": "function"} for id in calls]
    return {name: value for name, value in found.items() if value is not None}


def result(id, content="x"):
    return {"role": "tool", "content": content, "tool_call_id": id}


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], [USER]),
        ([USER | {"type": None}], [USER]),
        (
            [{"role": "developer", "content": "d"}, USER],
            [{"role": "developer", "content": "d"}, USER],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}],
            [{"role": "user", "content": "ab"}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [turn("no")],
        ),
        # one turn
        ([thought("t"), said("s"), called("1"), called("2")], [turn("s", "12", "t")]),
        ([thought("t"), thought("u"), called("1")], [turn(None, "1", "tu")]),
        ([said("s"), called("1"), said("u"), called("2")], [turn("su", "12")]),
        # several
        (
            [thought("t"), called("1"), gave("1"), thought("u"), called("2"), gave("2"), said("s")],
            [turn(None, "1", "t"), result("1"), turn(None, "2", "u"), result("2"), turn("s")],
        ),
        (
            [called("1"), called("2"), gave("1"), gave("2")],
            [turn(None, "12"), result("1"), result("2")],
        ),
        ([said("a"), said("b")], [turn("a"), turn("b")]),
        ([said("a"), thought("t"), said("b")], [turn("a"), turn("b", (), "t")]),
        ([thought("t"), USER], [turn(None, (), "t"), USER]),
        (
            [called("1"), gave("1", [{"type": "input_text", "text": "x"}])],
            [turn(None, "1"), result("1")],
        ),
        # nothing that was thought can be read, or nothing can be done with it
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}, said("s")], [turn("s")]),
        ([USER, {"type": "reasoning", "encrypted_content": "x"}, USER], [USER, USER]),
        ([{"type": "web_search_call", "action": {}}, {"type": "new", "output": {}}, USER], [USER]),
        ([{"type": "web_search_call"}], [{"role": "user", "content": ""}]),
    ],
    ids=range(18),
)
def test_items_become_messages(items, expected):
    assert messages(items) == expected


def test_the_model_reads_what_it_would_in_a_chat(server, client):
    """The prompts are the same: of the second, all but the last token is in the cache."""
    server.say(THINKS + "I look." + CALL)
    chat_tool = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    first = ask(client, instructions="Be short.", tools=[WEATHER])
    items = [{"role": "user", "content": "hello"}, *first["output"]]
    items.append(gave(first["output"][-1]["call_id"], "rain"))
    second = client.post(
        RESPONSES, json={"instructions": "Be short.", "input": items, "tools": [WEATHER]}
    ).json()
    call = {name: first["output"][-1][name] for name in ("name", "arguments")}
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Let me see.",
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    usage = client.post(CHAT, json={"messages": history, "tools": [chat_tool]}).json()["usage"]
    assert usage["prompt_tokens"] == second["usage"]["input_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_effort_none_turns_thinking_off():
    unset = "nobody has said so"
    template = (
        TEMPLATE + f"{{{{ enable_thinking | default('{unset}') }}}}{{{{ reasoning_effort }}}}"
    )
    texts = {None: unset, "none": "False", "medium": unset + "medium"}
    with serving(template=template) as server, server.client() as client:
        server.say("Hello.")
        sizes = {effort: len(server.parts.tokenizer.encode(text)) for effort, text in texts.items()}

        def size(**body):
            return ask(client, **body)["usage"]["input_tokens"]

        counts = {effort: size(reasoning={"effort": effort, "summary": "auto"}) for effort in texts}
        assert counts["none"] == size(chat_template_kwargs={"enable_thinking": False})
    for effort in texts:
        assert counts[effort] - counts[None] == sizes[effort] - sizes[None]
    assert counts["none"] < counts[None] < counts["medium"]


# --- tools and formats


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", None),
        ({"type": "function", "name": "sing"}, "sing"),
        ({"type": "allowed_tools", "mode": "required", "tools": [SING]}, "sing"),
    ],
    ids=str,
)
def test_a_call_that_is_required_comes(bare_server, bare_client, choice, name):
    """Of random logits: only the grammar makes sense of them."""
    days = {"type": "object", "properties": {"days": {"enum": [1, 2, 3]}}, "required": ["days"]}
    weather = WEATHER | {"parameters": days | {"additionalProperties": False}}
    body = {"tools": [weather, SING], "tool_choice": choice, "temperature": 1, "seed": 1}
    bare_server.root.says = []
    found = ask(bare_client, **body, thinking_budget=3, max_output_tokens=800)
    (call,) = [item for item in found["output"] if item["type"] == "function_call"]
    assert name in (None, call["name"])
    assert found["tool_choice"] == choice


def test_none_is_none(server, client):
    server.say(CALL)
    found = ask(client, tools=[WEATHER], tool_choice="none", max_output_tokens=60)
    assert [item["type"] for item in found["output"]] == ["message"]


@pytest.mark.parametrize(("parallel", "count"), [(True, 3), (False, 1)])
def test_one_call_at_a_time(bare_server, bare_client, parallel, count):
    body = {"tools": [SING], "tool_choice": "required", "temperature": 1, "seed": 2}
    bare_server.root.says = []
    found = ask(bare_client, **body, parallel_tool_calls=parallel, max_output_tokens=800)
    assert [item["type"] for item in found["output"]] == ["function_call"] * count
    assert found["parallel_tool_calls"] is parallel


def test_one_call_at_a_time_needs_no_grammar(server, client):
    server.say(CALL + CALL)
    found = ask(client, tools=[WEATHER], parallel_tool_calls=False)
    assert [item["type"] for item in found["output"]] == ["function_call"]
    assert found["status"] == found["output"][0]["status"] == "completed"


FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}


def test_an_answer_has_the_shape_of_a_schema(server, client):
    server.root.says = []
    body = {"temperature": 1, "seed": 4, "max_output_tokens": 500}
    found = ask(client, text={"format": FORMAT, "verbosity": "low"}, **body)
    assert set(json.loads(text_of(found["output"][0]))) == {"answer", "sure"}
    assert found["text"]["format"] == FORMAT | {"description": None}
    found = ask(client, text={"format": {"type": "json_object"}}, **body)
    assert text_of(found["output"][0]).lstrip().startswith("{")


# --- what Codex sends

CODEX = {
    "model": "tiny",
    "instructions": "You are Codex, a coding agent. Answer briefly.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>read-only</permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<cwd>/tmp</cwd>"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List."}]},
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"cmd": {"type": "string"}, "tty": {"type": "boolean"}},
                "required": ["cmd"],
                "additionalProperties": False,
            },
        },
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
        {"type": "local_shell"},
        {"type": "web_search", "external_web_access": False},
        {"type": "image_generation", "output_format": "png"},
        {"type": "namespace", "name": "mcp__x", "description": "", "tools": [SING]},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": [],
    "service_tier": None,
    "prompt_cache_key": "0199-thread",
    "text": {"verbosity": "medium"},
    "client_metadata": {"x-codex-installation-id": "1"},
}


def test_a_request_of_codex_and_the_next_one(bare_server, bare_client):
    server, client = bare_server, bare_client
    server.say(THINKS + 'exec_command\n{"cmd": "ls"}')
    first = replayed(events(client.post(RESPONSES, json=CODEX).text))
    assert [item["type"] for item in first["output"]] == ["reasoning", "function_call"]
    assert first["prompt_cache_key"] == "0199-thread"
    assert [tool["name"] for tool in first["tools"]] == ["exec_command"]
    thought_, call = first["output"]
    assert json.loads(call["arguments"]) == {"cmd": "ls"}
    # As it writes its history: without ids and status.
    history = [
        {name: thought_[name] for name in ("type", "summary", "content")}
        | {"encrypted_content": None},
        {name: call[name] for name in ("type", "name", "arguments", "call_id")},
        gave(call["call_id"], "README.md"),
    ]
    server.say("One file.")
    body = CODEX | {"input": [*CODEX["input"], *history]}
    second = replayed(events(client.post(RESPONSES, json=body).text))
    assert text_of(second["output"][-1]) == "One file."
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0


# --- what is refused

IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
BAD = [
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [USER, {"role": "user", "content": [IMAGE]}]}, "input[1].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ({"input": [gave("1", [IMAGE])]}, "input[0].output[0]"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]"),
    ({"input": [USER, called("1") | {"arguments": "{"}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"id": "msg_1"}]}, "input[0]"),
    ({"input": [USER] * 20_000}, "input"),
    ({"input": "word " * 2000}, "input"),
    ({"temperature": 3}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"metadata": {"a": 5}}, "metadata"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
    ({"text": {"format": FORMAT | {"schema": {"type": "sausage"}}}}, "text.format"),
    ({"tools": [SING, {"type": "function", "name": "a.b"}]}, "tools[1].name"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [SING] * 257}, "tools"),
    ({"tools": [SING], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [SING], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
    ({"tools": [SING], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_is_refused(server, client, body, param, streamed):
    answer = client.post(RESPONSES, json=ASK | body | {"stream": streamed})
    found = error(answer, 400)
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"
    assert server.is_idle()


def test_a_server_without_memory_says_so(client):
    said_ = error(client.post(RESPONSES, json=ASK | {"previous_response_id": "x"}), 400)["message"]
    assert "keeps no" in said_
    for method in ("GET", "DELETE"):
        for path in ("resp_1", "resp_1/input_items"):
            found = error(client.request(method, f"{RESPONSES}/{path}"), 404)
            assert "keeps no" in found["message"]


def test_other_errors(server, client):
    assert (
        error(client.post(RESPONSES, json=ASK | {"model": "gpt"}), 404)["code"] == "model_not_found"
    )
    error(client.get(RESPONSES), 405)
    options = ASK | {"stream_options": {"include_obfuscation": False}}
    assert error(client.post(RESPONSES, json=options), 400)["param"] == "stream_options"
    assert client.post(RESPONSES, json=options | {"stream": True}).status_code == 200
    long = error(client.post(RESPONSES, json={"input": "word " * 2000}), 400)
    assert long["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "name",
    [
        *("input", "instructions", "model", "tools", "tool_choice", "parallel_tool_calls"),
        *("max_output_tokens", "temperature", "top_p", "text", "reasoning", "include", "stream"),
        *("stream_options", "metadata", "user", "store", "truncation", "service_tier"),
        *("prompt_cache_key", "previous_response_id", "conversation", "background", "prompt"),
    ],
)
def test_null_is_as_if_it_were_not_there(client, name):
    assert client.post(RESPONSES, json=ASK | {name: None}).status_code == 200


def test_unknown_fields_are_ignored(client):
    odd = {"store": True, "truncation": "auto", "service_tier": "flex", "max_tool_calls": 3}
    found = ask(client, **odd, future={"a": [1]})
    assert (found["store"], found["truncation"]) == (False, "disabled")


def test_a_failure_ends_the_stream_as_a_response_that_failed():
    with serving() as server, server.client() as client:
        server.say("<think>a</think>" + "word " * 100)
        server.root.pause = 0.02  # so that what came before is told
        server.root.fails_at = (20, NodeError("lost worker 10.0.0.2:9990: gone"))
        found = stream(client)
        response = replayed(found)
        assert response["status"] == "failed"
        assert response["error"]["code"] == "server_error"
        assert "10.0.0.2:9990" in response["error"]["message"]
        assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
        assert text_of(response["output"][1]).startswith("word word")
        assert error(client.post(RESPONSES, json=ASK), 503)["code"] == "node_lost"


def test_silence_is_told_by_events(server, client, monkeypatch):
    """Of comments, some clients take no notice."""
    monkeypatch.setattr("pyllama_dist.api.answer.PING_SECONDS", 0.01)
    server.root.pause = 0.03
    try:
        found = stream(client)
    finally:
        server.root.pause = 0.0
    assert text_of(replayed(found)["output"][0]) == "Hello there."
    assert len([told for told in found if told["type"] == "response.in_progress"]) > 3


def test_what_nobody_foresaw_is_told_as_an_error(server, client, monkeypatch):
    def fail(self, piece):
        raise RuntimeError("x")

    monkeypatch.setattr("pyllama_dist.api.responses.output.Output.add", fail)
    text = client.post(RESPONSES, json=ASK | {"stream": True}).text
    name, data = text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "server_error"


def test_the_description_names_it(client):
    assert RESPONSES in client.get("/openapi.json").json()["paths"]

"""Tools and structured answers through the server: numbers are those of the checks."""

import json

import pytest

from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Limits
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.grammar.thought import AfterThought
from tests.api_server import CHAT, HELLO, error, events, serving

pytestmark = pytest.mark.timeout(120)

ACCESS, LIMITS = Access(), Limits(4, 8)
# As Hermes and Qwen3 write: the built-in model's tokenizer has no tokens for other formats.
TEMPLATE = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{"name": <function-name>, "arguments": <args-json-object>} in <tool_call></tool_call>
{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}</{{ message.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "sing"}}
SING_ALONE = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}}
ARGUMENTS = '{"city": "Łódź", "days": 3}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
QUESTION = [{"role": "user", "content": "weather?"}]
ASK = {"messages": QUESTION, "temperature": 0, "tools": [WEATHER]}
# As GLM-4-0414, whose calls are ordinary text: name, line break, arguments.
BARE = """
{%- for tool in tools or [] %}## {{ tool.function.name }}{{ tool.function | tojson }}{% endfor %}
{%- for message in messages %}<{{ message.role }}>{{ message.get("metadata", "") }}
{{ message.content }}{% endfor %}{# observation #}<assistant>"""


@pytest.fixture
def server():
    with serving(ACCESS, LIMITS, TEMPLATE, seq_len=1024, n_blocks=128) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


def test_a_call_comes_as_openai_has_it(server, client):
    server.say("Let me see." + CALL)
    found = client.post(CHAT, json=ASK).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] == "Let me see."
    (call,) = found["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Łódź", "days": 3}


def test_p7_p9_a_streamed_call_is_the_same(server, client):
    server.say(CALL + CALL)
    whole = client.post(CHAT, json=ASK).json()["choices"][0]["message"]
    assert whole["content"] is None
    chunks = events(client.post(CHAT, json=ASK | {"stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    told = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index in (0, 1):
        first, *rest = [call for call in told if call["index"] == index]
        assert first["id"]
        assert first["function"] == {"name": "get_weather", "arguments": ""}
        assert not any("id" in call or "name" in call["function"] for call in rest)
        joined = "".join(call["function"]["arguments"] for call in rest)
        assert joined == whole["tool_calls"][index]["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_where_several_are_not_allowed(server, client, stream):
    """No grammar is needed for it: this tokenizer lacks the tokens for one."""
    server.say("One." + CALL + "Two." + CALL)
    answer = client.post(CHAT, json=ASK | {"parallel_tool_calls": False, "stream": stream})
    if stream:
        chunks = events(answer.text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "One."
        starts = [delta for delta in deltas if "id" in delta.get("tool_calls", [{}])[0]]
        assert len(starts) == 1
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        assert choice["message"]["content"] == "One."
        assert len(choice["message"]["tool_calls"]) == 1
        reason = choice["finish_reason"]
    assert reason == "tool_calls"


def test_t14_a_call_that_is_cut_off(server, client):
    server.say(CALL)
    found = client.post(CHAT, json=ASK | {"max_tokens": 30}).json()["choices"][0]
    assert found["finish_reason"] == "length"


def test_t15_a_call_and_its_result_are_in_the_next_prompt(server, client):
    server.say(CALL)
    message = client.post(CHAT, json=ASK).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    server.say("It rains.")
    asked = ASK | {"messages": [*ASK["messages"], message, result]}
    assert client.post(CHAT, json=asked).json()["choices"][0]["message"]["content"] == "It rains."
    text = server.parts.tokenizer.decode(
        client.post("/tokenize", json={"messages": asked["messages"]}).json()["tokens"]
    )
    assert CALL.split("{")[1].split(",")[0] in text
    assert "rain" in text


def test_t6_arguments_are_the_text_of_an_object(server, client):
    server.say(CALL)
    message = client.post(CHAT, json=ASK).json()["choices"][0]["message"]
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert arguments == ARGUMENTS
    # A history with the object itself is the same prompt.
    counts = []
    for one in (arguments, json.loads(arguments)):
        message["tool_calls"][0]["function"]["arguments"] = one
        asked = {"messages": [*QUESTION, message]}
        counts.append(client.post("/tokenize", json=asked).json()["tokens"])
    assert counts[0] == counts[1]
    assert '\\"city' not in server.parts.tokenizer.decode(counts[0])


@pytest.mark.parametrize(
    "wanted",
    [
        {"tools": [WEATHER | {"function": {**WEATHER["function"], "strict": True}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}, "tools": None},
    ],
    ids=["strict", "required", "json"],
)
def test_t9_what_never_comes_ends_with_the_tokens(wanted):
    """A model that is to obey a grammar, and thinks on for ever in place of it."""
    with serving(ACCESS, LIMITS, BARE + "<think>") as bare, bare.client() as client:
        bare.say("No. " * 20, end=False)
        choice = client.post(CHAT, json=ASK | {"max_tokens": 40} | wanted).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]
        bare.wait_idle()
        bare.say("Yes.</think>Hello.")
        answer = client.post(CHAT, json={"messages": QUESTION, "temperature": 0}).json()
        assert answer["choices"][0]["message"]["content"] == "Hello."


def test_t9_an_error_of_a_grammar_ends_its_request_alone(server, client, monkeypatch):
    server.say("Hello.")

    def fail(self, token):
        raise PyllamaError("the grammar has no such state")

    asked = {"messages": QUESTION, "response_format": {"type": "json_object"}, "max_tokens": 20}
    with monkeypatch.context() as patched:
        patched.setattr(AfterThought, "accept", fail)
        found = error(client.post(CHAT, json=asked), 500)
        assert "no such state" in found["message"]
        streamed = client.post(CHAT, json=asked | {"stream": True}).text
        assert (
            "no such state"
            in json.loads(streamed.strip().rpartition("data: ")[2])["error"]["message"]
        )
    server.wait_idle()
    assert client.get("/health").status_code == 200
    answer = client.post(CHAT, json={"messages": QUESTION, "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == "Hello."


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", None),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
        ({"type": "function", "function": {"name": "sing"}}, "sing"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}},
            "sing",
        ),
    ],
)
def test_t16_a_call_that_is_required_comes(choice, name):
    """Of random logits: only the grammar makes sense of them."""
    days = {"type": "object", "properties": {"days": {"enum": [1, 2, 3]}}, "required": ["days"]}
    days["additionalProperties"] = False
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": days}}
    asked = ASK | {"tools": [weather, OTHER], "tool_choice": choice, "temperature": 1, "seed": 1}
    asked |= {"thinking_budget": 3}
    with serving(ACCESS, LIMITS, BARE, seq_len=1024, n_blocks=128) as bare, bare.client() as client:
        answer = client.post(CHAT, json=asked | {"max_tokens": 800})
    call = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
    assert name in (None, call["name"])
    if call["name"] == "get_weather":
        assert isinstance(json.loads(call["arguments"])["days"], int)


@pytest.mark.parametrize(("own", "longest"), [(None, 3), (5, 5)])
def test_a_thought_ends_when_its_budget_is_spent(own, longest):
    with serving(ACCESS, Limits(4, 8, thinking=3)) as server, server.client() as client:
        server.say("<think>one two three four five six seven", end=False)
        asked = HELLO | {"max_tokens": 40}
        message = client.post(CHAT, json=asked | {"thinking_budget": own}).json()["choices"][0][
            "message"
        ]
        thought = server.parts.tokenizer.encode(message["reasoning_content"])
    assert 0 < len(thought) <= longest


def test_t16_none_is_none(server, client):
    server.say(CALL)
    found = client.post(CHAT, json=ASK | {"tool_choice": "none", "max_tokens": 60}).json()
    assert "tool_calls" not in found["choices"][0]["message"]


@pytest.mark.parametrize(
    "choice",
    [
        *("maybe", {"type": "function", "function": {"name": "fly"}}, {"type": "x"}, 5),
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
    ],
    ids=str,
)
def test_t16_odd_choices_are_refused(client, choice):
    answer = client.post(CHAT, json=ASK | {"tool_choice": choice})
    assert error(answer, 400)["param"] == "tool_choice"


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


def test_an_answer_has_the_shape_of_a_schema(server, client):
    server.root.says = []
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    asked = {"messages": ASK["messages"], "response_format": wanted, "temperature": 1, "seed": 4}
    found = client.post(CHAT, json=asked | {"max_tokens": 500}).json()["choices"][0]
    answer = json.loads(found["message"]["content"])
    assert set(answer) == {"answer", "sure"}
    assert isinstance(answer["sure"], bool)
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sausage"}}},
        {"type": "json_schema", "json_schema": {"schema": {"pattern": "(?=a)b", "type": "string"}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(10**6))}}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_x5_a_bad_schema_is_the_request_s_fault(server, client, wanted):
    server.say("Hello.")
    asked = {"messages": ASK["messages"], "response_format": wanted}
    assert error(client.post(CHAT, json=asked), 400)["type"] == "invalid_request_error"
    assert client.post(CHAT, json={"messages": ASK["messages"]}).status_code == 200

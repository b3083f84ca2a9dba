"""The official client of OpenAI's API, strict, on /v1/responses before a scripted model."""

import json

import openai
import pydantic
import pytest

from pyllama_dist.errors import NodeError
from tests.api_server import serving
from tests.test_api_tools import ARGUMENTS, BARE, CALL, TEMPLATE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ASK = {"model": "tiny", "input": "hello", "temperature": 0}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class Sure(pydantic.BaseModel):
    sure: bool


@pytest.fixture
def server():
    with serving(template=TEMPLATE, seq_len=1024, n_blocks=128) as running:
        running.say("Hello there.")
        yield running


def connected(server):
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="-", _strict_response_validation=True, max_retries=0
    )


@pytest.fixture
def client(server):
    with connected(server) as client:
        yield client
    server.wait_idle()


def test_create(client):
    found = client.responses.create(**ASK, instructions="Be short.", metadata={"a": "b"})
    assert (found.status, found.output_text) == ("completed", "Hello there.")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.metadata == {"a": "b"}


def test_logprobs(client):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = client.responses.create(**ASK, **wanted)
    logprobs = found.output[0].content[0].logprobs
    assert "".join(one.token for one in logprobs) == "Hello there."
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    told = client.responses.create(**ASK, **wanted, stream=True)
    deltas = [one for event in told if "text.delta" in event.type for one in event.logprobs]
    assert [one.token for one in deltas] == [one.token for one in logprobs]


def test_the_stream_helper(server, client, monkeypatch):
    monkeypatch.setattr("pyllama_dist.api.answer.PING_SECONDS", 0.001)
    server.root.pause = 0.004
    server.say("<think>Let me see.</think>I look." + CALL)
    with client.responses.stream(**ASK, tools=[TOOL]) as stream:
        snapshots = list(stream)
        final = stream.get_final_response()
    texts = [event.snapshot for event in snapshots if event.type == "response.output_text.delta"]
    assert texts[-1] == final.output_text == "I look."
    calls = [
        event.snapshot
        for event in snapshots
        if event.type == "response.function_call_arguments.delta"
    ]
    thought, _, call = final.output
    assert calls[-1] == call.arguments
    assert json.loads(call.arguments) == json.loads(ARGUMENTS)
    assert thought.content[0].text == "Let me see."
    pieces = [event.delta for event in snapshots if event.type == "response.reasoning_text.delta"]
    assert "".join(pieces) == "Let me see."
    assert len([event for event in snapshots if event.type == "response.in_progress"]) > 1


def test_tools_there_and_back(server, client):
    server.say("<think>Let me see.</think>" + CALL)
    first = client.responses.create(**ASK, tools=[TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert first.tools[0].name == "get_weather"
    server.say("It rains.")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history = [{"role": "user", "content": "weather?"}, *first.output, output]
    second = client.responses.create(**ASK | {"input": history}, tools=[TOOL])
    assert second.output_text == "It rains."
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    "choice",
    [
        *("auto", "none"),
        {
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ],
    ids=str,
)
def test_choices_of_tools_are_told_again(client, choice):
    found = client.responses.create(**ASK, tools=[TOOL], tool_choice=choice)
    told = found.tool_choice
    assert (told if isinstance(told, str) else told.to_dict()) == choice


def test_parse():
    """Of random logits: the grammar lets nothing else through."""
    with serving(template=BARE) as server, connected(server) as client:
        settings = {"temperature": 1, "max_output_tokens": 200}
        extra = {"extra_body": {"thinking_budget": 3, "seed": 1}}
        found = client.responses.parse(**ASK | settings, text_format=Sure, **extra)
        assert isinstance(found.output_parsed.sure, bool)
        with client.responses.stream(**ASK | settings, text_format=Sure, **extra) as stream:
            stream.until_done()
            assert isinstance(stream.get_final_response().output_parsed.sure, bool)


@pytest.mark.parametrize("says", ["one two three four five", "<think>one two three four five"])
def test_what_is_cut_off_is_incomplete(server, client, says):
    server.say(says)
    found = client.responses.create(**ASK, max_output_tokens=3)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**ASK, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output[0].status == "incomplete"


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(**ASK, top_p=2)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="keeps no"):
        client.responses.create(**ASK, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASK | {"model": "gpt-5"})
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="keeps no"):
            call("resp_1")


def test_a_lost_node_is_a_response_that_failed():
    with serving() as server, connected(server) as client:
        server.say("word " * 100)
        server.root.pause = 0.02  # so that what came before is told
        server.root.fails_at = (10, NodeError("lost worker 10.0.0.2:9990: gone"))
        *_, last = client.responses.create(**ASK, stream=True)
        assert last.type == "response.failed"
        assert "10.0.0.2:9990" in last.response.error.message
        assert last.response.output[0].content[0].text.startswith("word")
        with pytest.raises(openai.InternalServerError, match="lost worker"):
            client.responses.create(**ASK)


def test_what_nobody_foresaw_is_raised(client, monkeypatch):
    def fail(self, piece):
        raise RuntimeError("x")

    monkeypatch.setattr("pyllama_dist.api.responses.output.Output.add", fail)
    with pytest.raises(openai.APIError, match="internal error"):
        list(client.responses.create(**ASK, stream=True))

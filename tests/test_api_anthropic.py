"""Anthropic's official client, strict, against the server with a scripted model."""

import re
import threading

import anthropic
import pydantic
import pytest

from pyllama_dist.api import answer as answers
from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Limits
from pyllama_dist.errors import NodeError
from tests.api_server import serving, wait_until
from tests.test_api_messages import CALL, INPUT, SURE, TEMPLATE, THOUGHT, WEATHER, full

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

QUESTION = [{"role": "user", "content": "weather?"}]
HELLO = {"model": "tiny", "max_tokens": 300, "messages": QUESTION}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}}


@pytest.fixture
def server():
    with serving(Access(keys=("secret",)), template=TEMPLATE, seq_len=1024, n_blocks=128) as found:
        found.say("Hello there.")
        yield found


def client_of(server, **options):
    """A client that checks all that it is told against its types."""
    asked = {"api_key": "secret", "max_retries": 0, "_strict_response_validation": True} | options
    return anthropic.Anthropic(base_url=server.url, **asked)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def told(message) -> dict:
    """What a message says, without what differs from one answer to the next."""
    found = message.model_dump()
    for name in ("input_tokens", "cache_read_input_tokens"):
        del found["usage"][name]
    del found["id"]
    for block in found["content"]:
        for name in ("id", "parsed_output"):
            block.pop(name, None)
    return found


def test_p8_a_message(client):
    message = client.messages.create(**HELLO, system="Be brief.")
    assert isinstance(message, anthropic.types.Message)
    assert message.content[0].text == "Hello there."
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    assert message._request_id


SAID = {
    "text": ("Hello there.", {}),
    "stopped": ("Hello there.", {"stop_sequences": ["the"]}),
    "cut": ("Hello there.", {"max_tokens": 2}),
    "thought": (THOUGHT + "Four.", THINK),
    "calls": (THOUGHT + "See: " + CALL + "on" + CALL, THINK | {"tools": [WEATHER]}),
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_p8_p9_the_stream_helper_gathers_the_message(server, client, said):
    text, extra = said
    server.say(text)
    whole = client.messages.create(**HELLO | extra)
    with client.messages.stream(**HELLO | extra) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert told(final) == told(whole)
    assert {"message_start", "content_block_start", "content_block_stop", "message_stop"} <= kinds
    assert ("thinking" in kinds) == ("thinking" in extra)
    assert ("input_json" in kinds) == ("tools" in extra)


def test_p8_raw_events(client):
    """Each is checked against its type; a stream of texts has nothing else."""
    kinds = [event.type for event in client.messages.create(**HELLO, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    with client.messages.stream(**HELLO) as stream:
        assert "".join(stream.text_stream) == "Hello there."


def test_t15_a_round_of_tools(server, client):
    asked = HELLO | THINK | {"tools": [WEATHER]}
    server.say(THOUGHT + CALL)
    with client.messages.stream(**asked) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    thought, call = message.content
    assert (call.name, call.input) == ("get_weather", INPUT)
    assert thought.signature
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    server.say("It rains.")
    history = [
        *QUESTION,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    again = client.messages.create(**asked | {"messages": history})
    assert again.content[0].text == "It rains."
    # What the model read and wrote is read again as it was.
    assert again.usage.cache_read_input_tokens > message.usage.input_tokens


def test_tools_of_functions_run_by_the_client(server, client):
    """The client's own loop: it calls the function and sends the result."""
    asked: list[str] = []

    @anthropic.beta_tool
    def look(city: str) -> str:
        """Looks out of the window.

        Args:
            city: where.
        """
        asked.append(city)
        server.say("It rains.")
        return "rain"

    server.say('<tool_call>\n{"name": "look", "arguments": {"city": "Gdynia"}}\n</tool_call>')
    last = client.beta.messages.tool_runner(**HELLO, tools=[look]).until_done()
    assert asked == ["Gdynia"]
    assert last.content[0].text == "It rains."


class Sure(pydantic.BaseModel):
    sure: bool


def test_an_answer_that_is_parsed(server, client):
    server.say('{"sure": true} I think.')
    wanted = {"format": {"type": "json_schema", "schema": SURE}}
    message = client.messages.create(**HELLO, output_config=wanted)
    assert Sure.model_validate_json(message.content[0].text) == Sure(sure=True)
    assert client.messages.parse(**HELLO, output_format=Sure).parsed_output == Sure(sure=True)


def test_p11_tokens_are_counted(client):
    asked = {"model": "tiny", "messages": QUESTION, "tools": [WEATHER], "system": "Be brief."}
    count = client.messages.count_tokens(**asked)
    message = client.messages.create(**asked, max_tokens=5)
    assert count.input_tokens == message.usage.input_tokens


def test_errors_have_types(server, client):
    image = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]") as bad:
        client.messages.create(**HELLO | {"messages": [{"role": "user", "content": [image]}]})
    assert bad.value.body["error"]["type"] == "invalid_request_error"
    assert bad.value.request_id == bad.value.body["request_id"]
    with pytest.raises(anthropic.NotFoundError, match="there is tiny"):
        client.messages.create(**HELLO | {"model": "claude"})
    with (
        client_of(server, api_key="wrong") as other,
        pytest.raises(anthropic.AuthenticationError, match="API key"),
    ):
        other.messages.count_tokens(model="tiny", messages=QUESTION)
    with (
        client_of(server, default_headers={"origin": "https://evil"}) as other,
        pytest.raises(anthropic.PermissionDeniedError),
    ):
        other.messages.create(**HELLO)
    with client_of(server, api_key=None, auth_token="secret") as other:
        assert other.messages.create(**HELLO).content[0].text == "Hello there."


def test_l5_an_error_after_the_beginning_of_a_stream(server, client):
    server.say("word " * 20)
    server.root.fails_at = (5, NodeError("lost worker 1"))
    with pytest.raises(anthropic.APIStatusError, match="lost worker 1") as failed:
        list(client.messages.create(**HELLO, stream=True))
    assert failed.value.body["error"]["type"] == "overloaded_error"


def test_pings_are_no_events(server, client, monkeypatch):
    monkeypatch.setattr(answers, "PING_SECONDS", 0.01)
    server.root.pause = 0.05
    with client.messages.stream(**HELLO) as stream:
        assert "ping" not in {event.type for event in stream}
        assert stream.get_final_text() == "Hello there."


def test_l7_a_client_that_is_told_to_wait_tries_again():
    with serving(limits=Limits(1, 0)) as running, client_of(running, max_retries=20) as client:
        running.service._seconds = 0.1  # that an answer took: then to wait is short
        answered: list[anthropic.types.Message] = []
        ask = threading.Thread(target=lambda: answered.append(client.messages.create(**HELLO)))
        with full(running):
            with pytest.raises(anthropic.RateLimitError) as refused:
                client.with_options(max_retries=0).messages.create(**HELLO)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            ask.start()
            wait_until(lambda: refusals(running) >= 2)
        running.say("Hello there.")
        ask.join(60)
        assert answered[0].content[0].text == "Hello there."


def refusals(server) -> int:
    with server.client() as client:
        text = client.get("/metrics").text
    found = re.search(r'handler="/v1/messages",method="POST",status="429"\} (\d+)', text)
    return int(found[1]) if found else 0

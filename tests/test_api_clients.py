"""Official clients, strict, against a server process with two workers: OpenAI's, Anthropic's."""

import json
import re
import subprocess
import sys
import time

import anthropic
import httpx
import openai
import psutil
import pydantic
import pytest

from tests.test_processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(scope="module")
def process():
    command = ["api", "--port", "0", "--local-workers", "2", "--nthreads", "1", "--alias", "gpt-4"]
    started = Process(*command, "--api-key", "secret", "--max-queue", "8")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def url(process):
    found = process.output(r"http://127\.0\.0\.1:(\d+)")[1]
    process.output("is ready on 3 nodes", timeout=100)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{found}/v1", api_key="secret") as client:
        # The process that checks grammars stays with the server.
        ask(client, response_format={"type": "json_object"}, max_tokens=1)
    return f"http://127.0.0.1:{found}"


@pytest.fixture
def client(url):
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="secret", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def ask(client, **options):
    return client.chat.completions.create(
        model="builtin", messages=QUESTION, temperature=0, **options
    )


def test_p8_an_answer(client):
    answer = ask(client)
    assert "42" in answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason == "stop"


def test_p8_a_stream(client):
    whole = ask(client).choices[0].message.content
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole
    assert chunks[-1].usage.completion_tokens > 0


def test_p8_the_stream_helper(client):
    with client.chat.completions.stream(
        model="builtin", messages=QUESTION, temperature=0, n=2
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert len(final.choices) == 2
    assert final.choices[0].message.role == "assistant"


def test_p8_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    assert all(len(one.top_logprobs) == 3 for one in content)


def test_p8_completions(client):
    answer = client.completions.create(
        model="builtin", prompt="What is", max_tokens=5, logprobs=1, temperature=0
    )
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text
    # Until the end there is no reason for it, whatever the client's types say.
    lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    stream = lenient.completions.create(model="builtin", prompt="What", max_tokens=3, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")


def test_p8_models(client):
    assert [model.id for model in client.models.list()] == ["builtin", "gpt-4"]
    assert client.models.retrieve("gpt-4").id == "gpt-4"


def test_p8_an_answer_that_is_parsed(client):
    # The built-in model knows no JSON, but the grammar lets nothing else through.
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, response_format=format_, max_tokens=400)
    assert set(json.loads(answer.choices[0].message.content)) == {"sure"}


def test_p8_errors(client, url):
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, extra_body={"top_p": 2})
    assert bad.value.param == "top_p"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_p8_responses(client):
    asked = {"model": "builtin", "input": "What is 17 + 25?", "temperature": 0}
    whole = client.responses.create(**asked)
    assert "42" in whole.output_text
    assert whole.output_text == ask(client).choices[0].message.content
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    history = [{"role": "user", "content": asked["input"]}, *whole.output]
    history.append({"role": "user", "content": "And 1 + 1?"})
    second = client.responses.create(**asked | {"input": history})
    assert second.usage.input_tokens_details.cached_tokens >= whole.usage.input_tokens


def test_p8_a_response_that_is_parsed(client):
    class Sure(pydantic.BaseModel):
        sure: bool

    found = client.responses.parse(
        model="builtin",
        input="Sure?",
        text_format=Sure,
        temperature=0,
        max_output_tokens=400,
    )
    assert isinstance(found.output_parsed.sure, bool)


def test_p8_errors_of_responses(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="builtin", input=[{"role": "wizard", "content": "a"}])
    assert bad.value.param == "input[0].role"
    with pytest.raises(openai.NotFoundError, match="keeps no"):
        client.responses.retrieve("resp_1")


def test_l8_a_client_that_gives_up_leaves_nothing(client, url):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05, max_retries=2).chat.completions.create(
            model="builtin", messages=[{"role": "user", "content": "word " * 200}], n=4
        )
    deadline = time.monotonic() + 10
    while _running(client, url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


MESSAGE = {
    "model": "builtin",
    "max_tokens": 200,
    "messages": QUESTION,
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def claude(url):
    with anthropic.Anthropic(
        base_url=url, api_key="secret", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def test_p8_a_message_of_anthropics(claude, client):
    message = claude.messages.create(**MESSAGE)
    assert "42" in message.content[0].text
    assert message.content[0].text == ask(client).choices[0].message.content
    assert message.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="builtin", messages=QUESTION)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_p8_a_stream_of_anthropics(claude):
    whole = claude.messages.create(**MESSAGE)
    with claude.messages.stream(**MESSAGE) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    with claude.messages.stream(**MESSAGE | {"max_tokens": 2}) as stream:
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_p8_errors_of_anthropics(claude, url):
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(
            **MESSAGE | {"messages": [{"role": "user", "content": "word " * 20_000}]}
        )
    with pytest.raises(anthropic.NotFoundError, match="builtin"):
        claude.messages.create(**MESSAGE | {"model": "claude"})
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(**MESSAGE)


def _running(client, url) -> float:
    text = client.with_options(max_retries=0)._client.get(
        f"{url}/metrics", headers={"authorization": "Bearer secret"}
    )
    found = re.findall(r"vllm:num_requests_(?:running|waiting)\{.*\} ([\d.]+)", text.text)
    return sum(map(float, found))


def test_the_nodes_tell_what_they_spent(client, url):
    ask(client)
    answer = client._client.get(f"{url}/nodes", headers={"authorization": "Bearer secret"})
    nodes = answer.json()["nodes"]
    assert [node["node"] for node in nodes] == [0, 1, 2]
    assert all(node["compute_seconds"] > 0 < node["bytes"] for node in nodes)


def test_l5_a_killed_worker_is_told_to_every_stream():
    started = Process("api", "--port", "0", "--local-workers", "2", "--nthreads", "1")
    try:
        port = started.output(r"http://127\.0\.0\.1:(\d+)")[1]
        started.output("is ready on 3 nodes", timeout=100)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as client:
            streams = [
                client.with_options(max_retries=0).chat.completions.create(
                    model="builtin",
                    messages=QUESTION,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                for _ in range(3)
            ]
            for stream in streams:
                next(iter(stream))
            psutil.Process(started.pid).children()[0].kill()
            killed = time.monotonic()
            for stream in streams:
                with pytest.raises(openai.APIError, match="lost worker"):
                    list(stream)
            assert time.monotonic() - killed < 15
            health = client._client.get(f"http://127.0.0.1:{port}/health")
            assert health.status_code == 503
            assert health.json()["error"]["code"] == "node_lost"
    finally:
        started.stop()


def test_l5_a_worker_that_is_killed_while_nobody_asks():
    started = Process("api", "--port", "0", "--local-workers", "2", "--nthreads", "1")
    try:
        port = started.output(r"http://127\.0\.0\.1:(\d+)")[1]
        started.output("is ready on 3 nodes", timeout=100)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert client.get("/health").status_code == 200
            psutil.Process(started.pid).children()[0].kill()
            deadline = time.monotonic() + 20
            while (health := client.get("/health")).status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "node_lost"
    finally:
        started.stop()


@pytest.mark.parametrize("moment", ["loading", "ready"])
def test_l4_an_interrupt_ends_the_server(moment):
    started = Process("api", "--port", "0", "--local-workers", "1")
    started.output(r"http://127\.0\.0\.1:\d+")
    if moment == "ready":
        started.output("is ready on 2 nodes", timeout=100)
    family = psutil.Process(started.pid).children()
    started.process.send_signal(2)
    code, _, said = started.end(timeout=30)
    assert code == 130, said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key, or --trust-network"),
        (["--api-key", ""], "empty"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere"),
        (["--host", "203.0.113.1", "--trust-network"], "cannot listen"),
        (["--port", "70000"], "70000"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags, said):
    command = [sys.executable, "-m", "pyllama_dist", "api", *flags]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode in (2, 3)
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in found.stderr

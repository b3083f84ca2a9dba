"""Who may ask the server."""

import json

import pytest

from pyllama_dist.api.request_log import JsonLines
from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Limits
from tests.api_server import CHAT, HELLO, error, serving, wait_until
from tests.tiers import slow_but

pytestmark = pytest.mark.timeout(120)


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


WRONG_KEYS: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "secret"},
    {"authorization": "Basic secret"},
    {"authorization": "Bearer x y"},
    {"x-api-key": "wrong"},
]


@pytest.mark.parametrize(
    "headers",
    slow_but(WRONG_KEYS[:2], WRONG_KEYS),
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
        wanted = "authorization,content-type,anthropic-version,x-stainless-lang"
        preflight = {"access-control-request-method": "POST"}
        preflight["access-control-request-headers"] = wanted
        asked = client.options(CHAT, headers=origin | preflight)
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-headers"] == wanted
        assert asked.headers["access-control-allow-origin"] == "https://good.example"
        answer = client.get("/v1/models", headers=origin | {"x-api-key": "secret"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in answer.headers


def test_x2_a_form_cannot_ask(client):
    body = json.dumps(HELLO)
    error(client.post(CHAT, content=body, headers={"content-type": "text/plain"}), 415)
    error(client.post(CHAT, content=body), 415)


def test_x8_the_log_has_neither_prompt_nor_key(keyed, caplog):
    caplog.set_level("DEBUG", logger="pyllama_dist")
    asked = HELLO | {"messages": [{"role": "user", "content": "swordfish"}]}
    with keyed.client() as client:
        client.post(CHAT, json=asked, headers={"x-api-key": "secret"})
    wait_until(lambda: CHAT in caplog.text)
    assert "swordfish" not in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_logged_once_when_it_is_over(server, client, caplog, stream):
    caplog.set_level("INFO", logger="pyllama_dist.api.request_log")
    server.say("Hello.")
    server.root.pause = 0.02
    answer = client.post(CHAT, json=HELLO | {"stream": stream}, headers={"x-request-id": "abc"})
    wait_until(lambda: caplog.records)
    (record,) = caplog.records
    fields = json.loads(JsonLines().format(record))
    assert fields["path"] == CHAT
    assert fields["status"] == 200
    assert fields["request_id"] == "abc"
    assert fields["seconds"] > 0.02
    assert fields["finish"] == "stop"
    if not stream:
        usage = answer.json()["usage"]
        assert fields["prompt_tokens"] == usage["prompt_tokens"]
        assert fields["completion_tokens"] == usage["completion_tokens"]


def test_what_is_refused_is_logged_too(keyed, caplog):
    caplog.set_level("INFO", logger="pyllama_dist.api.request_log")
    with keyed.client() as client:
        client.get("/v1/models")
        client.get("/a%0Ab", headers={"x-api-key": "secret"})
    wait_until(lambda: len(caplog.records) == 2)
    refused, unknown = caplog.records
    assert refused.fields["status"] == 401
    assert unknown.fields["status"] == 404
    assert "\n" not in unknown.getMessage()


def test_x3_methods_that_nobody_knows_are_one(server, client, caplog):
    caplog.set_level("INFO", logger="pyllama_dist.api.request_log")
    for number in range(3):
        error(client.request(f"ODD{number}", "/health"), 405)
    wait_until(lambda: len(caplog.records) == 3)
    assert "ODD" not in caplog.text
    text = client.get("/metrics").text
    assert 'method="other",status="405"} 3.0' in text
    assert "ODD" not in text


@pytest.mark.parametrize("id_", ["abc-123", "x" * 64])
def test_x9_a_request_keeps_its_id(client, id_):
    assert client.get("/health", headers={"x-request-id": id_}).headers["x-request-id"] == id_


@pytest.mark.parametrize("id_", ["a b", "x" * 65])
def test_x9_an_odd_id_is_replaced(client, id_):
    found = client.get("/health", headers={"x-request-id": id_}).headers["x-request-id"]
    assert found != id_
    assert found.isalnum()

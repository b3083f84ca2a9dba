"""A request with a seed gets the same text whatever else the server does, preemption included.

A real engine with the built-in model: what a row is computed with must not change its numbers.
AMX adds up many rows in another order than few, and so does the BLAS of the reference
implementation: with these a text may differ after some tens of tokens, so others take their place.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pyllama_dist.executor import kernels
from tests.api_process import Server, real
from tests.api_server import CHAT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CROWD = 16
SYSTEM = "You know a lot about clusters of small computers, and say little. " * 4
TOKENS = 48
FLAGS = ["--parallel", str(CROWD), "--max-queue", str(CROWD)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if kernels() in ("amx", "reference"):
        monkeypatch.setenv("PYLLAMA_KERNELS", "portable")


def ask(server: Server, number: int) -> tuple[str, int]:
    """The text of a request, and how much of its prompt was cached."""
    asked = {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"What is {number} + {3 * number}?"},
        ],
        "temperature": 0.9,
        "seed": number,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    answer = httpx.post(server.url + CHAT, json=asked, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["message"]["content"], cached


def preemptions(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    found = re.search(r"^vllm:num_preemptions_total\{.*\} (\S+)$", text, re.M)
    assert found
    return float(found[1])


def test_s9_the_same_text_alone_beside_others_from_the_cache_and_after_a_preemption():
    with real("--kv-blocks", "64", *FLAGS) as server:
        alone = [ask(server, number)[0] for number in range(CROWD)]
        assert preemptions(server) == 0
        again = [ask(server, number) for number in range(2)]
        assert [text for text, _ in again] == alone[:2]
        assert all(cached > 0 for _, cached in again)
    assert len(set(alone)) == CROWD
    with real("--kv-blocks", "6", *FLAGS) as server, ThreadPoolExecutor(CROWD) as pool:
        beside = [text for text, _ in pool.map(lambda number: ask(server, number), range(CROWD))]
        assert preemptions(server) > 0
        assert beside == alone
        server.wait_empty()

"""A request with a seed gets the same text whatever else the server does, preemption included.

A real engine with the built-in model: what a row is computed with must not change its numbers.
Kernels for AMX multiply many rows at once by other sums than few: there a text may differ.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from pyllama_dist.api.service import Limits
from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.conversation import open_model
from pyllama_dist.executor import kernels
from pyllama_dist.simulate import simulated_root
from tests.api_server import CHAT, Running, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(kernels().startswith("amx"), reason="sums depend on the number of rows"),
]

CROWD = 16
SYSTEM = "You know a lot about clusters of small computers, and say little. " * 4
TOKENS = 32


@contextmanager
def serving(n_nodes: int, kv_blocks: int) -> Iterator[Running]:
    with open_model(BUILTIN) as parts:
        cluster = Cluster(local_workers=n_nodes - 1, kv_blocks=kv_blocks)
        with (
            simulated_root(parts.file, programs(parts.file.config, cluster)) as root,
            running(parts, root, limits=Limits(CROWD, CROWD)) as server,
        ):
            yield server


def ask(server: Running, number: int) -> tuple[str, int]:
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
    with server.client() as client:
        answer = client.post(CHAT, json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["message"]["content"], cached


def preemptions(server: Running) -> float:
    with server.client() as client:
        text = client.get("/metrics").text
    found = re.search(r"^vllm:num_preemptions_total\{.*\} (\S+)$", text, re.M)
    assert found
    return float(found[1])


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_s9_the_same_text_alone_beside_others_from_the_cache_and_after_a_preemption(n_nodes):
    with serving(n_nodes, kv_blocks=64) as server:
        alone = [ask(server, number)[0] for number in range(CROWD)]
        assert preemptions(server) == 0
        again = [ask(server, number) for number in range(4)]
        assert [text for text, _ in again] == alone[:4]
        assert all(cached > 0 for _, cached in again)
    assert len(set(alone)) == CROWD
    with serving(n_nodes, kv_blocks=6) as server, ThreadPoolExecutor(CROWD) as pool:
        beside = [text for text, _ in pool.map(lambda number: ask(server, number), range(CROWD))]
        assert preemptions(server) > 0
        assert beside == alone
        server.wait_empty()

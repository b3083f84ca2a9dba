"""The benchmark of the server: who is asked for what, and what it comes to."""

import importlib
import json
import os
import random
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyllama_dist.bench import shapes
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.errors import NodeError, UsageError
from tests.test_bench import TINY

pytestmark = pytest.mark.timeout(120)
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def serving(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("measurer"), "CACHE", tmp_path)
    module = importlib.import_module("serving")
    monkeypatch.setattr(module, "_PREFILL", 32)
    return module


@pytest.fixture
def worker(serving, monkeypatch):
    """A worker in this process, which knows a tiny shape; `running` gives it out."""
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, "tiny": TINY})
    made = importlib.import_module("serving_worker").Worker()

    class Here:
        pid = os.getpid()

        def ask(self, **order):
            [(name, details)] = json.loads(json.dumps(order)).items()
            return json.loads(json.dumps(getattr(made, name)(**details)))

    @contextmanager
    def running(name, command):
        yield Here()

    monkeypatch.setattr(serving, "running", running)
    yield made
    made.close()


@pytest.fixture
def measured(serving, worker, tmp_path):
    """Runs a command on the tiny shape; what it wrote."""

    def measure(words):
        out = tmp_path / "found.json"
        args = [*words.split(), "--shape", "tiny", "-t", "1", "-o", str(out)]
        CliRunner().invoke(serving.main, args, catch_exceptions=False, standalone_mode=False)
        return json.loads(out.read_text())

    return measure


def test_users_are_served_and_counted(measured, worker):
    report = measured("users -b 1,3 -p 8 -n 5 -r 2")
    assert (report["kind"], report["model"], report["threads"]) == ("users", "tiny", 1)
    assert [result["users"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        for way in ("engine", "server"):
            requests, tokens = (result[way][f"{of}_throughput"] for of in ("request", "output"))
            assert tokens == pytest.approx(5 * requests)
    assert len(report["others_cores"]) == 2 + 2 * (2 * 2 + 1)  # warm-ups, cases, prompts
    # The engine's users never meet the server, which counts its own, the warm-up's too.
    metrics = worker._service.metrics.text(None, ()).decode()
    (tokens,) = re.findall(r"vllm:generation_tokens_total\{.*\} (\S+)", metrics)
    assert float(tokens) == 3 * 4 + 2 * (1 + 3) * 5
    table = importlib.import_module("results_table").tables([report])
    assert table.count(f"| tiny | {report['kernels']} | 1 × 1 | ") == 2


def test_what_http_adds_is_compared_with_a_step(measured):
    report = measured("overhead -n 4 -r 3")
    step = report["engine"]["p50_tpot_ms"]
    assert report["allowed_ms"] == pytest.approx(max(0.03 * step, 0.3))
    assert {"p50_added_ttft_ms", "p99_added_tpot_ms"} < report.keys()
    table = importlib.import_module("results_table").tables([report])
    assert [table.count(f"| {name} |") for name in ("TTFT", "TPOT")] == [1, 1]


def test_the_server_says_the_engines_tokens(serving, worker, monkeypatch):
    """Both ways do the same work: what the server tells are the numbers the engine chose."""
    load = importlib.import_module("serving_load")
    module, chosen, said = importlib.import_module("serving_worker"), [], []

    def noting(sampler, when, began):
        def choose(logits):
            when.append(0.0)
            chosen.append(sampler(logits))
            return chosen[-1]

        return choose

    monkeypatch.setattr(module, "_noting", noting)
    loads = json.loads
    monkeypatch.setattr(load.json, "loads", lambda text: said.append(loads(text)) or said[-1])
    facts = worker.load("tiny", None, 1, 64, 2)
    asks = [load.Ask([5, 9, 70], 6)]
    worker.engine([vars(one) for one in asks], {})
    worker.serve()
    (heard,) = load.ask(facts["url"], asks, {})
    texts = [c["choices"][0]["text"] for c in said if c.get("choices")]
    assert "".join(texts).split() == [str(token) for token in chosen]
    assert heard.tokens == len(chosen) == 6
    with pytest.raises(NodeError, match=r"gave 0 tokens of 6: 400 .*no token id"):
        load.ask(facts["url"], [load.Ask([1000], 6)], {})


def test_figures_are_those_worked_out_by_hand(serving):
    load = importlib.import_module("serving_load")
    heard = [load.Heard(1.0, [1.5, 1.75, 2.25], 3, 0), load.Heard(2.0, [3.0, 5.0], 4, 0)]
    told = load.throughput(heard)
    assert told == {"duration": 4, "request_throughput": 0.5, "output_throughput": 7 / 4}
    times = load.latencies(heard)
    assert (times["mean_ttft_ms"], times["p50_ttft_ms"]) == (750, 750)
    assert times["mean_tpot_ms"] == pytest.approx(1e3 * ((0.75 / 2) + (2 / 3)) / 2)
    assert times["p50_itl_ms"] == 500
    assert heard[0].gaps(1.6, 2.0) == [0.25]


def test_answers_beside_a_long_prompt(serving):
    load = importlib.import_module("serving_load")
    beside = load.Heard(0.0, [0.5, 1.0, 1.5, 2.5, 2.75], 5, 0)
    before, long = load.Heard(0.6, [0.75], 1, 0), load.Heard(1.25, [2.5], 1, 0)
    behind = load.Heard(1.5, [2.0], 1, 0)
    found = serving.of_arrivals([[beside, before, long, behind]])
    assert found["p99_to_step"] == pytest.approx(found["p99_itl_ms"] / 250)
    assert (found["p50_itl_ms"], found["max_itl_ms"]) == (750, 1000)
    times = [found[f"ttft_{name}_ms"] for name in ("before", "long", "behind")]
    assert times == pytest.approx([150, 1250, 500])
    with pytest.raises(UsageError, match="ended before"):
        serving.of_arrivals([[behind, before, long, behind]])
    idle = load.Heard(0.0, [0.5, 3.0], 2, 0)
    with pytest.raises(UsageError, match="no token came"):
        serving.of_arrivals([[idle, before, long, behind]])


def test_experts_that_several_users_choose(serving):
    (dense,) = programs(shapes.config_of("glm-edge-1.5b"), Cluster(max_seq_len=16))
    assert [serving.gain_by_experts(dense, users) for users in (1, 7)] == [1, 7]
    (flash,) = programs(shapes.config_of("glm-4.7-flash"), Cluster(max_seq_len=16))
    assert serving.gain_by_experts(flash, 1) == pytest.approx(1)
    # 46 of 47 layers have 64 experts, 4 chosen: 3 matrices of 2048 x 1536, and one shared.
    expert, rng = 46 * 3 * 2048 * 1536 * 18 // 32, random.Random(0)
    one = serving.matrix_bytes(flash)
    trials = [len({e for _ in range(8) for e in rng.sample(range(64), 4)}) for _ in range(4000)]
    all_bytes = one + (sum(trials) / len(trials) - 4) * expert
    assert serving.gain_by_experts(flash, 8) == pytest.approx(8 * one / all_bytes, rel=0.005)

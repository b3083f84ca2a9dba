"""Logits and greedy tokens against transformers, on tiny random checkpoints of every kind."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sequence import Request
from pyllama_dist.formats.convert import convert
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS
from pyllama_dist.simulate import simulated_root
from tests.tiers import slow_but

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
NODES = (1, 2, 3, 4, 5, 8)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, tmp_path_factory):
    """A converted checkpoint in float32, with its tokens, logits and greedy continuation."""
    out = tmp_path_factory.mktemp(request.param)
    convert(GOLDEN / request.param, out, FloatType.F32, CHECKPOINTS, lambda done, total: None)
    with ModelFile.open(out / "model.m", ARCHITECTURES) as model:
        yield model, dict(np.load(GOLDEN / request.param / "golden.npz"))


@contextmanager
def engine(
    model: ModelFile, n_nodes: int, sync: FloatType = FloatType.F32, n_threads: int = 1
) -> Iterator[Engine]:
    made = programs(model.config, Cluster(local_workers=n_nodes - 1, sync=sync))
    with simulated_root(model, made, n_threads) as root, Engine(root) as found:
        yield found


def test_there_are_checkpoints_of_every_kind():
    assert len(VARIANTS) >= 6
    kinds = {"glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"}
    assert {
        json.loads((GOLDEN / v / "config.json").read_text())["model_type"] for v in VARIANTS
    } == kinds


@pytest.mark.parametrize("n_nodes", slow_but([3], NODES))
def test_logits_are_those_of_transformers(golden, n_nodes):
    model, expected = golden
    with engine(model, n_nodes) as e:
        logits = e.logits(expected["tokens"].tolist())
    assert logits.shape == expected["logits"].shape
    assert np.abs(logits - expected["logits"]).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("n_nodes", NODES)
def test_greedy_tokens_are_those_of_transformers(golden, n_nodes):
    model, expected = golden
    with engine(model, n_nodes) as e:
        prompt, greedy = expected["tokens"].tolist(), expected["greedy"].tolist()
        request = Request(prompt, lambda row: int(row.argmax()), max_tokens=len(greedy))
        tokens = list(e.submit(request))
    assert tokens == greedy


@pytest.mark.slow
def test_reference_kernels_give_the_logits_of_transformers(golden, monkeypatch):
    monkeypatch.setenv("PYLLAMA_KERNELS", "reference")
    model, expected = golden
    with engine(model, 3) as e:
        logits = e.logits(expected["tokens"].tolist())
    assert np.abs(logits - expected["logits"]).max() < 1e-3


@pytest.mark.slow
def test_one_by_one_gives_the_logits_of_a_batch(golden):
    model, expected = golden
    tokens = expected["tokens"].tolist()
    one_by_one = []
    with engine(model, 2) as e:
        for end in range(1, len(tokens) + 1):
            sampler = lambda row: one_by_one.append(row.copy()) or 0  # noqa: E731
            list(e.submit(Request(tokens[:end], sampler, stop=(0,))))
    assert len(one_by_one) == len(tokens)
    assert np.abs(np.array(one_by_one) - expected["logits"]).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("n_nodes", [2, 3, 5])
def test_q80_sync_stays_close(golden, n_nodes):
    model, expected = golden
    with engine(model, n_nodes, FloatType.Q80) as e:
        logits = e.logits(expected["tokens"].tolist())
    ours, theirs = logits.ravel(), expected["logits"].ravel()
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    # An indexer's choice of so few positions may fall on others.
    assert cosine > (0.9 if model.config.indexer else 0.99)

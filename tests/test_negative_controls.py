"""Mistakes that a reader of the equations could make: the golden logits must show each of them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType, Pairs, Scoring
from pyllama_dist.engine.engine import Engine
from pyllama_dist.formats.convert import convert
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS
from pyllama_dist.models.layers import Instruction, Layers
from pyllama_dist.models.plan import ShardingPlan, shards
from pyllama_dist.ops import Add
from pyllama_dist.program import Program
from pyllama_dist.simulate import simulated_root
from pyllama_kernels import reference

GOLDEN = Path(__file__).parent / "golden"
WRONG = 0.5  # a logit that is off by so much comes from no rounding

pytestmark = pytest.mark.timeout(60)


class Changed:
    """A model file whose header says something else."""

    def __init__(self, file: ModelFile, **changes: object) -> None:
        self.config = replace(file.config, **changes)
        self.slice, self.raw, self.drop_pages = file.slice, file.raw, file.drop_pages


@pytest.fixture
def golden(tmp_path, request) -> Iterator[tuple[ModelFile, list[int], np.ndarray]]:
    folder = GOLDEN / request.param
    convert(folder, tmp_path, FloatType.F32, CHECKPOINTS, lambda done, total: None)
    expected = np.load(folder / "golden.npz")
    with ModelFile.open(tmp_path / "model.m", ARCHITECTURES) as file:
        yield file, expected["tokens"].tolist(), expected["logits"]


def error(model, programs: list[Program], tokens: list[int], expected: np.ndarray) -> float:
    with simulated_root(model, programs) as root, Engine(root) as engine:
        return float(np.abs(engine.logits(tokens) - expected).max())


def programs_of(model, n_nodes: int = 1) -> list[Program]:
    return programs(model.config, Cluster(local_workers=n_nodes - 1, sync=FloatType.F32))


EVERY = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))


@pytest.mark.parametrize("golden", EVERY, indirect=True)
def test_the_other_pairing_of_rope(golden):
    file, tokens, expected = golden
    other = Pairs.HALVES if file.config.rope_pairs is Pairs.ADJACENT else Pairs.ADJACENT
    model = Changed(file, rope_pairs=other)
    assert error(model, programs_of(model), tokens, expected) > WRONG


WITH_EXPERTS = [name for name in EVERY if "moe" in name]


@pytest.mark.parametrize("golden", WITH_EXPERTS, indirect=True)
@pytest.mark.parametrize(
    "change",
    [{"scoring": Scoring.SOFTMAX}, {"scale": 1.0}, {"normalize": False}],
    ids=lambda change: next(iter(change)),
)
def test_another_router(golden, change):
    file, tokens, expected = golden
    if change.get("scale") == file.config.experts.scale:
        pytest.skip("that is its scale")
    model = Changed(file, experts=replace(file.config.experts, **change))
    assert error(model, programs_of(model), tokens, expected) > WRONG / 5


@pytest.mark.parametrize("golden", WITH_EXPERTS, indirect=True)
def test_a_bias_that_reaches_the_weights(golden, monkeypatch):
    file, tokens, expected = golden
    right = reference.route

    def wrong(x, bias, softmax, active, groups, active_groups, normalize, scale, out):
        scores = 1 / (1 + np.exp(-x)) + bias
        right(x, bias, softmax, active, groups, active_groups, normalize, scale, out)
        out[:] = np.where(out > 0, scores, 0)
        out[:] *= scale / out.sum(axis=1, keepdims=True)

    monkeypatch.setenv("PYLLAMA_KERNELS", "reference")
    programs = programs_of(file)
    assert error(file, programs, tokens, expected) < 1e-3
    monkeypatch.setattr(reference, "route", wrong)
    assert error(file, programs, tokens, expected) > WRONG / 5


@pytest.mark.parametrize("golden", ["glm4_bias_bf16"], indirect=True)
def test_a_norm_before_the_reduction(golden):
    """Right on one node, where the parts are the whole; wrong on two."""
    file, tokens, expected = golden
    c = file.config

    def steps(layers: Layers) -> Iterator[Instruction]:
        yield from layers.start()
        for layer in range(c.n_layers):
            at = f"layers.{layer}."
            halves = (
                ("input_layernorm", layers.attention_block, "post_self_attn_layernorm"),
                ("post_attention_layernorm", layers.mlp_block, "post_mlp_layernorm"),
            )
            for before, mix, after in halves:
                yield layers.norm("x", "y", at + before)
                yield from mix(layer)
                parts = "sum" if layers.alone else "partials"
                yield layers.norm(parts, parts, at + after)
                yield from layers.all_reduce()
                yield Add("sum", "x")
        yield from layers.head()

    def wrong_programs(n_nodes: int) -> list[Program]:
        limits = {"max_rows": 64, "max_logits": 8, "n_seqs": 1, "n_blocks": 1, "seq_len": 64}
        plan = ShardingPlan(shards(c, n_nodes), FloatType.F32, FloatType.F32, **limits)
        layers = [Layers(c, plan, node) for node in range(n_nodes)]
        return [each.program(steps(each)) for each in layers]

    assert error(file, wrong_programs(1), tokens, expected) < 1e-3
    assert error(file, wrong_programs(2), tokens, expected) > WRONG


def test_every_family_is_here():
    configs = [json.loads((GOLDEN / name / "config.json").read_text()) for name in EVERY]
    kinds = {config["model_type"] for config in configs}
    assert kinds == {"glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"}

"""A new op and a new dense model need no change anywhere else: here both are in this file alone.

The model is a plain decoder with a squared ReLU in its feed-forward part, no gate, no biases. It is
compared with its equations in float64, written once more at the end.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pyllama_dist.config import FloatType, ModelConfig, Tensor
from pyllama_dist.executor.lowering import Cut, Lowering, Row
from pyllama_dist.executor.memory import Memory
from pyllama_dist.models.layers import Instruction, Layers
from pyllama_dist.models.plan import ShardingPlan, shards
from pyllama_dist.ops import Add
from pyllama_dist.program import Batch, Buffer, Name, Op, Part, Program, Shapes, ops_by_tag
from pyllama_dist.simulate import simulated_root
from pyllama_dist.validate import Check
from pyllama_kernels.entry import entry
from pyllama_kernels.optable import f32, split

pytestmark = pytest.mark.timeout(120)
TOKENS = (5, 9, 2, 100, 0, 9, 77, 31)


# --- a new op: target = max(source, 0)^2


@entry
def relu_squared(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    size = step[op.rows] * op.n
    x, out = f32(op.a, size), f32(op.out, size)
    first, last = split(size, part, parts)
    for i in range(first, last):
        out[i] = max(x[i], np.float32(0)) ** 2


class ReluSquared(Part, Op, frozen=True, tag="relu_squared"):
    """target = max(source, 0)^2."""

    source: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        yield shapes.like(self.target, self.source)

    def validate(self, check: Check) -> None:
        check.same(self.source, self.target)

    def run(self, memory: Memory) -> None:
        memory.f32(self.target)[:] = np.maximum(memory.f32(self.source), 0) ** 2

    def lower(self, table: Lowering) -> list[Row]:
        a, n = table.at(self.source), table.width(self.source)
        return [table.row("relu_squared", self.target, Cut.NUMBERS, cost=n, a=a, n=n)]


# --- a new model


def tensors(c: ModelConfig) -> list[Tensor]:
    def matrix(name: str, rows: int, cols: int) -> Tensor:
        return Tensor(f"{name}.weight", (rows, cols), c.weights, (name,))

    def vector(name: str) -> Tensor:
        return Tensor(f"{name}.weight", (c.dim,), FloatType.F32, (name,))

    found = [Tensor("embed_tokens.weight", (c.vocab_size, c.dim), FloatType.F32, ("embed",))]
    for layer in range(c.n_layers):
        at = f"layers.{layer}"
        found += [matrix(f"{at}.self_attn.q_proj", c.q_dim, c.dim)]
        found += [matrix(f"{at}.self_attn.{x}_proj", c.kv_dim, c.dim) for x in "kv"]
        found += [matrix(f"{at}.self_attn.o_proj", c.dim, c.q_dim)]
        found += [matrix(f"{at}.mlp.up_proj", c.ffn_dim, c.dim)]
        found += [matrix(f"{at}.mlp.down_proj", c.dim, c.ffn_dim)]
        found += [vector(f"{at}.input_layernorm"), vector(f"{at}.post_attention_layernorm")]
    return [*found, vector("norm"), matrix("lm_head", c.vocab_size, c.dim)]


def build(c: ModelConfig, plan: ShardingPlan, node: int) -> Program:
    layers = Layers(c, plan, node)

    def instructions() -> Iterator[Instruction]:
        yield from layers.start()
        for layer in range(c.n_layers):
            at, ffn = f"layers.{layer}", layers.shard.ffn
            yield layers.norm("x", "y", f"{at}.input_layernorm")
            yield from layers.attention_block(layer)
            yield from layers.all_reduce()
            yield Add("sum", "x")
            yield layers.norm("x", "y", f"{at}.post_attention_layernorm")
            yield from layers.rounded("y")
            yield layers.all_to_sharded("y", "up", f"{at}.mlp.up_proj", ffn, c.dim)
            yield ReluSquared("up", "hidden")
            yield from layers.sharded_to_all("hidden", f"{at}.mlp.down_proj", ffn)
            yield from layers.all_reduce()
            yield Add("sum", "x")
        yield from layers.head()

    return layers.program(instructions())


# --- the test


@pytest.mark.parametrize("kernels", ["reference", "compiled"])
@pytest.mark.parametrize("n_nodes", [1, 2, 3])
@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q40], ids=lambda t: t.name)
def test_a_new_op_and_a_new_model_run_on_any_number_of_nodes(
    tiny, monkeypatch, kernels, n_nodes, weights
):
    if kernels == "reference":  # compiled are those of this CPU
        monkeypatch.setenv("PYLLAMA_KERNELS", kernels)
    other = tiny(qkv_bias=False, weights=weights)
    model = type(other)(other.config, tensors(other.config))
    plan = ShardingPlan(shards(model.config, n_nodes), FloatType.F32, FloatType.F32, 8, 8, 1, 1, 32)
    programs = [build(model.config, plan, node) for node in range(n_nodes)]
    rows = range(len(TOKENS))
    with simulated_root(model, programs, n_threads=2) as root:
        found = root.step(TOKENS, Batch((0,) * len(rows), tuple(rows), tuple(rows))).copy()
    expected = logits_of(model, TOKENS)
    tolerance = 1e-4 if weights is FloatType.F32 else 0.05  # activations are rounded to Q80
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_it_has_a_name_on_the_wire():
    assert ops_by_tag()["relu_squared"] is ReluSquared


def logits_of(model, tokens: tuple[int, ...]) -> np.ndarray:
    """[tokens, vocab] float64, from the equations."""
    c, n = model.config, len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(1, keepdims=True) + c.norm_epsilon) * model.values(name)[0]

    def rotated(x: np.ndarray) -> np.ndarray:
        """[tokens, heads, head_dim], the first rotary_dim of each head in adjacent pairs."""
        pairs = np.arange(c.rotary_dim // 2)
        angles = np.outer(np.arange(n), c.rope_theta ** (-2 * pairs / c.rotary_dim))
        first, second = x[..., 0 : c.rotary_dim : 2], x[..., 1 : c.rotary_dim : 2]
        rotated = (first + 1j * second) * np.exp(1j * angles)[:, None]
        out = x.copy()
        out[..., 0 : c.rotary_dim : 2], out[..., 1 : c.rotary_dim : 2] = rotated.real, rotated.imag
        return out

    x = model.values("embed_tokens")[list(tokens)]
    for layer in range(c.n_layers):
        at = f"layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            (y @ model.values(f"{at}.self_attn.{name}_proj").T).reshape(n, -1, c.head_dim)
            for name in "qkv"
        )
        k, v = (np.repeat(part, c.n_heads // c.n_kv_heads, axis=1) for part in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", rotated(q), k) / np.sqrt(c.head_dim)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        z = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
        x = x + z @ model.values(f"{at}.self_attn.o_proj").T
        y = norm(x, f"{at}.post_attention_layernorm")
        hidden = np.maximum(y @ model.values(f"{at}.mlp.up_proj").T, 0) ** 2
        x = x + hidden @ model.values(f"{at}.mlp.down_proj").T
    return norm(x, "norm") @ model.values("lm_head").T

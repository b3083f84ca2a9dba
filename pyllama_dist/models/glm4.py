"""GLM-4-0414 (`model_type` glm4): GLM-4-9B/32B-0414, GLM-Z1. A norm before and after each half.

Source of the equations: modeling_glm4.py of transformers 5.23.
"""

from collections.abc import Iterator, Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Tensor
from pyllama_dist.models.checkpoint import dense_config
from pyllama_dist.models.dense import Dense, Step, dense_tensors
from pyllama_dist.models.plan import Plan
from pyllama_dist.program import Add, Program


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    return dense_config(Arch.GLM4, hf, weights)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return dense_tensors(
        c,
        norms=(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
    )


def build(c: ModelConfig, plan: Plan, node: int) -> Program:
    """The program of one node."""
    dense = Dense(c, plan, node)
    return dense.program(_steps(c, dense))


def _steps(c: ModelConfig, dense: Dense) -> Iterator[Step]:
    yield from dense.start()
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        yield dense.norm("x", "y", f"{at}input_layernorm")
        yield from dense.attention(at)
        yield from dense.all_reduce("sum")
        # A norm is not linear: it must see the whole sum, never a node's part of it.
        yield dense.norm("sum", "y", f"{at}post_self_attn_layernorm")
        yield Add("y", "x")
        yield dense.norm("x", "y", f"{at}post_attention_layernorm")
        yield from dense.ffn(at)
        yield from dense.all_reduce("sum")
        yield dense.norm("sum", "y", f"{at}post_mlp_layernorm")
        yield Add("y", "x")
    yield from dense.head()

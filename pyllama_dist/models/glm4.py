"""GLM-4-0414 (`model_type` glm4): GLM-4-9B/32B-0414, GLM-Z1. A norm before and after each half.

Source of the equations: modeling_glm4.py of transformers 5.23.
"""

from collections.abc import Iterator, Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import Instruction, Layers
from pyllama_dist.models.plan import ShardingPlan
from pyllama_dist.models.tensors import model_tensors
from pyllama_dist.ops import Add
from pyllama_dist.program import Program

NORMS = (
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    return common_config(Fields(Arch.GLM4, hf), weights, rotary=0.5, pairs=Pairs.ADJACENT)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=NORMS, fused=True)


def build(c: ModelConfig, plan: ShardingPlan, node: int) -> Program:
    """The program of one node."""
    layers = Layers(c, plan, node)
    return layers.program(_steps(c, layers))


def _steps(c: ModelConfig, layers: Layers) -> Iterator[Instruction]:
    yield from layers.start()
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        yield layers.norm("x", "y", f"{at}input_layernorm")
        yield from layers.attention_block(layer)
        yield from layers.all_reduce()
        # A norm is not linear: it must see the whole sum, never a node's part of it.
        yield layers.norm("sum", "y", f"{at}post_self_attn_layernorm")
        yield Add("y", "x")
        yield layers.norm("x", "y", f"{at}post_attention_layernorm")
        yield from layers.mlp_block(layer)
        yield from layers.all_reduce()
        yield layers.norm("sum", "y", f"{at}post_mlp_layernorm")
        yield Add("y", "x")
    yield from layers.head()

"""GLM-4.5 to 4.7, GLM-4.5-Air, INTELLECT-3 (`model_type` glm4_moe): a mixture of experts.

Source of the equations: modeling_glm4_moe.py of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config, glm_experts
from pyllama_dist.models.layers import Layers
from pyllama_dist.models.plan import Plan
from pyllama_dist.models.tensors import model_tensors
from pyllama_dist.program import Program

NORMS = ("input_layernorm", "post_attention_layernorm")


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.GLM4_MOE, hf)
    config = common_config(fields, weights, rotary=0.5, pairs=Pairs.HALVES)
    experts = glm_experts(fields, dense_layers=1)
    return replace(config, qk_norm=fields.flag("use_qk_norm"), experts=experts)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=NORMS)


def build(c: ModelConfig, plan: Plan, node: int) -> Program:
    """The program of one node."""
    layers = Layers(c, plan, node)
    return layers.program(layers.pre_norm())

"""GLM (`model_type` glm): glm-4-9b-chat-hf, GLM-Edge. A norm before each half of a layer.

Source of the equations: modeling_glm.py of transformers 5.23.
"""

from collections.abc import Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import Layers
from pyllama_dist.models.plan import Plan
from pyllama_dist.models.tensors import model_tensors
from pyllama_dist.program import Program

NORMS = ("input_layernorm", "post_attention_layernorm")


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    return common_config(Fields(Arch.GLM, hf), weights, rotary=0.5, pairs=Pairs.ADJACENT)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=NORMS, fused=True)


def build(c: ModelConfig, plan: Plan, node: int) -> Program:
    """The program of one node."""
    layers = Layers(c, plan, node)
    return layers.program(layers.pre_norm())

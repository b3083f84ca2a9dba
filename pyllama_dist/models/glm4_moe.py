"""GLM-4.5 to 4.7, GLM-4.5-Air, INTELLECT-3 (`model_type` glm4_moe): a mixture of experts.

Source of the equations: modeling_glm4_moe.py of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config, glm_experts
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.GLM4_MOE, hf)
    config = common_config(fields, weights, rotary=0.5, pairs=Pairs.HALVES)
    experts = glm_experts(fields, dense_layers=1)
    return replace(config, qk_norm=fields.flag("use_qk_norm"), experts=experts)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS)


build = build_pre_norm

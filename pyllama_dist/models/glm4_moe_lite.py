"""GLM-4.7-Flash (`model_type` glm4_moe_lite): latent attention and a mixture of experts.

Source of the equations: modeling_glm4_moe_lite.py of transformers 5.23.
"""

from collections.abc import Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Tensor
from pyllama_dist.models.fields import Fields, glm_experts, latent_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.GLM4_MOE_LITE, hf)
    return latent_config(fields, weights, glm_experts(fields, dense_layers=1))


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS)


build = build_pre_norm

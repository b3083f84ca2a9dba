"""GLM (`model_type` glm): glm-4-9b-chat-hf, GLM-Edge. A norm before each half of a layer.

Source of the equations: modeling_glm.py of transformers 5.23.
"""

from collections.abc import Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    return common_config(Fields(Arch.GLM, hf), weights, rotary=0.5, pairs=Pairs.ADJACENT)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS, fused=True)


build = build_pre_norm

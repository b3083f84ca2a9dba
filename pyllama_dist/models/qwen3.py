"""Qwen3 (`model_type` qwen3): norms of query and key heads.

Source of the equations: modeling_qwen3.py of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.QWEN3, hf)
    fields.refuse({"attention_bias": (None, False)})
    config = common_config(fields, weights, rotary=1.0, pairs=Pairs.HALVES)
    return replace(config, qk_norm=True)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS)


build = build_pre_norm

"""Qwen3-MoE (`model_type` qwen3_moe): a softmax over all experts, of which some are taken.

Source of the equations: modeling_qwen3_moe.py of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, Experts, FloatType, ModelConfig, Pairs, Scoring, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.QWEN3_MOE, hf)
    fields.refuse(
        {
            "attention_bias": (None, False),
            "mlp_only_layers": (None, []),
            "decoder_sparse_step": (None, 1),
        }
    )
    experts = Experts(
        count=fields.integer("num_experts", 4096),
        active=fields.integer("num_experts_per_tok", 256),
        ffn_dim=fields.integer("moe_intermediate_size"),
        shared_ffn_dim=0,
        dense_layers=0,
        scoring=Scoring.SOFTMAX,
        bias=False,
        groups=1,
        active_groups=1,
        normalize=fields.flag("norm_topk_prob"),
        scale=1.0,
    )
    config = common_config(fields, weights, rotary=1.0, pairs=Pairs.HALVES)
    return replace(config, qk_norm=True, experts=experts)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS)


build = build_pre_norm

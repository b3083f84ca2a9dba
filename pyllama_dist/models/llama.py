"""Llama and Mistral (`model_type` llama, mistral), as distributed-llama keeps them.

Rows of query and key heads are kept in the order in which pairs stand side by side, as Meta's own
files have them; Hugging Face's have the halves of a head after each other.
Source of the equations: modeling_llama.py of transformers 5.23.
"""

from collections.abc import Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig, Order, Pairs, Tensor
from pyllama_dist.models.fields import Fields, common_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.LLAMA, hf)
    fields.refuse({"attention_bias": (None, False)})
    return common_config(fields, weights, rotary=1.0, pairs=Pairs.ADJACENT, scalable=True)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS, order=Order.ADJACENT)


build = build_pre_norm

"""ChatGLM2, ChatGLM3 and the original GLM-4 files (`model_type` chatglm): GLM under older names.

Source of the names and fields: modeling_chatglm.py and configuration_chatglm.py, which lie beside
these checkpoints.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, FloatType, ModelConfig, Pairs, Tensor
from pyllama_dist.errors import FileError
from pyllama_dist.models import glm
from pyllama_dist.models.fields import Fields, common_config

_THETA = 10000.0  # times rope_ratio

# Hugging Face's field names, by those of this family.
_FIELDS = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
}
_INERT: dict[str, tuple[object, ...]] = {
    "rmsnorm": (True,),
    "add_bias_linear": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "post_layer_norm": (True,),
    "pre_seq_len": (None,),
    "quantization_bit": (None, 0),
}
_NAMES = {
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_WHOLE = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`; that of a GLM."""
    if "position_encoding_2d" in hf:
        raise FileError(
            "config.json: the first ChatGLM-6B is another architecture, which is not implemented; "
            "use ChatGLM3-6B or a later one"
        )
    theirs = Fields(Arch.GLM, hf)
    theirs.refuse(_INERT)
    for name in _FIELDS:
        if not theirs.has(name):
            raise FileError(f"config.json: {name} is missing; is the file complete?")
    values = {ours: hf[name] for name, ours in _FIELDS.items()}
    groups = "multi_query_group_num" if hf.get("multi_query_attention") else "num_attention_heads"
    values["num_key_value_heads"] = theirs.integer(groups, 4096)
    ratio = theirs.number("rope_ratio", 1e-6, 1e6) if theirs.has("rope_ratio") else 1
    values["rope_theta"] = _THETA * ratio
    return common_config(Fields(Arch.GLM, values), weights, rotary=0.5, pairs=Pairs.ADJACENT)


def tensors(c: ModelConfig) -> list[Tensor]:
    """Those of a GLM, from where these checkpoints keep them."""
    stops = {"q": c.q_dim, "k": c.q_dim + c.kv_dim, "v": c.q_dim + 2 * c.kv_dim}
    starts = {"q": 0, "k": stops["q"], "v": stops["k"]}

    def renamed(tensor: Tensor) -> Tensor:
        source = tensor.source[0]
        for part, start in starts.items():
            if f".{part}_proj." in source:
                fused = source.replace(f"self_attn.{part}_proj", "self_attention.query_key_value")
                return replace(tensor, source=(_prefixed(fused),), source_rows=(start, stops[part]))
        for name, theirs in _NAMES.items():
            source = source.replace(name, theirs)
        return replace(tensor, source=(_WHOLE.get(source) or _prefixed(source),))

    return [renamed(tensor) for tensor in glm.tensors(c)]


def _prefixed(name: str) -> str:
    return name.replace("model.", "transformer.encoder.", 1)

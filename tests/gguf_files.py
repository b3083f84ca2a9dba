"""What the tests of GGUF import share: models written as llama.cpp's converter writes them."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from gguf.quants import quantize

from pyllama_dist.config import FloatType
from pyllama_dist.errors import FileError
from pyllama_dist.formats.convert import Report, convert
from pyllama_dist.formats.huggingface.checkpoint import Checkpoint
from pyllama_dist.models import CHECKPOINTS

GOLDEN = Path(__file__).parent / "golden"
ARCHS = {"glm": "chatglm", "glm4": "glm4", "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2"}

# glm.md's names, written down a second time: what llama.cpp calls each tensor of a layer.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER_OF_MOE = LAYER | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
NAMES = {
    "glm": LAYER,
    "glm4": LAYER,
    "glm4_moe": LAYER_OF_MOE | {"post_attention_layernorm": "post_attention_norm"},
    "glm4_moe_lite": LAYER_OF_MOE,
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MOE = {
    "expert_count": 3,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_feed_forward_length": 32,
    "leading_dense_block_count": 1,
    "expert_gating_func": 2,
    "expert_weights_scale": 1.8,
    "expert_weights_norm": True,
}

Arrays = Mapping[str, np.ndarray]
Metadata = Callable[[gguf.GGUFWriter], object]

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def write(
    path: Path,
    arch: str,
    tensors: Arrays,
    metadata: Metadata = lambda writer: None,
    types: Mapping[str, Type] | None = None,
    parts: int = 0,
) -> Path:
    """Writes float32 arrays, those in `types` quantized, in parts of so many tensors."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=parts)
    metadata(writer)
    for name, values in tensors.items():
        kind = (types or {}).get(name, Type.F32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config: Mapping[str, object]) -> Metadata:
    """What llama.cpp's converter says of a model with this config.json."""
    rope = config.get("rope_parameters") or config

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(rope["rope_theta"])
        if config["model_type"] == "glm4_moe_lite":
            writer.add_head_count_kv(1)
            writer.add_q_lora_rank(config["q_lora_rank"])
            writer.add_kv_lora_rank(config["kv_lora_rank"])
            writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
            writer.add_value_length(config["kv_lora_rank"])
            writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
            writer.add_value_length_mla(config["v_head_dim"])
            writer.add_rope_dimension_count(config["qk_rope_head_dim"])
        else:
            writer.add_head_count_kv(config["num_key_value_heads"])
            writer.add_key_length(config["head_dim"])
            factor = rope.get("partial_rotary_factor", 0.5)
            writer.add_rope_dimension_count(int(config["head_dim"] * factor))
        if "n_routed_experts" in config:
            writer.add_leading_dense_block_count(config["first_k_dense_replace"])
            writer.add_expert_count(config["n_routed_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
            writer.add_expert_shared_count(config["n_shared_experts"])
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_group_count(config["n_group"])
            writer.add_expert_group_used_count(config["topk_group"])
            writer.add_expert_weights_scale(config["routed_scaling_factor"])
            writer.add_expert_weights_norm(config["norm_topk_prob"])
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)

    return add


def small(arch: str, layers: int = 1, kv_heads: int = 2, **more: object) -> Metadata:
    """Metadata that every architecture has: 4 heads, 64 wide; and `more`."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(layers)
        writer.add_context_length(512)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1e6)
        for key, value in more.items():
            match value:
                case bool():
                    writer.add_bool(f"{arch}.{key}", value)
                case int():
                    writer.add_uint32(f"{arch}.{key}", value)
                case float():
                    writer.add_float32(f"{arch}.{key}", value)
                case str():
                    writer.add_string(f"{arch}.{key}", value)

    return add


def sentencepiece_metadata(writer: gguf.GGUFWriter) -> None:
    pieces = [("<unk>", 0.0, TokenType.UNKNOWN)]
    pieces += [("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    words = ("▁t", "he", "▁the", "▁he", "<s")
    pieces += [(word, -float(n), TokenType.NORMAL) for n, word in enumerate(words)]
    pieces += [(char, -100.0, TokenType.NORMAL) for char in "▁the<s>"[:5] + "s>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def llama_name(name: str, layer_names: Mapping[str, str]) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, stem = name.split(".", 3)
    if stem == "mlp.gate.e_score_correction_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    stem, _, kind = stem.rpartition(".")
    return f"blk.{layer}.{layer_names[stem]}.{kind}"


def llama_tensors(variant: str) -> dict[str, np.ndarray]:
    """The tensors of a golden checkpoint as llama.cpp's converter names, cuts and stacks them."""
    config = json.loads((GOLDEN / variant / "config.json").read_text())
    layer_names = NAMES[config["model_type"]]
    tensors, experts = {}, {}
    for name, values in golden_tensors(variant).items():
        before, is_expert, after = name.partition(".mlp.experts.")
        if is_expert:
            number, _, matrix = after.partition(".")
            stack = llama_name(f"{before}.mlp.experts.{matrix}", layer_names)
            experts.setdefault(stack, {})[int(number)] = values
        elif name.endswith("kv_b_proj.weight"):
            at, nope = f"blk.{name.split('.')[2]}.", config["qk_nope_head_dim"]
            heads = values.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            tensors[f"{at}attn_k_b.weight"] = heads[:, :nope].transpose(0, 2, 1).copy()
            tensors[f"{at}attn_v_b.weight"] = heads[:, nope:].copy()
        else:
            tensors[llama_name(name, layer_names)] = values
    for stack, parts in experts.items():
        tensors[stack] = np.stack([parts[number] for number in range(len(parts))])
    return tensors


def is_matrix(name: str, values: np.ndarray) -> bool:
    """Whether a model keeps it in the format of its weights; by either kind of name."""
    floats = ("embd", "embed", "ffn_gate_inp", "mlp.gate.")
    return values.ndim > 1 and not any(part in name for part in floats)


def golden_tensors(variant: str) -> dict[str, np.ndarray]:
    """The tensors of a golden checkpoint by Hugging Face's names, float32."""
    checkpoint = Checkpoint.open(GOLDEN / variant)
    return {
        name: checkpoint.rows(name, 0, math.prod(checkpoint.shape(name)[:-1])).reshape(
            checkpoint.shape(name)
        )
        for name in sorted(checkpoint.names)
    }


def golden_gguf(
    path: Path, variant: str, kind: Type, metadata: Metadata | None = None, n_tokens: int = 0
) -> Path:
    """A golden checkpoint as GGUF; of its matrices all but the embedding are of type `kind`.

    Embedding and head get rows of zeros for a tokenizer of `n_tokens`.
    """
    config = json.loads((GOLDEN / variant / "config.json").read_text())
    tensors = llama_tensors(variant)
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors and len(tensors[name]) < n_tokens:
            tensors[name] = np.pad(tensors[name], ((0, n_tokens - len(tensors[name])), (0, 0)))
    matrices = [name for name, values in tensors.items() if is_matrix(name, values)]

    def add(writer: gguf.GGUFWriter) -> None:
        metadata_of(config)(writer)
        if metadata is not None:
            metadata(writer)

    return write(path, ARCHS[config["model_type"]], tensors, add, dict.fromkeys(matrices, kind))


def sound(tmp_path: Path) -> Path:
    """A sound file, to be damaged or not."""
    return golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q4_0)


def run(source: Path, out: Path, weights: FloatType = FloatType.Q40) -> Report:
    return convert(source, out, weights, CHECKPOINTS, lambda done, size: None)


def refusal(source: Path, out: Path) -> str:
    """The message with which a conversion ends that must leave no file."""
    with pytest.raises(FileError) as caught:
        run(source, out)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    assert not out.exists() or not list(out.iterdir())
    return message

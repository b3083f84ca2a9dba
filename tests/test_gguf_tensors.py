"""GGUF import: each architecture's names, rows and fields."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from pyllama_dist.config import FloatType
from pyllama_dist.errors import FileError
from pyllama_dist.formats.gguf.checkpoint import GgufCheckpoint
from tests.gguf_files import MOE, normal, small, write


def opened(path: Path, arch: str, tensors: dict[str, np.ndarray], **more: object) -> GgufCheckpoint:
    return GgufCheckpoint.open(
        write(
            path / f"{arch}.gguf",
            arch,
            {"token_embd.weight": normal(101, 64)} | tensors,
            small(arch, **more),
        )
    )


def whole(checkpoint: GgufCheckpoint, name: str) -> np.ndarray:
    shape = checkpoint.shape(name)
    return checkpoint.rows(name, 0, math.prod(shape[:-1])).reshape(shape)


def test_glm4moe(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.bias": normal(64),
        "blk.0.attn_q_norm.weight": normal(16),
        "blk.0.post_attention_norm.weight": normal(64),
        "blk.0.ffn_gate.weight": normal(96, 64),
        "blk.1.ffn_gate_inp.weight": normal(3, 64),
        "blk.1.exp_probs_b.bias": normal(3),
        "blk.1.ffn_gate_exps.weight": normal(3, 32, 64),
        "blk.1.ffn_down_exps.weight": normal(3, 64, 32),
        "blk.1.ffn_up_shexp.weight": normal(32, 64),
        "blk.2.nextn.eh_proj.weight": normal(64, 128),
        "blk.2.attn_norm.weight": normal(64),
        "output.weight": normal(101, 64),
    }
    names = {
        "blk.0.attn_q.bias": "model.layers.0.self_attn.q_proj.bias",
        "blk.0.attn_q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
        "blk.0.post_attention_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.1.ffn_gate_inp.weight": "model.layers.1.mlp.gate.weight",
        "blk.1.exp_probs_b.bias": "model.layers.1.mlp.gate.e_score_correction_bias",
        "blk.1.ffn_up_shexp.weight": "model.layers.1.mlp.shared_experts.up_proj.weight",
        "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
        "output.weight": "lm_head.weight",
    }
    more = {"layers": 3, "nextn_predict_layers": 1, "rope.dimension_count": 8}
    checkpoint = opened(tmp_path, "glm4moe", tensors, **MOE, **more)
    for gguf_name, name in names.items():
        np.testing.assert_array_equal(whole(checkpoint, name), tensors[gguf_name])
    for expert in range(3):
        for kind in ("gate", "down"):
            np.testing.assert_array_equal(
                whole(checkpoint, f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"),
                tensors[f"blk.1.ffn_{kind}_exps.weight"][expert],
            )
    assert "model.layers.2.nextn.eh_proj.weight" in checkpoint.names  # of a draft layer
    assert not checkpoint.interleaved_qk
    assert checkpoint.config == {
        "model_type": "glm4_moe",
        "hidden_act": "silu",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "n_routed_experts": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "eos_token_id": [],
    }


def test_deepseek2_has_both_halves_of_kv_b(tmp_path: Path) -> None:
    heads, nope, value, rank, rope = 4, 24, 32, 48, 8
    kv_b = normal(heads, nope + value, rank)  # of each head rows for k, then for v
    tensors = {
        "blk.0.attn_k_b.weight": kv_b[:, :nope].transpose(0, 2, 1).copy(),
        "blk.0.attn_v_b.weight": kv_b[:, nope:].copy(),
        "blk.0.attn_kv_a_mqa.weight": normal(rank + rope, 64),
        "blk.0.attn_kv_a_norm.weight": normal(rank),
        "blk.0.attn_q_a.weight": normal(40, 64),
        "blk.0.attn_q_a_norm.weight": normal(40),
        "blk.0.attn_q_b.weight": normal(heads * (nope + rope), 40),
    }
    more = {
        "kv_heads": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": value,
        "attention.q_lora_rank": 40,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
    }
    # An early file; and where the chosen weights do not sum to 1, llama.cpp says nothing.
    unsaid = ("expert_gating_func", "expert_weights_norm")
    early = {key: value for key, value in MOE.items() if key not in unsaid}
    checkpoint = opened(tmp_path, "deepseek2", tensors, **early, **more)
    at = "model.layers.0.self_attn."
    k_b = whole(checkpoint, at + "k_b_proj.weight")
    v_b = whole(checkpoint, at + "v_b_proj.weight")
    assert (k_b.shape, v_b.shape) == ((heads * rank, nope), (heads * value, rank))
    for head in range(heads):
        part = k_b[head * rank : (head + 1) * rank]
        np.testing.assert_array_equal(part.T, kv_b[head, :nope])
        part = v_b[head * value : (head + 1) * value]
        np.testing.assert_array_equal(part, kv_b[head, nope:])
    for gguf_name, name in {
        "attn_kv_a_mqa": "kv_a_proj_with_mqa",
        "attn_kv_a_norm": "kv_a_layernorm",
        "attn_q_a": "q_a_proj",
        "attn_q_a_norm": "q_a_layernorm",
        "attn_q_b": "q_b_proj",
    }.items():
        expected = tensors[f"blk.0.{gguf_name}.weight"]
        np.testing.assert_array_equal(whole(checkpoint, f"{at}{name}.weight"), expected)
    fields = {
        "model_type": "glm4_moe_lite",
        "num_key_value_heads": heads,
        "q_lora_rank": 40,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": False,
    }
    assert checkpoint.config.items() >= fields.items()


def test_llama_is_interleaved_and_scaled(tmp_path: Path) -> None:
    # distributed-llama's formula for Llama 3.1.
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    divisors = []
    for i in range(8):
        frequency = 1e6 ** (-i / 8)
        wave = 2 * math.pi / frequency
        smooth = (original / wave - low) / (high - low)
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original / low:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(divisors)) >= 3
    tensors = {"rope_freqs.weight": np.array(divisors, np.float32)}
    checkpoint = opened(tmp_path, "llama", tensors)
    assert checkpoint.interleaved_qk
    assert "rope_freqs.weight" not in checkpoint.names
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    with pytest.raises(FileError, match="frequencies of its own"):
        opened(tmp_path, "qwen3", tensors)
    tensors["rope_freqs.weight"][3] = 2.5
    with pytest.raises(FileError, match="frequencies of its own"):
        opened(tmp_path, "llama", tensors)


def test_qwen3(tmp_path: Path) -> None:
    norm = normal(32)
    tensors = {"blk.0.attn_k_norm.weight": norm}
    checkpoint = opened(tmp_path, "qwen3", tensors, **{"attention.key_length": 32})
    assert not checkpoint.interleaved_qk
    assert checkpoint.config["model_type"] == "qwen3"
    assert checkpoint.config["head_dim"] == 32
    found = whole(checkpoint, "model.layers.0.self_attn.k_norm.weight")
    np.testing.assert_array_equal(found, norm)


def test_qwen3moe(tmp_path: Path) -> None:
    experts = normal(3, 32, 64)
    sizes = {key: MOE[key] for key in list(MOE)[:2]} | {"expert_feed_forward_length": 32}
    checkpoint = opened(tmp_path, "qwen3moe", {"blk.0.ffn_up_exps.weight": experts}, **sizes)
    fields = {
        "model_type": "qwen3_moe",
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    assert checkpoint.config.items() >= fields.items()
    found = whole(checkpoint, "model.layers.0.mlp.experts.2.up_proj.weight")
    np.testing.assert_array_equal(found, experts[2])


def test_fused_experts(tmp_path: Path) -> None:
    fused = normal(3, 2 * 32, 64)  # gate, then up
    tensors = {"blk.0.ffn_gate_up_exps.weight": fused}
    checkpoint = opened(tmp_path, "glm4moe", tensors, **MOE, **{"rope.dimension_count": 8})
    for expert in range(3):
        at = f"model.layers.0.mlp.experts.{expert}."
        np.testing.assert_array_equal(
            whole(checkpoint, at + "gate_proj.weight"), fused[expert, :32]
        )
        np.testing.assert_array_equal(whole(checkpoint, at + "up_proj.weight"), fused[expert, 32:])


def test_fused_qkv_of_chatglm(tmp_path: Path) -> None:
    weight, bias = normal(128, 64), normal(128)
    tensors = {"blk.0.attn_qkv.weight": weight, "blk.0.attn_qkv.bias": bias}
    checkpoint = opened(tmp_path, "chatglm", tensors, **{"rope.dimension_count": 8})
    assert checkpoint.config["attention_bias"] is True
    for part, (first, last) in {"q": (0, 64), "k": (64, 96), "v": (96, 128)}.items():
        at = f"model.layers.0.self_attn.{part}_proj."
        np.testing.assert_array_equal(whole(checkpoint, at + "weight"), weight[first:last])
        np.testing.assert_array_equal(whole(checkpoint, at + "bias"), bias[first:last])
        assert checkpoint.shape(at + "bias") == (last - first,)


def test_experts_of_blocks_are_copied(tmp_path: Path) -> None:
    name = "blk.0.ffn_down_exps.weight"
    values = normal(3, 64, 32)
    path = write(
        tmp_path / "x.gguf",
        "glm4moe",
        {"token_embd.weight": normal(101, 64), name: values},
        small("glm4moe", **MOE, **{"rope.dimension_count": 8}),
        {name: Type.Q4_0},
    )
    checkpoint = GgufCheckpoint.open(path)
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    expected = quantize(values[1], Type.Q4_0)[5:9]
    np.testing.assert_array_equal(checkpoint.blocks(expert, FloatType.Q40, 5, 9), expected)
    assert checkpoint.blocks(expert, FloatType.Q80, 5, 9) is None
    floats = checkpoint.rows(expert, 5, 9)
    np.testing.assert_array_equal(floats, dequantize(expected, Type.Q4_0))
    with pytest.raises(ValueError, match="64 rows"):
        checkpoint.rows(expert, 60, 65)


@pytest.mark.parametrize(
    ("vocab", "positions", "note"),
    [(59264, 8192, "taken as GLM-Edge's"), (101, 64, "rope_theta and epsilon are wrong too")],
)
def test_context_of_hugging_faces_chatglm_is_mended(
    vocab: int, positions: int, note: str, tmp_path: Path
) -> None:
    def metadata(writer: gguf.GGUFWriter) -> None:
        small("chatglm", **{"rope.dimension_count": 8})(writer)
        writer.kv_data[0]["chatglm.context_length"].value = 64

    tensors = {"token_embd.weight": np.zeros((vocab, 64), np.float32)}
    checkpoint = GgufCheckpoint.open(write(tmp_path / "x.gguf", "chatglm", tensors, metadata))
    assert checkpoint.config["max_position_embeddings"] == positions
    assert note in checkpoint.notes[0]

"""GGUF import: the same weights give the same model, and damaged files are refused in one line."""

import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from pyllama_dist.cli.convert import command
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType
from pyllama_dist.engine import Engine
from pyllama_dist.errors import FileError
from pyllama_dist.formats.checkpoint import Checkpoint
from pyllama_dist.formats.convert import Report, convert
from pyllama_dist.formats.gguf_checkpoint import GgufCheckpoint
from pyllama_dist.formats.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS
from pyllama_dist.simulate import simulated_root
from pyllama_dist.text.tokenizer import Tokenizer
from pyllama_kernels.blocks import quantize_q40

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
ARCHS = {"glm": "chatglm", "glm4": "glm4", "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2"}
VARIANTS = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/config.json")
    if json.loads(path.read_text())["model_type"] in ARCHS
)
OF_WHOLE_BLOCKS = [name for name in VARIANTS if "lite" not in name]

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

Arrays = Mapping[str, np.ndarray]
Metadata = Callable[[gguf.GGUFWriter], object]


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


def golden_gguf(path: Path, variant: str, kind: Type, metadata: Metadata | None = None) -> Path:
    """A golden checkpoint as GGUF; of its matrices all but the embedding are of type `kind`."""
    config = json.loads((GOLDEN / variant / "config.json").read_text())
    tensors = llama_tensors(variant)
    matrices = [name for name, values in tensors.items() if is_matrix(name, values)]

    def add(writer: gguf.GGUFWriter) -> None:
        metadata_of(config)(writer)
        if metadata is not None:
            metadata(writer)

    return write(path, ARCHS[config["model_type"]], tensors, add, dict.fromkeys(matrices, kind))


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


def logits(model_dir: Path, tokens: list[int]) -> np.ndarray:
    with ModelFile.open(model_dir / "model.m", ARCHITECTURES) as model:
        plans = programs(model.config, Cluster(local_workers=1, sync=FloatType.F32))
        with simulated_root(model, plans, 1) as root:
            return Engine(root).logits(tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_floats_gives_the_model_of_the_safetensors(variant: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.F32)
    run(source, tmp_path / "out", FloatType.F32)
    run(GOLDEN / variant, tmp_path / "expected", FloatType.F32)
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("variant", OF_WHOLE_BLOCKS)
def test_a_q4_0_file_and_the_same_weights_as_safetensors_give_one_model(
    variant: str, tmp_path: Path
) -> None:
    same = tmp_path / "checkpoint"
    same.mkdir()
    shutil.copy(GOLDEN / variant / "config.json", same)
    tensors = {
        name: dequantize(quantize(values, Type.Q4_0), Type.Q4_0)
        if is_matrix(name, values)
        else values
        for name, values in golden_tensors(variant).items()
    }
    save_file(tensors, same / "model.safetensors")
    run(same, tmp_path / "expected")
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.Q4_0)
    report = run(source, tmp_path / "out")
    n_matrices = sum(f.float_type is FloatType.Q40 for f in _tensors(report))
    copied = n_matrices - ("lm_head.weight" not in tensors)  # a tied head is the float embedding
    assert f"matrices copied unchanged: {copied} of Q4_0" in report.warnings
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if variant == "glm4_bias_bf16":
        prompt = [3, 1, 4, 1, 5, 9, 2, 6]
        ours, theirs = (logits(file.parent, prompt) for file in files)
        np.testing.assert_array_equal(ours, theirs)


def _tensors(report: Report) -> list:
    return ARCHITECTURES[report.config.arch].tensors(report.config)


@pytest.mark.parametrize("variant", ["glm_f32", "glm4_nobias_bf16"])
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.F32)
    report = run(source, tmp_path / "out", FloatType.F32)
    assert not [line for line in report.warnings if "matrices" in line]
    expected = np.load(GOLDEN / variant / "golden.npz")
    ours = logits(tmp_path / "out", expected["tokens"].tolist())
    assert np.abs(ours - expected["logits"]).max() < 1e-3


def test_other_types_are_rounded_with_a_line(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q5_0)
    report = run(source, tmp_path / "out")
    assert "matrices rounded to Q40: 15 of Q5_0" in report.warnings
    name = "model.layers.1.self_attn.o_proj.weight"
    q5 = dequantize(quantize(golden_tensors("glm_f32")[name], Type.Q5_0), Type.Q5_0)
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        np.testing.assert_array_equal(model.raw(name.removeprefix("model.")), quantize_q40(q5))


def test_q8_0_is_copied_to_q80(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q8_0)
    report = run(source, tmp_path / "out", FloatType.Q80)
    assert "matrices copied unchanged: 15 of Q8_0" in report.warnings
    stored = quantize(golden_tensors("glm_f32")["model.layers.0.mlp.down_proj.weight"], Type.Q8_0)
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        np.testing.assert_array_equal(model.raw("layers.0.mlp.down_proj.weight"), stored)


# The other architectures: names, rows and fields.

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3moe"])
def test_distributed_llamas_architectures_end_as_the_safetensors_do(
    arch: str, kind: Type, tmp_path: Path
) -> None:
    model_type = arch.replace("moe", "_moe")
    config = {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    attention = {f"self_attn.{name}_proj": normal(*shape) for name, shape in shapes.items()}
    layer = attention | {"input_layernorm": normal(64), "post_attention_layernorm": normal(64)}
    sizes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    if arch != "llama":
        layer |= {f"self_attn.{name}_norm": normal(16) for name in "qk"}
    if arch == "qwen3moe":
        config |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
        config |= {"norm_topk_prob": True}
        layer["mlp.gate"] = normal(3, 64)
        experts = {name: normal(3, *shape) for name, shape in sizes.items()}
        layer |= {
            f"mlp.experts.{expert}.{name}_proj": values[expert].copy()
            for name, values in experts.items()
            for expert in range(3)
        }
    else:
        layer |= {f"mlp.{name}_proj": normal(*shape) for name, shape in sizes.items()}
    top = {name: normal(*((64,) if "norm" in name else (101, 64))) for name in TOP}
    stored = top | {f"model.layers.0.{name}.weight": values for name, values in layer.items()}
    stored = {
        name: dequantize(quantize(values, kind), kind) if is_matrix(name, values) else values
        for name, values in stored.items()
    }
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_file(stored, checkpoint / "model.safetensors")

    names = LAYER_OF_MOE | {"mlp.down_proj": "ffn_down"}
    tensors = {}
    for name, values in stored.items():
        if ".mlp.experts." not in name:
            tensors[llama_name(name, names)] = values
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # In each head, row j of the first half and of the second become rows 2j and 2j + 1.
            halves = values.reshape(-1, 2, 8, 64)
            tensors[llama_name(name, names)] = np.stack([*halves.swapaxes(0, 1)], 2).reshape(
                values.shape
            )
    for name in sizes if arch == "qwen3moe" else ():
        at = "model.layers.0.mlp.experts."
        parts = [stored[f"{at}{expert}.{name}_proj.weight"] for expert in range(3)]
        tensors[f"blk.0.ffn_{name}_exps.weight"] = np.stack(parts)
    more = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96}
    metadata = small(arch, **(more if arch == "qwen3moe" else {}))
    kinds = {name: kind for name, values in tensors.items() if is_matrix(name, values)}
    source = write(tmp_path / "x.gguf", arch, tensors, metadata, kinds)

    weights = FloatType.F32 if kind is Type.F32 else FloatType.Q40
    run(checkpoint, tmp_path / "expected", weights)
    run(source, tmp_path / "out", weights)
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


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


# Text files.

GLM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("I'm 12345 years old.\n\n  Fine!", "Äpfel と 水 🙂", "<think>a</think> <|user|>", "  x\t")


def glm_metadata(tokenizer: dict, padding: int = 3) -> Metadata:
    """The tokenizer as llama.cpp's converter writes it."""
    vocab = tokenizer["model"]["vocab"]
    added = tokenizer["added_tokens"]
    tokens = [*sorted(vocab, key=vocab.get), *(token["content"] for token in added)]
    kinds = [TokenType.NORMAL] * len(vocab)
    kinds += [TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for t in added]
    n_tokens = len(tokens)
    tokens += [f"[PAD{n_tokens + number}]" for number in range(padding)]
    kinds += [TokenType.UNUSED] * padding

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("glm4")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_eos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eot_token_id(tokens.index("<|user|>"))
        writer.add_chat_template("[gMASK]<sop>{{ messages }}")
        writer.add_float32("general.sampling.temp", 0.6)

    return add


def test_text_files_of_glm(tmp_path: Path) -> None:
    original = json.loads((ROOT / "pyllama_dist/builtin/tokenizer.json").read_text())
    original["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = GLM_SPLIT
    first = len(original["model"]["vocab"])
    word = {"id": first + 10, "content": "<think>", "special": False}
    original["added_tokens"].append(original["added_tokens"][0] | word)
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, glm_metadata(original))
    out = tmp_path / "out"
    report = run(source, out)
    assert sorted(report.files) == sorted(file.name for file in out.iterdir())
    assert (out / "chat_template.jinja").read_text() == "[gMASK]<sop>{{ messages }}"
    generation = json.loads((out / "generation_config.json").read_text())
    ends = [first, first + 7, first + 9]  # <|endoftext|>, <|user|>, <|observation|>
    assert generation == {"eos_token_id": ends, "temperature": 0.6}
    made = json.loads((out / "tokenizer.json").read_text())
    for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"):
        assert made[key] == original[key]
    (tmp_path / "tokenizer.json").write_text(json.dumps(original))
    ours, theirs = Tokenizer.open(out), Tokenizer.open(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_ids == set(ends)


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


def test_sentencepiece(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, sentencepiece_metadata)
    run(source, tmp_path / "out")
    tokenizer = Tokenizer.open(tmp_path / "out")
    assert tokenizer.tokens(tokenizer.encode("the he")) == [" the", " he"]
    assert tokenizer.encode("é")[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert 1 not in tokenizer.encode("<s>")  # text is never a control token
    for text in ("the he", "é\n", "<s>", "het  he"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == {2}
    assert tokenizer.added["<s>"].id == 1
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["post_processor"] is not None


def test_unknown_tokenizers_and_missing_templates_are_reported(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32)
    report = run(source, tmp_path / "out")
    assert report.files == ("model.m", "generation_config.json")
    for words in ("no tokenizer.json was made", "no chat template", "no end-of-text token"):
        assert any(words in line for line in report.warnings)


def broken(key: str, value: list) -> Metadata:
    tokenizer = json.loads((ROOT / "pyllama_dist/builtin/tokenizer.json").read_text())

    def add(writer: gguf.GGUFWriter) -> None:
        glm_metadata(tokenizer)(writer)
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value

    return add


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokens", ["a", "b"], "2 tokens, but 1283 token types"),
        ("merges", ["a"], "no sound tokenizer"),
        ("merges", ["Ġ t", "no such"], "no sound tokenizer"),
        ("tokens", ["a"] * 1283, "two of its tokens have the same text"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens is no list of str"),
    ],
)
def test_damaged_tokenizers_are_refused(key: str, value: list, reason: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, broken(key, value))
    assert reason in refusal(source, tmp_path / "out")


# Files that cannot be converted.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound file to damage."""
    return golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q4_0)


def test_a_file_in_parts(tmp_path: Path, source: Path) -> None:
    config = json.loads((GOLDEN / "glm_f32" / "config.json").read_text())
    tensors = llama_tensors("glm_f32")
    write(tmp_path / "parts.gguf", "chatglm", tensors, metadata_of(config), parts=9)
    first, *others = sorted(tmp_path.glob("parts-*.gguf"))
    assert others
    run(first, tmp_path / "out", FloatType.F32)
    run(GOLDEN / "glm_f32", tmp_path / "expected", FloatType.F32)
    expected = (tmp_path / "expected" / "model.m").read_bytes()
    assert (tmp_path / "out" / "model.m").read_bytes() == expected
    assert "give the first one" in refusal(others[0], tmp_path / "no")
    others[0].unlink()
    with pytest.raises(FileError, match=f"{others[0].name} does not exist"):
        run(first, tmp_path / "no")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.3, 0.9, 0.9999])
def test_truncated_files_are_refused(source: Path, tmp_path: Path, share: float) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "GGUF magic invalid" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("offset", [8, 16, 24])
def test_damaged_counts_are_refused(source: Path, tmp_path: Path, offset: int) -> None:
    data = bytearray(source.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 1 << 60)  # tensors, keys, length of the first key
    source.write_bytes(data)
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


def test_a_damaged_length_of_a_list_is_refused(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, sentencepiece_metadata)
    data = source.read_bytes()
    at = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    data = data[:at] + struct.pack("<Q", 1 << 60) + data[at + 8 :]
    data += bytes(-(len(data) - at) % 4)  # it ends between two numbers, not in one
    source.write_bytes(data)
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


def test_blocks_are_copied_byte_by_byte(source: Path, tmp_path: Path) -> None:
    # Blocks that rounding would change, as llama.cpp's better quantizers make them.
    found = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(source.read_bytes())
    blocks = RNG.integers(0, 256, (found.n_bytes // 18, 18), np.uint8)
    blocks[:, 1] = 0x2C  # a scale of about 0.06
    data[found.data_offset : found.data_offset + found.n_bytes] = blocks.tobytes()
    source.write_bytes(data)
    run(source, tmp_path / "out")
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        assert model.raw("layers.1.mlp.down_proj.weight").tobytes() == blocks.tobytes()


def test_bad_scales_are_refused(source: Path, tmp_path: Path) -> None:
    found = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(source.read_bytes())
    data[found.data_offset + 18 : found.data_offset + 20] = np.float16(np.nan).tobytes()
    source.write_bytes(data)
    message = refusal(source, tmp_path / "out")
    assert "mlp.down_proj.weight has blocks whose scale is NaN" in message


@pytest.mark.parametrize(
    ("arch", "more", "reason"),
    [
        ("gemma3", {}, "architecture 'gemma3' is not supported, only chatglm, glm4,"),
        ("glm4", {"rope.dimension_sections": 4}, "a model that sees"),
        ("glm4", {}, "glm4.rope.dimension_count is None"),
        ("llama", {"expert_count": 8}, "a mixture of 8 experts"),
        ("llama", {"rope.dimension_count": 8}, "rope of 8 of 16 values"),
        ("glm4moe", MOE | {"expert_gating_func": 1}, "another function of the router"),
        ("glm4moe", {}, "glm4moe.expert_feed_forward_length is None"),
        ("qwen3", {"attention.key_length": "wide"}, "attention.key_length is 'wide'"),
        ("glm4", {"rope.dimension_count": 8, "rope.scaling.type": "yarn"}, "type 'yarn'"),
    ],
)
def test_what_is_not_implemented_is_refused(
    arch: str, more: dict[str, object], reason: str, tmp_path: Path
) -> None:
    tensors = {"token_embd.weight": normal(101, 64)}
    source = write(tmp_path / "x.gguf", arch, tensors, small(arch, **more))
    assert reason in refusal(source, tmp_path / "out")


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    metadata = small("glm4", **{"rope.dimension_count": 8})
    source = write(tmp_path / "x.gguf", "glm4", {"output.weight": normal(101, 64)}, metadata)
    assert "no matrix token_embd.weight" in refusal(source, tmp_path / "out")
    source = write(tmp_path / "x.gguf", "glm4", {"token_embd.weight": normal(101, 64)}, metadata)
    message = refusal(source, tmp_path / "out")
    assert "tensor model.layers.0.self_attn.q_proj.weight is missing" in message


def test_scales_beside_a_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": normal(101, 64), "blk.0.ffn_up.scale": normal(1)}
    metadata = small("glm4", **{"rope.dimension_count": 8})
    source = write(tmp_path / "x.gguf", "glm4", tensors, metadata)
    assert "blk.0.ffn_up.scale is of a kind that is not" in refusal(source, tmp_path / "out")


def test_a_type_without_numbers_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "glm4")
    small("glm4", **{"rope.dimension_count": 8})(writer)
    writer.add_tensor("token_embd.weight", np.zeros((101, 64), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "x.gguf", tmp_path / "out")
    assert "tensor model.embed_tokens.weight: Dequantization for I8" in message


def test_a_missing_library_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install pyllama-dist[gguf]" in refusal(source, tmp_path / "out")


def test_the_command_takes_a_file(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(source), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "note: matrices copied unchanged: 15 of Q4_0" in result.output
    assert (tmp_path / "out" / "model.m").exists()

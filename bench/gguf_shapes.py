"""Writes a GGUF file with a model's shapes and random Q4_0 blocks, for llama.cpp to load.

Runs in llama.cpp's environment (packages gguf and numpy). The embedding and the head are two Q4_0
matrices, so the bytes read for a token are those of the same shape in Q40.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf  # type: ignore[import-not-found]
import numpy as np

BLOCK = 32  # weights
BLOCK_BYTES = 18  # a float16 scale, then 16 bytes of nibbles
EMBEDDING = "token_embd.weight"


class Tensor(NamedTuple):
    """A matrix of Q4_0 blocks if it has two dimensions, else a float32 vector."""

    name: str
    shape: tuple[int, ...]  # [rows, inputs], or [width]


def architecture(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of the graph that computes this configuration.

    Args:
        config: as in Hugging Face's config.json; `model_type` is one of those below.

    Raises:
        ValueError: another model_type.
    """
    if config["model_type"] in ("glm4", "llama", "qwen3"):
        return str(config["model_type"])
    if config["model_type"] != "glm":
        raise ValueError(
            f"no GGUF for model_type {config['model_type']!r}; there are glm, glm4, llama and qwen3"
        )
    # Its chatglm wants as many outputs of all heads as the model is wide; its llama turns whole
    # heads only. Where both can, the one is as fast as the other.
    full_rotary = config["partial_rotary_factor"] == 1.0
    return "llama" if full_rotary else "chatglm"


def tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors of a configuration, in the order of the file."""
    arch = architecture(config)
    dim, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_dim = config["num_attention_heads"] * config["head_dim"]
    kv_dim = config["num_key_value_heads"] * config["head_dim"]
    yield Tensor(EMBEDDING, (vocab, dim))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"blk.{layer}."
        yield Tensor(f"{prefix}attn_norm.weight", (dim,))
        for name, width in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            yield Tensor(f"{prefix}attn_{name}.weight", (width, dim))
            if config["attention_bias"]:
                yield Tensor(f"{prefix}attn_{name}.bias", (width,))
        if arch == "qwen3":
            yield Tensor(f"{prefix}attn_q_norm.weight", (config["head_dim"],))
            yield Tensor(f"{prefix}attn_k_norm.weight", (config["head_dim"],))
        yield Tensor(f"{prefix}attn_output.weight", (dim, q_dim))
        yield Tensor(f"{prefix}ffn_norm.weight", (dim,))
        if arch in ("llama", "qwen3"):
            yield Tensor(f"{prefix}ffn_gate.weight", (ffn, dim))
            yield Tensor(f"{prefix}ffn_up.weight", (ffn, dim))
        else:
            yield Tensor(f"{prefix}ffn_up.weight", (2 * ffn, dim))
        yield Tensor(f"{prefix}ffn_down.weight", (dim, ffn))
        if arch == "glm4":
            yield Tensor(f"{prefix}post_attention_norm.weight", (dim,))
            yield Tensor(f"{prefix}post_ffw_norm.weight", (dim,))
    yield Tensor("output_norm.weight", (dim,))
    yield Tensor("output.weight", (vocab, dim))


def bytes_per_token(config: Mapping[str, Any]) -> int:
    """Bytes of the matrices that every token reads: all but the embedding."""
    return sum(
        math.prod(shape) // BLOCK * BLOCK_BYTES
        for name, shape in tensors(config)
        if len(shape) == 2 and name != EMBEDDING
    )


def random_q4_0(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random nibbles, with scales that keep the size of what they are multiplied with.

    Returns:
        [rows, bytes of a row] uint8.
    """
    rows, inputs = shape
    blocks = rng.integers(0, 256, (rows * inputs // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    # A nibble less 8 has a mean square of 21.5; signs at random keep the mean at 0.
    scale = 1 / math.sqrt(21.5 * inputs)
    signs = np.where(blocks[:, 0] & 1, np.float16(scale), np.float16(-scale))
    blocks[:, :2] = signs.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write(path: Path, name: str, config: Mapping[str, Any]) -> None:
    """Writes the file, of which one tensor at a time is in memory.

    Args:
        path: of the GGUF file; it appears when it is complete.
        name: of the model, in its metadata.
        config: as in Hugging Face's config.json.
    """
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture(config))
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    rotary = config.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config["head_dim"] * rotary))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    listed = list(tensors(config))
    for tensor, shape in listed:
        if len(shape) == 2:
            packed = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            kind, size = gguf.GGMLQuantizationType.Q4_0, math.prod(packed)
            writer.add_tensor_info(tensor, packed, np.dtype(np.uint8), size, raw_dtype=kind)
        else:
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), 4 * shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for tensor, shape in listed:
        if len(shape) == 2:
            writer.write_tensor_data(random_q4_0(rng, shape))
        else:
            fill = 0 if tensor.endswith(".bias") else 1
            writer.write_tensor_data(np.full(shape, fill, np.float32))
    writer.close()
    partial.replace(path)

"""Small checkpoints with random weights and a tokenizer of bytes, as Hugging Face keeps them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from pyllama_dist.config import FloatType
from pyllama_dist.formats.convert import Report, convert
from pyllama_dist.models import CHECKPOINTS

SPECIAL = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
CONFIG: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "vocab_size": 288,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def byte_tokenizer() -> Library:
    """A token for each byte, without merges, and `SPECIAL`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return library


def random_tensors(config: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Random float16 tensors under Hugging Face's names, of the shapes that `config` says."""
    rng = np.random.default_rng(14)
    architecture = CHECKPOINTS[str(config["model_type"])]
    described = architecture.tensors(architecture.config_from_hf(config, FloatType.F32))
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in described:
        rows, *width = tensor.shape
        stop = tensor.source_rows[1] if tensor.source_rows else rows
        shapes[tensor.source[0]] = (max(stop, shapes.get(tensor.source[0], (0,))[0]), *width)
    return {
        name: (rng.standard_normal(shape) / 8 + ("norm" in name)).astype(np.float16)
        for name, shape in shapes.items()
    }


def write_checkpoint(
    directory: Path,
    model_type: str = "llama",
    files: Mapping[str, object] | None = None,
    **changes: object,
) -> Path:
    """A checkpoint.

    Args:
        directory: made if it is not there.
        model_type: of `config.json`.
        files: further files by name: text, bytes, or what is written as JSON.
        changes: of `config.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"model_type": model_type} | changes
    contents = {"config.json": config, "tokenizer.json": byte_tokenizer().to_str()} | (files or {})
    for name, content in contents.items():
        match content:
            case bytes():
                (directory / name).write_bytes(content)
            case str():
                (directory / name).write_text(content, encoding="utf-8")
            case _:
                (directory / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(random_tensors(CONFIG | {"model_type": model_type}), directory / "model.safetensors")
    return directory


def converted(checkpoint: Path, out: Path) -> Report:
    return convert(checkpoint, out, FloatType.F32, CHECKPOINTS, lambda done, size: None)

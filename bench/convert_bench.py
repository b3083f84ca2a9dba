"""Converts a random bfloat16 checkpoint with the shapes of GLM-4-9B: speed and peak memory.

    python bench/convert_bench.py --layers 2 --weights q40

MB/s count the bytes of the checkpoint. Peak memory is that of the converting process: `anonymous`
is what it holds itself, sampled every 10 ms; `resident` has mapped files and libraries too. Linux
only.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONVERT = """
import sys
from pathlib import Path
from pyllama_dist.config import FloatType
from pyllama_dist.formats.convert import convert
from pyllama_dist.models import CHECKPOINTS
source, out, weights = sys.argv[1:]
convert(Path(source), Path(out), FloatType[weights.upper()], CHECKPOINTS, lambda done, size: None)
"""


def config(layers: int, vocab: int) -> dict[str, object]:
    """`config.json` of GLM-4-9B-0414, with fewer layers and tokens."""
    return {
        "model_type": "glm4",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "eos_token_id": [0],
    }


def shapes(layers: int, vocab: int) -> dict[str, list[int]]:
    """Shapes of all tensors, by Hugging Face's names."""
    dim, ffn, q_dim, kv_dim = 4096, 13696, 32 * 128, 2 * 128
    tensors = {"model.embed_tokens.weight": [vocab, dim]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, width in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = [width, dim]
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = [width]
        tensors[prefix + "self_attn.o_proj.weight"] = [dim, q_dim]
        tensors[prefix + "mlp.gate_up_proj.weight"] = [2 * ffn, dim]
        tensors[prefix + "mlp.down_proj.weight"] = [dim, ffn]
        for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
            tensors[f"{prefix}{norm}_layernorm.weight"] = [dim]
    return tensors | {"model.norm.weight": [dim], "lm_head.weight": [vocab, dim]}


def make_checkpoint(path: Path, layers: int, vocab: int) -> int:
    """Writes a checkpoint of the same noise again and again; returns the bytes of its tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(layers, vocab)))
    entries: dict[str, object] = {}
    size = 0
    for name, shape in shapes(layers, vocab).items():
        end = size + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    header = json.dumps(entries).encode()
    noise = 0.02 * np.random.default_rng(0).standard_normal(4 << 20, np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
    return size


def anonymous_bytes(pid: int) -> int:
    """Memory that a process holds itself; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")),
        0,
    )


def measure(source: Path, out: Path, weights: str) -> tuple[float, int, int]:
    """Seconds, peak anonymous bytes and peak resident bytes of one conversion."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(source), str(out), weights])
    peak = 0
    while True:
        peak = max(peak, anonymous_bytes(process.pid))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the conversion failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, peak, usage.ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=16384, help="GLM-4-9B has 151552")
    parser.add_argument("--weights", choices=("q40", "q80", "f32"), default="q40")
    parser.add_argument("--dir", type=Path, help="where the files are made and removed again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        source, out = Path(folder, "checkpoint"), Path(folder, "model")
        size = make_checkpoint(source, args.layers, args.vocab)
        seconds, anonymous, resident = measure(source, out, args.weights)
        written = (out / "model.m").stat().st_size
    print(f"{args.layers} layers, {args.vocab} tokens, bf16 to {args.weights}")
    print(f"read {size / 1e6:.0f} MB, wrote {written / 1e6:.0f} MB in {seconds:.2f} s")
    print(f"{size / 1e6 / seconds:.0f} MB/s of the checkpoint")
    print(f"peak memory: {anonymous / 1e6:.0f} MB anonymous, {resident / 1e6:.0f} MB resident")


if __name__ == "__main__":
    main()

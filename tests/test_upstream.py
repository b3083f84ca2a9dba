"""Files of distributed-llama: written here by its description, run, and compared with NumPy.

Weights have Hugging Face's order, where RoPE pairs i and i + half; a Llama's file is written in
distributed-llama's order, so that the logits check the order too.
"""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed
from safetensors.numpy import save_file

from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType
from pyllama_dist.engine.engine import Engine
from pyllama_dist.errors import FileError
from pyllama_dist.executor import kernels
from pyllama_dist.formats.convert import convert
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS
from pyllama_dist.simulate import simulated_root
from pyllama_kernels.isa.amx import LEAST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]

# As many as AMX multiplies with tiles.
TOKENS = (5, 90, 17, 17, 2, 61, 33, 8, 0, 44, 96, 12, 70, 1, 5, 90, 3, 28, 55, 81, 9, 64, 17, 40, 2)
FORMATS = {"f32": 0, "q40": 2}


@dataclass(frozen=True)
class Tiny:
    """A model, in the words of its `config.json`."""

    model_type: str
    head_dim: int
    theta: int
    epsilon: float
    scaling: tuple[int, int, int, int] | None = None  # factor, low, high, original length
    experts: int = 0
    active: int = 0
    dim: int = 128
    hidden: int = 96
    expert_hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 97
    positions: int = 64

    @property
    def permuted(self) -> bool:
        return self.model_type in ("llama", "mistral")


LLAMA = Tiny("llama", head_dim=32, theta=500000, epsilon=1e-5)
MODELS = {
    "llama": LLAMA,
    # Of the 16 frequencies of a head some are above, some within and some below the limits.
    "llama3.1": replace(LLAMA, theta=10000, scaling=(8, 1, 4, 32)),
    "mistral": Tiny("mistral", head_dim=64, theta=10000, epsilon=1e-5),
    "qwen3": Tiny("qwen3", head_dim=64, theta=1000000, epsilon=1e-6),
    "qwen3_moe": Tiny("qwen3_moe", 64, 1000000, 1e-6, experts=8, active=3),
}


# ---- what distributed-llama keeps


def header(pairs: dict[int, int]) -> bytes:
    numbers = [number for pair in pairs.items() for number in pair]
    return struct.pack(f"<{len(numbers) + 2}i", 0x0A00ABCD, 8 + 8 * len(pairs), *numbers)


def pairs(t: Tiny, weights: int) -> dict[int, int]:
    """The pairs of a header, in the order of its converter."""
    arch = {"llama": 0xABCD00, "mistral": 0xABCD00, "qwen3": 0xABCD01, "qwen3_moe": 0xABCD02}
    found = {0: 0, 1: arch[t.model_type], 11: 1, 2: t.dim, 3: t.hidden, 4: t.layers}
    found |= {5: t.heads, 6: t.kv_heads, 13: weights, 10: t.positions, 9: t.vocab}
    found |= {7: t.experts, 8: t.active, 12: t.theta}
    if t.scaling:
        found |= dict(zip((14, 15, 16, 17), t.scaling, strict=True)) | {18: 2}
    found |= {19: t.head_dim, 20: {1e-5: 5, 1e-6: 6}[t.epsilon]}
    return found | ({21: t.expert_hidden} if t.experts else {})


def q40(values: np.ndarray) -> bytes:
    """Blocks of 32 values of a matrix, all formulas in float32."""
    groups = values.reshape(-1, 32)
    low, high = groups.min(1), groups.max(1)
    d = np.where(-low > high, low, high) / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    q = np.clip(groups * inverse[:, None] + np.float32(8.5), 0, 15).astype(np.uint8)
    blocks = np.empty(len(groups), [("d", "<f2"), ("q", "u1", 16)])
    blocks["d"], blocks["q"] = d, q[:, :16] | q[:, 16:] << 4
    return blocks.tobytes()


def of_q40(stored: bytes, shape: tuple[int, ...]) -> np.ndarray:
    blocks = np.frombuffer(stored, [("d", "<f2"), ("q", "u1", 16)])
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32)
    return ((q - 8) * blocks["d"][:, None].astype(np.float32)).reshape(shape)


def adjacent(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Row h*hd + 2*j + s of the file is row h*hd + s*hd/2 + j of the checkpoint."""
    out = np.empty_like(matrix)
    for row in range(len(matrix)):
        h, r = divmod(row, head_dim)
        out[row] = matrix[h * head_dim + r % 2 * (head_dim // 2) + r // 2]
    return out


def order(t: Tiny) -> Iterator[tuple[str, bool]]:
    """Names of a checkpoint's tensors in the order of the file, and whether they are matrices."""
    yield "model.embed_tokens.weight", False
    for layer in range(t.layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{at}self_attn.{name}_proj.weight", True
        if t.experts:
            yield f"{at}mlp.gate.weight", False
        for ffn in [f"experts.{e}." for e in range(t.experts)] or [""]:
            for name in ("gate", "down", "up"):
                yield f"{at}mlp.{ffn}{name}_proj.weight", True
        if not t.permuted:
            yield f"{at}self_attn.q_norm.weight", False
            yield f"{at}self_attn.k_norm.weight", False
        yield f"{at}input_layernorm.weight", False
        yield f"{at}post_attention_layernorm.weight", False
    yield "model.norm.weight", False
    yield "lm_head.weight", True


def shape(t: Tiny, name: str) -> tuple[int, ...]:
    q, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    ffn = t.expert_hidden if t.experts else t.hidden
    part = name.removesuffix(".weight").rpartition(".")[2]
    shapes = {"embed_tokens": (t.vocab, t.dim), "lm_head": (t.vocab, t.dim)}
    shapes |= {"q_proj": (q, t.dim), "k_proj": (kv, t.dim), "v_proj": (kv, t.dim)}
    shapes |= {"o_proj": (t.dim, q), "gate": (t.experts, t.dim), "down_proj": (t.dim, ffn)}
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (ffn, t.dim))
    shapes |= dict.fromkeys(("q_norm", "k_norm"), (t.head_dim,))
    return shapes.get(part, (t.dim,))


def random_weights(t: Tiny) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by Hugging Face's names."""
    rng = np.random.default_rng(7)
    weights = {}
    for name, _ in order(t):
        values = rng.standard_normal(shape(t, name), np.float32)
        vector = values.ndim == 1
        weights[name] = 1 + values / 10 if vector else values / np.float32(values.shape[1] ** 0.5)
    return weights


def file_bytes(
    t: Tiny, weights: dict[str, np.ndarray], kind: str, own: dict[int, int] | None = None
) -> bytes:
    """A whole `.m` file; `own` are pairs to be written instead of the converter's."""
    found = pairs(t, FORMATS[kind]) if own is None else own
    parts = [header(found)]
    for name, is_matrix in order(t):
        values = weights[name]
        rotated = name.endswith(("q_proj.weight", "k_proj.weight")) and found.get(18) != 1
        if t.permuted and rotated:
            values = adjacent(values, t.head_dim)
        parts.append(q40(values) if is_matrix and kind == "q40" else values.tobytes())
    return b"".join(parts)


def rounded(t: Tiny, weights: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """The weights as the file has them."""
    return {
        name: of_q40(q40(weights[name]), weights[name].shape)
        if is_matrix and kind == "q40"
        else weights[name]
        for name, is_matrix in order(t)
    }


# ---- the equations, in float64


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def frequencies(t: Tiny) -> np.ndarray:
    found = []
    for j in range(t.head_dim // 2):
        f = t.theta ** (-2 * j / t.head_dim)
        if t.scaling:
            factor, low, high, original = t.scaling
            length = 2 * np.pi / f
            if length > original / low:
                f /= factor
            elif length >= original / high:
                smooth = (original / length - low) / (high - low)
                f = (1 - smooth) * f / factor + smooth * f
        found.append(f)
    return np.array(found)


def rope(x: np.ndarray, t: Tiny) -> np.ndarray:
    """[positions, heads, head_dim], rotated in halves."""
    angles = np.arange(len(x))[:, None, None] * frequencies(t)
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def q80(x: np.ndarray) -> np.ndarray:
    """What is left of a quantized matrix's inputs, `[..., width]`: 8 bits, in blocks of 32."""
    groups = x.reshape(-1, 32)
    d = np.abs(groups).max(1, keepdims=True) / 127
    q = np.round(groups / np.where(d == 0, 1, d))
    return (q * d.astype(np.float16).astype(np.float64)).reshape(x.shape)


def bf16(x: np.ndarray) -> np.ndarray:
    """To 8 bits, halves away from zero."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 256 + 0.5) / 256, mantissa), exponent)


def exact(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w.T


def quantized(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """As this CPU's kernels multiply, but that their sums are float32."""
    if kernels() == "amx" and len(x) >= LEAST:
        return bf16(q80(x)) @ bf16(w).T
    return q80(x) @ w.T


def gated(x: np.ndarray, w: dict[str, np.ndarray], at: str, product: Product) -> np.ndarray:
    gate, up = (product(x, w[f"{at}{name}_proj.weight"]) for name in ("gate", "up"))
    return product(gate / (1 + np.exp(-gate)) * up, w[f"{at}down_proj.weight"])


def mixture(
    x: np.ndarray, w: dict[str, np.ndarray], at: str, t: Tiny, product: Product
) -> np.ndarray:
    out = np.zeros_like(x)
    scores = softmax(x @ w[f"{at}gate.weight"].T)
    worst = np.sort(scores, axis=1)[:, -t.active, None]
    scores = np.where(scores < worst, 0, scores)
    for e, shares in enumerate((scores / scores.sum(axis=1, keepdims=True)).T):
        rows = np.flatnonzero(shares)
        out[rows] += shares[rows, None] * gated(x[rows], w, f"{at}experts.{e}.", product)
    return out


def logits(t: Tiny, weights: dict[str, np.ndarray], product: Product = exact) -> np.ndarray:
    """Logits of TOKENS; `product` is that of all matrices but the router."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    n = len(TOKENS)
    x = w["model.embed_tokens.weight"][list(TOKENS)]
    for layer in range(t.layers):
        at = f"model.layers.{layer}."
        y = norm(x, w[f"{at}input_layernorm.weight"], t.epsilon)
        q, k, v = (
            product(y, w[f"{at}self_attn.{name}_proj.weight"]).reshape(n, -1, t.head_dim)
            for name in "qkv"
        )
        if not t.permuted:
            q = norm(q, w[f"{at}self_attn.q_norm.weight"], t.epsilon)
            k = norm(k, w[f"{at}self_attn.k_norm.weight"], t.epsilon)
        k, v = (np.repeat(u, t.heads // t.kv_heads, axis=1) for u in (rope(k, t), v))
        scores = np.einsum("qhd,khd->hqk", rope(q, t), k) / t.head_dim**0.5
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        z = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n, -1)
        x = x + product(z, w[f"{at}self_attn.o_proj.weight"])
        y = norm(x, w[f"{at}post_attention_layernorm.weight"], t.epsilon)
        if t.experts:
            x = x + mixture(y, w, f"{at}mlp.", t, product)
        else:
            x = x + gated(y, w, f"{at}mlp.", product)
    return product(norm(x, w["model.norm.weight"], t.epsilon), w["lm_head.weight"])


# ---- the tests


def run(path: Path, n_nodes: int) -> np.ndarray:
    with ModelFile.open(path, ARCHITECTURES) as model:
        cluster = Cluster(local_workers=n_nodes - 1, sync=FloatType.F32, cache=FloatType.F32)
        at_once = [changed(p, max_logits=len(TOKENS)) for p in programs(model.config, cluster)]
        with simulated_root(model, at_once) as root, Engine(root) as engine:
            return engine.logits(list(TOKENS))


@pytest.mark.parametrize("n_nodes", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_f32_logits_are_those_of_the_equations(tmp_path: Path, name: str, n_nodes: int) -> None:
    t = MODELS[name]
    weights = random_weights(t)
    path = tmp_path / "model.m"
    path.write_bytes(file_bytes(t, weights, "f32"))
    assert np.abs(run(path, n_nodes) - logits(t, weights)).max() < 1e-3


@pytest.mark.parametrize("n_nodes", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_q40_logits_are_near_those_of_the_equations(
    tmp_path: Path, name: str, n_nodes: int
) -> None:
    """Apart where float32 and float64 round an input to different numbers of Q80."""
    t = MODELS[name]
    weights = random_weights(t)
    path = tmp_path / "model.m"
    path.write_bytes(file_bytes(t, weights, "q40"))
    expected = logits(t, rounded(t, weights, "q40"), quantized)
    assert np.abs(run(path, n_nodes) - expected).max() < 0.03


def test_scaling_changes_the_logits() -> None:
    scaled, plain = MODELS["llama3.1"], replace(MODELS["llama3.1"], scaling=None)
    weights = random_weights(plain)
    ratios = frequencies(scaled) / frequencies(plain)
    assert ratios.max() == 1
    assert ratios.min() == 1 / 8
    assert ((ratios > 1 / 8) & (ratios < 1)).any()
    apart = logits(scaled, weights) - logits(plain, weights)
    assert np.abs(apart).max() > 0.01


def test_absent_keys_have_defaults_and_any_order_will_do(tmp_path: Path) -> None:
    t = replace(LLAMA, theta=10000)
    own = pairs(t, 0)
    for key in (0, 7, 8, 11, 12, 19, 20):
        del own[key]
    path = tmp_path / "model.m"
    weights = random_weights(t)
    path.write_bytes(file_bytes(t, weights, "f32", dict(sorted(own.items(), reverse=True))))
    assert np.abs(run(path, 1) - logits(t, weights)).max() < 1e-3


def test_llama_whose_heads_turn_in_halves(tmp_path: Path) -> None:
    path = tmp_path / "model.m"
    weights = random_weights(LLAMA)
    path.write_bytes(file_bytes(LLAMA, weights, "f32", pairs(LLAMA, 0) | {18: 1}))
    assert np.abs(run(path, 2) - logits(LLAMA, weights)).max() < 1e-3


@pytest.mark.parametrize("rope_type", [0, 1, 2])
def test_qwen3_turns_in_halves_whatever_its_file_says(tmp_path: Path, rope_type: int) -> None:
    t = MODELS["qwen3"]
    path = tmp_path / "model.m"
    scaling = {14: 8, 15: 1, 16: 4, 17: 32}
    own = pairs(t, 0) | {18: rope_type} | scaling
    weights = random_weights(t)
    path.write_bytes(file_bytes(t, weights, "f32", own))
    assert np.abs(run(path, 1) - logits(t, weights)).max() < 1e-3


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_cut_and_lengthened_files_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    whole = file_bytes(MODELS[name], random_weights(MODELS[name]), kind)
    path = tmp_path / "model.m"
    for content, reason in ((whole[:-1], "truncated"), (whole + b"\0", "too long")):
        path.write_bytes(content)
        with pytest.raises(FileError, match=reason):
            ModelFile.open(path, ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {11: 0}, "key 11 (HIDDEN_ACT) is 0, expected 1: only SiLU"),
        ("llama", {7: 8, 8: 2}, "key 7 (N_EXPERTS) is 8, expected 0: experts are implemented for"),
        ("qwen3", {7: 8}, "key 7 (N_EXPERTS) is 8"),
        ("qwen3", {8: 2}, "key 8 (N_ACTIVE_EXPERTS) is 2"),
        ("llama", {13: 1}, "weights are F16"),
        ("llama", {20: 7}, "key 20 (NORM_EPSILON) is 7, expected 5 to 6"),
        ("llama", {18: 3}, "key 18 (ROPE_TYPE) is 3"),
        ("llama", {12: 0}, "key 12 (ROPE_THETA) is 0"),
        ("llama", {14: 8}, "rope scaling between frequency factors 0 and 0 of 0 positions"),
        ("llama3.1", {16: 1}, "rope scaling between frequency factors 1 and 1"),
        ("llama", {5: 256, 6: 2, 19: 0}, "256 query heads share 128 values"),
        ("llama", {19: 33}, "rotary dim is 33"),
        ("llama", {102: 16}, "key 102 (ROTARY_DIM) has no meaning for llama"),
        ("llama", {21: 64}, "key 21 (MOE_HIDDEN_DIM) has no meaning for llama"),
        ("qwen3_moe", {7: 0}, "key 7 (N_EXPERTS) is 0, expected 1 to"),
        ("qwen3_moe", {8: 9}, "9 of 8 experts are chosen"),
        ("qwen3_moe", {21: 0}, "key 21 (MOE_HIDDEN_DIM) is 0"),
        ("qwen3_moe", {7: 4096, 4: 1024}, "1024 layers of 4096 experts"),
    ],
)
def test_what_is_not_implemented_is_refused(
    tmp_path: Path, name: str, changes: dict[int, int], reason: str
) -> None:
    path = tmp_path / "model.m"
    path.write_bytes(header(pairs(MODELS[name], 0) | changes))
    with pytest.raises(FileError) as caught:
        ModelFile.open(path, ARCHITECTURES)
    assert reason in str(caught.value)


def write_checkpoint(
    folder: Path, t: Tiny, weights: dict[str, np.ndarray], **fields: object
) -> None:
    config: dict[str, object] = {
        "model_type": t.model_type,
        "hidden_act": "silu",
        "hidden_size": t.dim,
        "intermediate_size": t.hidden,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "max_position_embeddings": t.positions,
        "vocab_size": t.vocab,
        "rope_theta": float(t.theta),
        "rms_norm_eps": t.epsilon,
        "head_dim": t.head_dim,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    if t.scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor")
        config["rope_scaling"] = {
            "rope_type": "llama3",
            **dict(zip(names, map(float, t.scaling), strict=False)),
            "original_max_position_embeddings": t.scaling[3],
        }
    if t.experts:
        config |= {"num_experts": t.experts, "num_experts_per_tok": t.active}
        config |= {"moe_intermediate_size": t.expert_hidden, "norm_topk_prob": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | fields))
    save_file(weights, folder / "model.safetensors")


def convert_tiny(folder: Path, kind: str) -> bytes:
    out = folder.with_name("out")
    convert(folder, out, FloatType[kind.upper()], CHECKPOINTS, lambda done, total: None)
    return (out / "model.m").read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_converted_files_are_those_of_its_converter(tmp_path: Path, name: str, kind: str) -> None:
    t = MODELS[name]
    weights = random_weights(t)
    write_checkpoint(tmp_path / "checkpoint", t, weights)
    assert convert_tiny(tmp_path / "checkpoint", kind) == file_bytes(t, weights, kind)


def test_a_tied_head_is_stored_as_a_copy(tmp_path: Path) -> None:
    t = MODELS["qwen3"]
    weights = random_weights(t)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = file_bytes(t, weights, "q40")
    del weights["lm_head.weight"]
    write_checkpoint(tmp_path / "checkpoint", t, weights)
    assert convert_tiny(tmp_path / "checkpoint", "q40") == expected


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("llama", {"rope_theta": 10000.5}, "rope_theta is 10000.5, which a model file of llama"),
        ("llama", {"rope_theta": 1e10}, "key 12 (ROPE_THETA) is 10000000000"),
        ("qwen3", {"rms_norm_eps": 2e-6}, "norm_epsilon is 2e-06, which a model file of qwen3"),
        ("qwen3", {"rms_norm_eps": 0}, "key 20 (NORM_EPSILON) is 0, expected 5 to 6"),
        ("qwen3_moe", {"norm_topk_prob": False}, "experts.normalize is False"),
        ("mistral", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"head_dim": 16}, "q_proj.weight is [128, 128], config.json says [64, 128]"),
    ],
)
def test_what_its_format_cannot_say_is_refused(
    tmp_path: Path, name: str, fields: dict[str, object], reason: str
) -> None:
    t = MODELS[name]
    write_checkpoint(tmp_path / "checkpoint", t, random_weights(t), **fields)
    with pytest.raises(FileError) as caught:
        convert_tiny(tmp_path / "checkpoint", "f32")
    assert reason in str(caught.value)


def test_a_llama_with_biases_is_refused(tmp_path: Path) -> None:
    weights = random_weights(LLAMA) | {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": np.ones(width, np.float32)
        for layer in range(2)
        for name, width in (("q", 128), ("k", 64), ("v", 64))
    }
    write_checkpoint(tmp_path / "checkpoint", LLAMA, weights)
    with pytest.raises(FileError, match="qkv_bias is True, which a model file of llama cannot say"):
        convert_tiny(tmp_path / "checkpoint", "f32")


def tokenizer_bytes() -> bytes:
    """A `.t` file of single bytes, one merge, and two special tokens, with a chat template."""
    template = b"<|user|>{{ messages[0].content }}<|end|>"
    pieces = [bytes([i]) for i in range(256)] + [b"ab", b"<|user|>", b"<|end|>"]
    pairs = {3: 257, 0: 1, 1: len(pieces), 2: 8, 7: len(template), 9: 1, 10: 0}
    body = template + struct.pack("<i", 258)
    for i, piece in enumerate(pieces):
        body += struct.pack("<fI", -float(i), len(piece)) + piece
    return struct.pack("<I", 0x567124) + header(pairs)[4:] + body


def test_a_model_with_its_tokenizer_answers(tmp_path: Path) -> None:
    t = replace(MODELS["qwen3"], vocab=259)
    model, tokenizer = tmp_path / "some.m", tmp_path / "some.t"
    model.write_bytes(file_bytes(t, random_weights(t), "q40"))
    tokenizer.write_bytes(tokenizer_bytes())
    command = [sys.executable, "-m", "pyllama_dist", "root", "--model", str(model)]
    command += ["--prompt", "abc", "--steps", "9", "--temperature", "0", "--json"]
    answers = []
    for extra in (["--tokenizer", str(tokenizer)], ["--local-workers", "1"]):
        found = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr
        answers.append(json.loads(found.stdout))
    # The template's special tokens, and a merge in between.
    assert all(answer["prompt_tokens"] == [257, 256, ord("c"), 258] for answer in answers)
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert 1 <= len(answers[0]["tokens"]) <= 5

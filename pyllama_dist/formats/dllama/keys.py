"""The keys of a `.m` header, and for each architecture those that its files have.

Keys below 100 are distributed-llama's, those from 100 on ours, for what GLM needs beyond them. One
table says all: a key, the fact of the configuration that it holds, and the bounds of its number.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from pyllama_dist.config import Arch, FloatType, Pairs, Scoring

Facts = dict[str, Any]  # by name; that of a part of the configuration is like experts.count

MAX_INDEXED_LAYERS = 128  # a bit for each, in the words INDEX_LAYERS_0 to _3
_WORD = 32

_INT_MAX = (1 << 31) - 1
_WIDTH = 1 << 24


class Key(IntEnum):
    """Keys of the pairs."""

    VERSION = 0
    ARCH_TYPE = 1
    DIM = 2
    HIDDEN_DIM = 3
    N_LAYERS = 4
    N_HEADS = 5
    N_KV_HEADS = 6
    N_EXPERTS = 7
    N_ACTIVE_EXPERTS = 8
    VOCAB_SIZE = 9
    SEQ_LEN = 10
    HIDDEN_ACT = 11  # 0 GELU, 1 SiLU
    ROPE_THETA = 12
    WEIGHT_FLOAT_TYPE = 13
    ROPE_SCALING_FACTOR = 14  # 1: none
    ROPE_SCALING_LOW_FREQ_FACTOR = 15
    ROPE_SCALING_HIGH_FREQ_FACTOR = 16
    ROPE_SCALING_ORIG_MAX_SEQ_LEN = 17
    ROPE_TYPE = 18  # pairs: 0 adjacent, 1 halves, 2 adjacent and scaled
    HEAD_DIM = 19  # 0: dim / heads
    NORM_EPSILON = 20  # 5 for 1e-5, 6 for 1e-6
    MOE_HIDDEN_DIM = 21
    NORM_EPSILON_F32 = 100  # F32: the bits of a float32
    ROPE_THETA_F32 = 101
    ROTARY_DIM = 102
    QKV_BIAS = 103  # 0 or 1
    QK_NORM = 104  # 0 or 1
    SHARED_HIDDEN_DIM = 105
    N_DENSE_LAYERS = 106
    N_EXPERT_GROUPS = 107
    N_ACTIVE_EXPERT_GROUPS = 108
    NORMALIZE_EXPERTS = 109  # 0 or 1
    EXPERT_SCALE_F32 = 110
    Q_LORA_RANK = 111
    KV_LORA_RANK = 112
    QK_NOPE_HEAD_DIM = 113
    QK_ROPE_HEAD_DIM = 114
    V_HEAD_DIM = 115
    LATENT_NORM_EPSILON_F32 = 116
    INDEX_N_HEADS = 117
    INDEX_HEAD_DIM = 118
    INDEX_TOPK = 119
    INDEX_LAYERS_0 = 120  # bit i: whether layer i picks
    INDEX_LAYERS_1 = 121
    INDEX_LAYERS_2 = 122
    INDEX_LAYERS_3 = 123


ARCH_IDS: Mapping[int, Arch] = {
    0xABCD00: Arch.LLAMA,
    0xABCD01: Arch.QWEN3,
    0xABCD02: Arch.QWEN3_MOE,
    0xABCD10: Arch.GLM,
    0xABCD11: Arch.GLM4,
    0xABCD12: Arch.GLM4_MOE,
    0xABCD13: Arch.GLM4_MOE_LITE,
    0xABCD14: Arch.GLM_MOE_DSA,
}


@dataclass(frozen=True)
class Codec:
    """Encodes a fact as a number of the header, and decodes it."""

    number: Callable[[Any], int]
    fact: Callable[[int], Any]


def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _float_value(bits: int) -> float:
    """The shortest decimal that has these float32 bits: what was written as 1e-5 reads as 1e-5."""
    return float(str(np.int32(bits).view(np.float32)))


def _word(layers: tuple[bool, ...]) -> int:
    unsigned = sum(1 << i for i, picks in enumerate(layers) if picks)
    return unsigned - (unsigned >> (_WORD - 1) << _WORD)


_WHOLE = Codec(int, int)
_WHOLE_FLOAT = Codec(int, float)
_BITS = Codec(_float_bits, _float_value)
_FLAG = Codec(int, bool)
_ARCH = Codec({arch: number for number, arch in ARCH_IDS.items()}.__getitem__, ARCH_IDS.__getitem__)
_FLOAT_TYPE = Codec(int, FloatType)
_EXPONENT = Codec(lambda e: round(-math.log10(e)) if e > 0 else 0, lambda n: float(f"1e-{n}"))
_LAYERS = Codec(_word, lambda bits: tuple(bool(bits >> i & 1) for i in range(_WORD)))


@dataclass(frozen=True)
class Pair:
    """A key, and the fact that it holds.

    A key with a default may be missing, and is not written where the configuration lacks the fact.
    """

    key: Key
    fact: str
    low: int
    high: int
    code: Codec = _WHOLE
    default: int | None = None
    reason: str = ""  # why other numbers are refused, where the file may be good


@dataclass(frozen=True)
class HeaderLayout:
    """The keys in the header of an architecture.

    Attributes:
        pairs: in the order in which they are written; none else may be there.
        fixed: facts that all its files share, those of the format among them.
        complete: adds the facts that follow from those read.
    """

    pairs: tuple[Pair, ...]
    fixed: Mapping[str, object] = field(default_factory=dict)
    complete: Callable[[Facts], None] = lambda facts: None


def format_facts(facts: Facts) -> Facts:
    """Facts of a configuration, cut as the format keeps them."""
    scaled = "rope_scaling.factor" in facts
    if scaled or facts["rope_pairs"] is Pairs.HALVES:
        facts = facts | {"rope_type": 2 if scaled else 1}
    layers = facts.get("indexer.layers", ())
    return facts | {
        f"indexer.layers.{word}": layers[word * _WORD : (word + 1) * _WORD]
        for word in range(MAX_INDEXED_LAYERS // _WORD)
    }


def _complete_upstream(facts: Facts) -> None:
    facts["head_dim"] = facts["head_dim"] or facts["dim"] // facts["n_heads"]
    facts["rotary_dim"] = facts["head_dim"]
    if "rope_pairs" not in facts:
        facts["rope_pairs"] = Pairs.HALVES if facts["rope_type"] == 1 else Pairs.ADJACENT
    # distributed-llama scales the one kind of pairs only, whatever the type says.
    if facts["rope_scaling.factor"] == 1 or facts["rope_pairs"] is Pairs.HALVES:
        for pair in _SCALING:
            del facts[pair.fact]


def _complete_latent(facts: Facts) -> None:
    facts["rotary_dim"] = facts["latent.rope_dim"]
    facts["head_dim"] = facts["latent.nope_dim"] + facts["latent.rope_dim"]


def _complete_indexed(facts: Facts) -> None:
    _complete_latent(facts)
    facts["indexer.rotary_dim"] = facts["rotary_dim"]
    words = range(MAX_INDEXED_LAYERS // _WORD)
    layers = sum((facts[f"indexer.layers.{word}"] for word in words), ())
    if any(layers[facts["n_layers"] :]):
        raise ValueError(f"layers from {facts['n_layers']} on pick positions, but do not exist")
    facts["indexer.layers"] = layers[: facts["n_layers"]]


_SIZES = (
    Pair(Key.DIM, "dim", 1, _WIDTH),
    Pair(Key.HIDDEN_DIM, "ffn_dim", 1, _WIDTH),
    Pair(Key.N_LAYERS, "n_layers", 1, 1024),
    Pair(Key.N_HEADS, "n_heads", 1, 4096),
)
_KV_HEADS = Pair(Key.N_KV_HEADS, "n_kv_heads", 1, 4096)
_VOCAB = Pair(Key.VOCAB_SIZE, "vocab_size", 1, _WIDTH)
_SEQ_LEN = Pair(Key.SEQ_LEN, "max_seq_len", 1, _WIDTH)
_ARCH_TYPE = Pair(Key.ARCH_TYPE, "arch", min(ARCH_IDS), max(ARCH_IDS), _ARCH)
_WEIGHTS = Pair(Key.WEIGHT_FLOAT_TYPE, "weights", 0, 3, _FLOAT_TYPE)
_ACTIVE = (
    Pair(Key.N_EXPERTS, "experts.count", 1, 4096),
    Pair(Key.N_ACTIVE_EXPERTS, "experts.active", 1, 256),
)
_EXPERT_DIM = Pair(Key.MOE_HIDDEN_DIM, "experts.ffn_dim", 1, _WIDTH)

_SCALING = (
    Pair(Key.ROPE_SCALING_FACTOR, "rope_scaling.factor", 1, _INT_MAX, _WHOLE_FLOAT, 1),
    Pair(
        Key.ROPE_SCALING_LOW_FREQ_FACTOR,
        "rope_scaling.low_freq_factor",
        0,
        _INT_MAX,
        _WHOLE_FLOAT,
        0,
    ),
    Pair(
        Key.ROPE_SCALING_HIGH_FREQ_FACTOR,
        "rope_scaling.high_freq_factor",
        0,
        _INT_MAX,
        _WHOLE_FLOAT,
        0,
    ),
    Pair(
        Key.ROPE_SCALING_ORIG_MAX_SEQ_LEN,
        "rope_scaling.original_max_seq_len",
        0,
        _WIDTH,
        default=0,
    ),
)


def _upstream(experts: tuple[Pair, ...], rope_type: str, *more: Pair) -> tuple[Pair, ...]:
    """Pairs of distributed-llama, in the order of its converter."""
    return (
        Pair(Key.VERSION, "version", 0, _INT_MAX, default=0),
        _ARCH_TYPE,
        Pair(Key.HIDDEN_ACT, "hidden_act", 1, 1, default=1, reason="only SiLU is implemented"),
        *_SIZES,
        _KV_HEADS,
        _WEIGHTS,
        _SEQ_LEN,
        _VOCAB,
        *experts,
        Pair(Key.ROPE_THETA, "rope_theta", 1, _INT_MAX, _WHOLE_FLOAT, 10000),
        *_SCALING,
        Pair(Key.ROPE_TYPE, rope_type, 0, 2, default=0),
        Pair(Key.HEAD_DIM, "head_dim", 0, 4096, default=0),
        Pair(Key.NORM_EPSILON, "norm_epsilon", 5, 6, _EXPONENT, 5),
        *more,
    )


_NO_EXPERTS = tuple(
    Pair(key, key.name, 0, 0, default=0, reason="experts are implemented for Qwen3-MoE and GLM")
    for key in (Key.N_EXPERTS, Key.N_ACTIVE_EXPERTS)
)
_IGNORED = "ignored"  # Qwen3 pairs halves, whatever the rope type says
_UPSTREAM_FIXED: dict[str, object] = {"version": 0, "hidden_act": 1, "qkv_bias": False}
_DENSE_FIXED = {**_UPSTREAM_FIXED, **{pair.fact: 0 for pair in _NO_EXPERTS}}
_QWEN3_FIXED: dict[str, object] = {"rope_pairs": Pairs.HALVES, "qk_norm": True}

_VERSION = Pair(Key.VERSION, "version", 1, 1)
_ENDS = (
    _VOCAB,
    _SEQ_LEN,
    Pair(Key.ROPE_THETA_F32, "rope_theta", 0, _INT_MAX, _BITS),
    Pair(Key.NORM_EPSILON_F32, "norm_epsilon", 0, _INT_MAX, _BITS),
)
_GLM = (
    _VERSION,
    _ARCH_TYPE,
    *_SIZES,
    _KV_HEADS,
    Pair(Key.HEAD_DIM, "head_dim", 1, 4096),
    Pair(Key.ROTARY_DIM, "rotary_dim", 0, 4096),
    *_ENDS,
    Pair(Key.QKV_BIAS, "qkv_bias", 0, 1, _FLAG),
    _WEIGHTS,
)
_EXPERTS = (
    *_ACTIVE,
    _EXPERT_DIM,
    Pair(Key.SHARED_HIDDEN_DIM, "experts.shared_ffn_dim", 0, _WIDTH),
    Pair(Key.N_DENSE_LAYERS, "experts.dense_layers", 0, 1024),
    Pair(Key.N_EXPERT_GROUPS, "experts.groups", 1, 4096),
    Pair(Key.N_ACTIVE_EXPERT_GROUPS, "experts.active_groups", 1, 4096),
    Pair(Key.NORMALIZE_EXPERTS, "experts.normalize", 0, 1, _FLAG),
    Pair(Key.EXPERT_SCALE_F32, "experts.scale", 0, _INT_MAX, _BITS),
)
_LATENT = (
    _VERSION,
    _ARCH_TYPE,
    *_SIZES,
    *_ENDS,
    _WEIGHTS,
    *_EXPERTS,
    Pair(Key.Q_LORA_RANK, "latent.q_rank", 1, _WIDTH),
    Pair(Key.KV_LORA_RANK, "latent.kv_rank", 1, 1 << 16),
    Pair(Key.QK_NOPE_HEAD_DIM, "latent.nope_dim", 1, 4096),
    Pair(Key.QK_ROPE_HEAD_DIM, "latent.rope_dim", 1, 4096),
    Pair(Key.V_HEAD_DIM, "latent.value_dim", 1, 4096),
    Pair(Key.LATENT_NORM_EPSILON_F32, "latent.norm_epsilon", 0, _INT_MAX, _BITS),
)
_INDEXER = (
    Pair(Key.INDEX_N_HEADS, "indexer.n_heads", 1, 4096),
    Pair(Key.INDEX_HEAD_DIM, "indexer.head_dim", 1, 4096),
    Pair(Key.INDEX_TOPK, "indexer.top_k", 1, _WIDTH),
    *(
        Pair(
            Key(Key.INDEX_LAYERS_0 + word),
            f"indexer.layers.{word}",
            -_INT_MAX - 1,
            _INT_MAX,
            _LAYERS,
        )
        for word in range(MAX_INDEXED_LAYERS // _WORD)
    ),
)
_GLM_FIXED: dict[str, object] = {"version": 1, "rope_pairs": Pairs.ADJACENT}
_SIGMOID: dict[str, object] = {
    "version": 1,
    "experts.scoring": Scoring.SIGMOID,
    "experts.bias": True,
}
_LATENT_FIXED = {
    **_SIGMOID,
    "rope_pairs": Pairs.ADJACENT,
    "n_kv_heads": 1,
    "qkv_bias": False,
}

LAYOUTS: Mapping[Arch, HeaderLayout] = {
    Arch.LLAMA: HeaderLayout(_upstream(_NO_EXPERTS, "rope_type"), _DENSE_FIXED, _complete_upstream),
    Arch.QWEN3: HeaderLayout(
        _upstream(_NO_EXPERTS, _IGNORED), {**_DENSE_FIXED, **_QWEN3_FIXED}, _complete_upstream
    ),
    Arch.QWEN3_MOE: HeaderLayout(
        _upstream(_ACTIVE, _IGNORED, _EXPERT_DIM),
        {
            **_UPSTREAM_FIXED,
            **_QWEN3_FIXED,
            "experts.shared_ffn_dim": 0,
            "experts.dense_layers": 0,
            "experts.scoring": Scoring.SOFTMAX,
            "experts.bias": False,
            "experts.groups": 1,
            "experts.active_groups": 1,
            "experts.normalize": True,
            "experts.scale": 1.0,
        },
        _complete_upstream,
    ),
    Arch.GLM: HeaderLayout(_GLM, _GLM_FIXED),
    Arch.GLM4: HeaderLayout(_GLM, _GLM_FIXED),
    Arch.GLM4_MOE: HeaderLayout(
        (*_GLM, Pair(Key.QK_NORM, "qk_norm", 0, 1, _FLAG), *_EXPERTS),
        {**_SIGMOID, "rope_pairs": Pairs.HALVES},
    ),
    Arch.GLM4_MOE_LITE: HeaderLayout(_LATENT, _LATENT_FIXED, _complete_latent),
    Arch.GLM_MOE_DSA: HeaderLayout((*_LATENT, *_INDEXER), _LATENT_FIXED, _complete_indexed),
}

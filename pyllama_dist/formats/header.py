"""The header of a `.m` file: distributed-llama's keys, and ours for what GLM needs beyond them.

All numbers are little-endian int32: the magic, the size of the whole header, then pairs of key and
value. The first tensor follows at once. Files of an architecture that distributed-llama does not
know carry a new architecture id, so that it refuses them instead of misreading them.
"""

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyllama_dist.config import Arch, FloatType, ModelConfig
from pyllama_dist.errors import FileError

MAGIC = 0x0A00ABCD
_OLD_MAGICS = (0xABCD00, 0xABCD01)
_VERSION = 1
_MAX_SIZE = 8 + 8 * 1024  # far above the pairs that exist
_DAMAGED = "the file is damaged: convert the checkpoint or copy the file again"


class Key(IntEnum):
    """Keys of the pairs: below 100 distributed-llama's, from 100 on ours."""

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
    HIDDEN_ACT = 11
    ROPE_THETA = 12
    WEIGHT_FLOAT_TYPE = 13
    ROPE_SCALING_FACTOR = 14
    ROPE_SCALING_LOW_FREQ_FACTOR = 15
    ROPE_SCALING_HIGH_FREQ_FACTOR = 16
    ROPE_SCALING_ORIG_MAX_SEQ_LEN = 17
    ROPE_TYPE = 18
    HEAD_DIM = 19
    NORM_EPSILON = 20
    MOE_HIDDEN_DIM = 21
    NORM_EPSILON_F32 = 100  # the bits of a float32
    ROPE_THETA_F32 = 101  # the bits of a float32
    ROTARY_DIM = 102
    QKV_BIAS = 103  # 0 or 1


_ARCH_IDS: dict[int, Arch] = {0xABCD10: Arch.GLM, 0xABCD11: Arch.GLM4}
_UPSTREAM_ARCHS = {0xABCD00: "Llama", 0xABCD01: "Qwen3", 0xABCD02: "Qwen3-MoE"}

# Values that every GLM file must have, in the order of the file, with the bounds of whole numbers.
_GLM_BOUNDS: dict[Key, tuple[int, int]] = {
    Key.VERSION: (_VERSION, _VERSION),
    Key.ARCH_TYPE: (min(_ARCH_IDS), max(_ARCH_IDS)),
    Key.DIM: (1, 1 << 24),
    Key.HIDDEN_DIM: (1, 1 << 24),
    Key.N_LAYERS: (1, 1024),
    Key.N_HEADS: (1, 4096),
    Key.N_KV_HEADS: (1, 4096),
    Key.HEAD_DIM: (1, 4096),
    Key.ROTARY_DIM: (0, 4096),
    Key.VOCAB_SIZE: (1, 1 << 24),
    Key.SEQ_LEN: (1, 1 << 24),
    Key.ROPE_THETA_F32: (0, (1 << 31) - 1),
    Key.NORM_EPSILON_F32: (0, (1 << 31) - 1),
    Key.QKV_BIAS: (0, 1),
    Key.WEIGHT_FLOAT_TYPE: (0, 3),
}


def encode(config: ModelConfig) -> bytes:
    """The header that says `config`.

    Raises:
        ValueError: a value is out of the bounds of the format.
    """
    values: dict[Key, int] = {
        Key.VERSION: _VERSION,
        Key.ARCH_TYPE: next(number for number, arch in _ARCH_IDS.items() if arch is config.arch),
        Key.DIM: config.dim,
        Key.HIDDEN_DIM: config.ffn_dim,
        Key.N_LAYERS: config.n_layers,
        Key.N_HEADS: config.n_heads,
        Key.N_KV_HEADS: config.n_kv_heads,
        Key.HEAD_DIM: config.head_dim,
        Key.ROTARY_DIM: config.rotary_dim,
        Key.VOCAB_SIZE: config.vocab_size,
        Key.SEQ_LEN: config.max_seq_len,
        Key.ROPE_THETA_F32: _float_bits(config.rope_theta),
        Key.NORM_EPSILON_F32: _float_bits(config.norm_epsilon),
        Key.QKV_BIAS: int(config.qkv_bias),
        Key.WEIGHT_FLOAT_TYPE: int(config.weights),
    }
    _glm_config(values)
    ints = [number for pair in values.items() for number in pair]
    return struct.pack(f"<II{len(ints)}i", MAGIC, 8 + 4 * len(ints), *ints)


def read(file: BinaryIO, path: Path) -> tuple[ModelConfig, int]:
    """Reads the header at the start of `file`.

    Args:
        file: open at its first byte.
        path: its name, for messages.

    Returns:
        The configuration, and the offset of the first tensor.

    Raises:
        FileError: it is no header of a model that can be read, or a value is out of bounds.
    """
    start = file.read(8)
    if len(start) < 8:
        raise FileError(f"{path}: {len(start)} bytes are no model file; {_DAMAGED}")
    magic, size = struct.unpack("<II", start)
    if magic in _OLD_MAGICS:
        raise FileError(
            f"{path}: distributed-llama's old model format (magic {magic:#x}) is not supported; "
            f"convert the checkpoint again"
        )
    if magic != MAGIC:
        raise FileError(
            f"{path}: begins with {magic:#010x} where a model file has {MAGIC:#010x}; "
            f"make one with `pyllama-dist convert`"
        )
    if size % 8 or not 8 <= size <= _MAX_SIZE:
        raise FileError(f"{path}: header of {size} bytes, expected 8 and 8 a pair; {_DAMAGED}")
    body = file.read(size - 8)
    if len(body) < size - 8:
        raise FileError(f"{path}: the file ends inside its header of {size} bytes; {_DAMAGED}")
    values = _pairs(body, path)
    reader = _reader(values, path)
    try:
        return reader(values), size
    except ValueError as error:
        raise FileError(f"{path}: {error}; {_DAMAGED}") from None


def _pairs(body: bytes, path: Path) -> dict[Key, int]:
    values: dict[Key, int] = {}
    for number, value in struct.iter_unpack("<ii", body):
        try:
            key = Key(number)
        except ValueError:
            raise FileError(
                f"{path}: unknown header key {number} (value {value}); "
                f"a newer pyllama-dist may know it, else {_DAMAGED}"
            ) from None
        if key in values:
            raise FileError(f"{path}: header key {number} ({key.name}) stands twice; {_DAMAGED}")
        values[key] = value
    return values


def _reader(values: Mapping[Key, int], path: Path) -> Callable[[Mapping[Key, int]], ModelConfig]:
    """The function that reads the values of this file's architecture."""
    arch = values.get(Key.ARCH_TYPE)
    if arch is None:
        raise FileError(f"{path}: header key 1 (ARCH_TYPE) is missing; {_DAMAGED}")
    if arch in _ARCH_IDS:
        return _glm_config
    if arch in _UPSTREAM_ARCHS:
        raise FileError(
            f"{path}: architecture {_UPSTREAM_ARCHS[arch]} is not supported yet; "
            f"use a model of {' or '.join(_ARCH_IDS.values())}"
        )
    raise FileError(
        f"{path}: unknown architecture {arch:#x}; a newer pyllama-dist may know it, else {_DAMAGED}"
    )


def _glm_config(values: Mapping[Key, int]) -> ModelConfig:
    """The configuration of a GLM file: each of its keys must be there, and no other."""
    for key, (low, high) in _GLM_BOUNDS.items():
        if key not in values:
            raise ValueError(f"header key {key.value} ({key.name}) is missing")
        if not low <= values[key] <= high:
            raise ValueError(
                f"header key {key.value} ({key.name}) is {values[key]}, expected {low} to {high}"
            )
    for key in values.keys() - _GLM_BOUNDS.keys():
        raise ValueError(f"header key {key.value} ({key.name}) has no meaning for GLM")
    config = ModelConfig(
        arch=_ARCH_IDS[values[Key.ARCH_TYPE]],
        dim=values[Key.DIM],
        ffn_dim=values[Key.HIDDEN_DIM],
        n_layers=values[Key.N_LAYERS],
        n_heads=values[Key.N_HEADS],
        n_kv_heads=values[Key.N_KV_HEADS],
        head_dim=values[Key.HEAD_DIM],
        rotary_dim=values[Key.ROTARY_DIM],
        vocab_size=values[Key.VOCAB_SIZE],
        max_seq_len=values[Key.SEQ_LEN],
        rope_theta=_float_value(values[Key.ROPE_THETA_F32]),
        norm_epsilon=_float_value(values[Key.NORM_EPSILON_F32]),
        qkv_bias=bool(values[Key.QKV_BIAS]),
        weights=FloatType(values[Key.WEIGHT_FLOAT_TYPE]),
    )
    _check(config)
    return config


def _check(c: ModelConfig) -> None:
    """Refuses values that contradict each other or that nothing serves."""
    if c.n_heads % c.n_kv_heads:
        raise ValueError(f"{c.n_heads} query heads do not share {c.n_kv_heads} key heads evenly")
    if c.rotary_dim % 2 or c.rotary_dim > c.head_dim:
        raise ValueError(
            f"rotary dim is {c.rotary_dim}, expected an even number up to head dim {c.head_dim}"
        )
    if not 1 <= c.rope_theta <= 1e12:
        raise ValueError(f"rope theta is {c.rope_theta}, expected 1 to 1e12")
    if not 0 <= c.norm_epsilon <= 1:
        raise ValueError(f"norm epsilon is {c.norm_epsilon}, expected 0 to 1")
    if c.weights is FloatType.F16:
        raise ValueError("weights are F16, expected F32, Q40 or Q80")


def _float_bits(value: float) -> int:
    """The bits of `value` as float32, in an int32."""
    return int(np.float32(value).view(np.int32))


def _float_value(bits: int) -> float:
    """The shortest decimal that has these float32 bits: what was written as 1e-5 reads as 1e-5."""
    return float(str(np.int32(bits).view(np.float32)))

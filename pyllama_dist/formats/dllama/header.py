"""The header of a `.m` file: distributed-llama's keys, and ours for what GLM needs beyond them.

All numbers are little-endian int32: the magic, the size of the whole header, then pairs of key and
value. The first tensor follows at once. Files of Llama and Qwen3 are distributed-llama's own; those
of an architecture that it does not know carry a new architecture id, so that it refuses them
instead of misreading them.
"""

import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyllama_dist.config import (
    Arch,
    Experts,
    FloatType,
    Indexer,
    Latent,
    ModelConfig,
    RopeScaling,
)
from pyllama_dist.errors import FileError
from pyllama_dist.formats.dllama.keys import ARCH_IDS, LAYOUTS, Facts, Key, Pair, format_facts

MAGIC = 0x0A00ABCD
_OLD_MAGICS = (0xABCD00, 0xABCD01)
_MAX_SIZE = 8 + 8 * 1024  # far above the pairs that exist
_MAX_EXPERTS = 1 << 16  # of all layers, far above models that exist: each has tensors in the list
_DAMAGED = "the file is damaged: convert the checkpoint or copy the file again"

_PARTS: Mapping[str, type] = {
    "rope_scaling": RopeScaling,
    "experts": Experts,
    "latent": Latent,
    "indexer": Indexer,
}


class _UnsupportedError(ValueError):
    """The header may be good, but what it asks for is not implemented."""


def encode(config: ModelConfig) -> bytes:
    """The header that says `config`.

    Raises:
        ValueError: a value is out of the bounds of the format, or it has no key for it.
    """
    layout = LAYOUTS[config.arch]
    facts = {**layout.fixed, **format_facts(_facts(config))}
    values = {
        pair.key: pair.code.number(facts[pair.fact])
        for pair in layout.pairs
        if pair.default is None or pair.fact in facts
    }
    told = _facts(_config(config.arch, values))
    for name, value in _facts(config).items():
        if not _same(value, told.get(name)):
            raise ValueError(
                f"{name} is {value}, which a model file of {config.arch} cannot say "
                f"(it would say {told.get(name)})"
            )
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
    arch = _arch(values, path)
    try:
        return _config(arch, values), size
    except _UnsupportedError as error:
        raise FileError(f"{path}: {error}") from None
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


def _arch(values: Mapping[Key, int], path: Path) -> Arch:
    number = values.get(Key.ARCH_TYPE)
    if number is None:
        raise FileError(f"{path}: header key 1 (ARCH_TYPE) is missing; {_DAMAGED}")
    if number not in ARCH_IDS:
        raise FileError(
            f"{path}: unknown architecture {number:#x}; "
            f"a newer pyllama-dist may know it, else {_DAMAGED}"
        )
    return ARCH_IDS[number]


def _config(arch: Arch, values: Mapping[Key, int]) -> ModelConfig:
    """The configuration of a file: each key of its architecture must be there, and no other."""
    layout = LAYOUTS[arch]
    for key in values.keys() - {pair.key for pair in layout.pairs}:
        raise ValueError(f"header key {key.value} ({key.name}) has no meaning for {arch}")
    facts = {pair.fact: _fact(pair, values) for pair in layout.pairs}
    facts |= layout.fixed
    layout.complete(facts)
    config = _assembled(facts)
    _check(config)
    return config


def _fact(pair: Pair, values: Mapping[Key, int]) -> object:
    value = values.get(pair.key, pair.default)
    name = f"header key {pair.key.value} ({pair.key.name})"
    if value is None:
        raise ValueError(f"{name} is missing")
    if not pair.low <= value <= pair.high:
        bounds = f"{pair.low}" if pair.low == pair.high else f"{pair.low} to {pair.high}"
        if pair.reason:
            raise _UnsupportedError(f"{name} is {value}, expected {bounds}: {pair.reason}")
        raise ValueError(f"{name} is {value}, expected {bounds}")
    return pair.code.fact(value)


def _facts(config: ModelConfig) -> Facts:
    """All facts by name, those of a part like experts.count."""
    facts: Facts = {}
    for name, value in vars(config).items():
        if is_dataclass(value):
            facts |= {f"{name}.{part}": of_part for part, of_part in vars(value).items()}
        else:
            facts[name] = value
    return facts


def _assembled(facts: Facts) -> ModelConfig:
    """The configuration of these facts; those that are of the format only are left out."""
    own: dict[str, Any] = {f.name: facts[f.name] for f in fields(ModelConfig) if f.name in facts}
    for name, kind in _PARTS.items():
        part = {f.name: facts.get(f"{name}.{f.name}") for f in fields(kind)}
        if any(value is not None for value in part.values()):
            own[name] = kind(**part)
    return ModelConfig(**own)


def _same(value: object, told: object) -> bool:
    """Whether a fact came through; of real numbers float32 does."""
    if isinstance(value, float) and isinstance(told, float):
        return bool(np.float32(value) == np.float32(told))
    return value == told


def _check(c: ModelConfig) -> None:
    """Refuses values that contradict each other or that nothing serves."""
    if c.n_heads % c.n_kv_heads:
        raise ValueError(f"{c.n_heads} query heads do not share {c.n_kv_heads} key heads evenly")
    if not c.head_dim:
        raise ValueError(f"{c.n_heads} query heads share {c.dim} values")
    if c.rotary_dim % 2 or c.rotary_dim > c.head_dim:
        raise ValueError(
            f"rotary dim is {c.rotary_dim}, expected an even number up to head dim {c.head_dim}"
        )
    _check_number("rope theta", c.rope_theta, 1, 1e12)
    _check_number("norm epsilon", c.norm_epsilon, 0, 1)
    if c.weights is FloatType.F16:
        raise _UnsupportedError("weights are F16, which is not implemented, only F32, Q40 and Q80")
    if c.rope_scaling is not None:
        _check_scaling(c.rope_scaling)
    if c.experts is not None:
        _check_experts(c.experts, c.n_layers)
    if c.latent is not None:
        _check_number("norm epsilon of latent vectors", c.latent.norm_epsilon, 0, 1)
        _check_latent(c.latent)
    if c.indexer is not None:
        _check_indexer(c.indexer, c.n_layers)


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # so that NaN is refused too
        raise ValueError(f"{name} is {value}, expected {low:g} to {high:g}")


def _check_scaling(s: RopeScaling) -> None:
    if not (0 < s.low_freq_factor < s.high_freq_factor and s.original_max_seq_len):
        raise ValueError(
            f"rope scaling between frequency factors {s.low_freq_factor:g} and "
            f"{s.high_freq_factor:g} of {s.original_max_seq_len} positions is impossible"
        )


def _check_latent(latent: Latent) -> None:
    """Kernels take both in vectors of 16, and each head's matrix in groups of 16 rows."""
    if latent.kv_rank % 16 or latent.value_dim % 16:
        raise _UnsupportedError(
            f"latent vectors of {latent.kv_rank} and value heads of {latent.value_dim} numbers, "
            f"only multiples of 16 are implemented"
        )


def _check_experts(e: Experts, n_layers: int) -> None:
    if e.count * n_layers > _MAX_EXPERTS:
        raise ValueError(f"{n_layers} layers of {e.count} experts, expected {_MAX_EXPERTS} in all")
    if e.dense_layers > n_layers:
        raise ValueError(f"{e.dense_layers} of {n_layers} layers are dense")
    # A group is judged by its two best experts.
    if (
        e.count % e.groups
        or e.active_groups > e.groups
        or (e.groups > 1 and e.count < 2 * e.groups)
    ):
        raise ValueError(
            f"{e.active_groups} of {e.groups} groups of {e.count} experts are impossible"
        )
    if e.active > e.active_groups * (e.count // e.groups):
        raise ValueError(f"{e.active} of {e.count} experts are chosen: too many")
    _check_number("scale of the experts", e.scale, 0, 1e6)


def _check_indexer(i: Indexer, n_layers: int) -> None:
    if len(i.layers) != n_layers:
        raise _UnsupportedError(f"{n_layers} layers, of which {len(i.layers)} may pick positions")
    if not i.layers[0]:
        raise ValueError("the first layer takes the positions that none before it has picked")
    if i.rotary_dim > i.head_dim:
        raise ValueError(f"{i.rotary_dim} of {i.head_dim} values of an index head turn")

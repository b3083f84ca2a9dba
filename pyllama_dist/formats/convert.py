"""Converts a checkpoint of Hugging Face, or one in a GGUF file, to a model directory.

The directory holds `model.m` and the text files of `sidecar_checks.SIDECARS`.
Everything is checked before the first byte is written, and the files appear at the end, together.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import Architecture, FloatType, ModelConfig, Order, Tensor
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.formats.atomic_write import atomic_write
from pyllama_dist.formats.dllama import header
from pyllama_dist.formats.dllama.model_file import tensor_bytes, write_model
from pyllama_dist.formats.gguf.checkpoint import GgufCheckpoint
from pyllama_dist.formats.huggingface.checkpoint import Checkpoint
from pyllama_dist.formats.huggingface.sidecar_files import sidecar_files
from pyllama_dist.formats.sidecar_checks import SIDECARS, check_sidecars

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
AnyCheckpoint = Checkpoint | GgufCheckpoint
_Rows = TypeVar("_Rows", Floats, Bytes)

_CHUNK_BYTES = 8 << 20  # of float32 held at once

# The largest magnitude whose scale still fits: a float16 in a block, nothing in float32.
_LARGEST = {
    FloatType.F32: float(np.finfo(np.float32).max),
    FloatType.Q40: 65504.0 * 8,
    FloatType.Q80: 65504.0 * 127,
}


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        config: of the new model.
        files: names of the files in the new directory.
        n_tensors: tensors in `model.m`.
        checkpoint_bytes: bytes of all tensors of the checkpoint.
        model_bytes: bytes of `model.m`.
        warnings: what the user should know, one line each.
    """

    config: ModelConfig
    files: tuple[str, ...]
    n_tensors: int
    checkpoint_bytes: int
    model_bytes: int
    warnings: tuple[str, ...]


def convert(
    checkpoint_dir: Path,
    out_dir: Path,
    weights: FloatType,
    architectures: Mapping[str, Architecture],
    progress: Callable[[int, int], None],
) -> Report:
    """Converts the checkpoint in `checkpoint_dir` to a model in `out_dir`.

    Args:
        checkpoint_dir: holds `config.json` and safetensors; or a GGUF file.
        out_dir: made if it is not there; files in it are replaced at the end, text files that the
            checkpoint does not have are moved aside.
        weights: number format of the matrices.
        architectures: those that can be converted, by `model_type`.
        progress: is told the bytes of `model.m` written so far, and its size.

    Raises:
        FileError: the checkpoint is incomplete, damaged or not supported, or `out_dir` cannot be
            written. No file in `out_dir` was changed.
        UsageError: both directories are the same.
    """
    if checkpoint_dir.resolve() == out_dir.resolve():
        raise UsageError(f"{out_dir}: the checkpoint's own directory; give another one to write to")
    checkpoint = _open(checkpoint_dir)
    architecture = _architecture(checkpoint, architectures)
    warnings: list[str] = []
    config = _config(checkpoint, architecture, weights, warnings)
    names = checkpoint.names
    tensors = [_found(tensor, checkpoint, names) for tensor in architecture.tensors(config)]
    _check_shapes(tensors, checkpoint)
    if checkpoint.config.get("quantization_config"):
        warnings.append(
            "quantization_config is in config.json, but the tensors are not quantized: ignored"
        )
    warnings += _unused(names - {tensor.source[0] for tensor in tensors}, config.n_layers)
    if isinstance(checkpoint, GgufCheckpoint):
        warnings += [*checkpoint.notes, *_copied(tensors, checkpoint, weights)]
        sidecars = checkpoint.sidecars(warnings)
    else:
        sidecars = sidecar_files(checkpoint.path, checkpoint.config, warnings)
    check_sidecars(sidecars, config.vocab_size, checkpoint.path, warnings)
    size = _model_bytes(config, tensors, checkpoint_dir)

    def data(tensor: Tensor) -> Iterator[Floats | Bytes]:
        return _chunks(checkpoint, tensor)

    written = 0

    def count(n_bytes: int) -> None:
        nonlocal written
        written += n_bytes
        progress(written, size)

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out_dir).free
        if free < size:
            raise FileError(
                f"{out_dir}: {free >> 20} MiB free, the model takes {size >> 20} MiB; "
                f"free some space or write elsewhere"
            )
        with ExitStack() as stack:
            for name, content in sidecars.items():
                stack.enter_context(atomic_write(out_dir / name)).write(content)
            write_model(out_dir / "model.m", config, tensors, data, count)
        for name in SIDECARS:
            if name not in sidecars and (out_dir / name).exists():
                (out_dir / name).replace(out_dir / f"{name}.old")
                warnings.append(f"{name} was there, of another model: it is {name}.old now")
    except OSError as error:
        raise FileError(
            f"{out_dir}: {error.strerror or error}; the model was not written, give another "
            f"directory"
        ) from error
    return Report(
        config=config,
        files=("model.m", *sidecars),
        n_tensors=len(tensors),
        checkpoint_bytes=checkpoint.size,
        model_bytes=size,
        warnings=tuple(warnings),
    )


def _open(path: Path) -> AnyCheckpoint:
    return GgufCheckpoint.open(path) if path.is_file() else Checkpoint.open(path)


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / "config.json"


def _architecture(
    checkpoint: AnyCheckpoint, architectures: Mapping[str, Architecture]
) -> Architecture:
    file = _config_file(checkpoint.path)
    model_type = checkpoint.config.get("model_type")
    architecture = architectures.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise FileError(
            f"{file}: model_type {model_type!r} is not supported, only "
            f"{', '.join(architectures)}; choose another checkpoint"
        )
    return architecture


def _config(
    checkpoint: AnyCheckpoint, architecture: Architecture, weights: FloatType, warnings: list[str]
) -> ModelConfig:
    """The configuration; whether there are biases, the tensors decide, not `config.json`."""
    try:
        said = architecture.config_from_hf(checkpoint.config, weights)
    except FileError as error:
        raise FileError(f"{checkpoint.path}: {error}") from None
    _header(said, checkpoint.path)  # before tensors are listed: a wrong file may ask for millions
    with_bias, without_bias = (
        {
            name
            for tensor in architecture.tensors(replace(said, qkv_bias=bias))
            for name in tensor.source
        }
        for bias in (True, False)
    )
    has_bias = not checkpoint.names.isdisjoint(with_bias - without_bias)
    if has_bias != said.qkv_bias:
        warnings.append(
            f"attention_bias is {said.qkv_bias} in config.json, but the checkpoint has "
            f"{'biases' if has_bias else 'no biases'}: converted as it is"
        )
    return replace(said, qkv_bias=has_bias)


def _found(tensor: Tensor, checkpoint: AnyCheckpoint, names: frozenset[str]) -> Tensor:
    """`tensor` with the one source that it has in this checkpoint, and how it lies there."""
    own, part = tensor.source[0], f"model.{tensor.name}"
    if isinstance(checkpoint, GgufCheckpoint):
        # What llama.cpp's converter has cut or put in order is taken as it is.
        cut = own not in names and part in names
        if cut or (checkpoint.interleaved_qk and tensor.source_order is Order.ADJACENT):
            source = (part,) if cut else tensor.source
            tensor = Tensor(tensor.name, tensor.shape, tensor.float_type, source)
    # Another than its own is right for a tied head only; else the checkpoint has lost something.
    found = tensor.source[0]
    if checkpoint.config.get("tie_word_embeddings"):
        found = next((name for name in tensor.source if name in names), found)
    checkpoint.check_type(found)
    return replace(tensor, source=(found,))


def _check_shapes(tensors: list[Tensor], checkpoint: AnyCheckpoint) -> None:
    """Checks each tensor used; one that several are cut from must have just their rows."""
    expected: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        source, heads = tensor.source[0], tensor.source_heads
        rows, *width = tensor.shape
        rows //= heads
        if tensor.source_order is Order.TRANSPOSED:
            rows, width = width[0], [rows]
        stop = heads * (tensor.source_rows[1] if tensor.source_rows else rows)
        expected[source] = (max(stop, expected.get(source, (0,))[0]), *width)
    for source, shape in expected.items():
        found = checkpoint.shape(source)
        if found != shape:
            raise FileError(
                f"{checkpoint.path}: tensor {source} is {list(found)}, "
                f"{_config_file(checkpoint.path).name} says {list(shape)}; "
                f"the files do not belong together, download them again"
            )


def _header(config: ModelConfig, checkpoint_dir: Path) -> bytes:
    """The header of `model.m`, which also checks that the configuration makes sense."""
    try:
        return header.encode(config)
    except ValueError as error:
        raise FileError(f"{_config_file(checkpoint_dir)}: {error}") from None


def _model_bytes(config: ModelConfig, tensors: list[Tensor], checkpoint_dir: Path) -> int:
    """Size of `model.m`; checks at the same time that the format can hold it."""
    start = _header(config, checkpoint_dir)
    try:
        return len(start) + sum(tensor_bytes(tensor) for tensor in tensors)
    except ValueError as error:
        raise FileError(f"{checkpoint_dir}: {error}; convert with --weights f32") from None


def _copied(tensors: list[Tensor], checkpoint: GgufCheckpoint, weights: FloatType) -> Iterator[str]:
    """A line on the matrices that are copied, and one on those that lose digits."""
    copied: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.float_type is weights is not FloatType.F32:
            source = tensor.source[0]
            same = _blocks(checkpoint, tensor, 0, 0) is not None
            (copied if same else rounded)[checkpoint.stored_type(source)] += 1
    for counts, what in ((copied, "copied unchanged"), (rounded, f"rounded to {weights.name}")):
        if counts:
            types = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
            yield f"matrices {what}: {types}"


def _chunks(checkpoint: AnyCheckpoint, tensor: Tensor) -> Iterator[Floats | Bytes]:
    """The rows of `tensor`, a few MiB at a time; stored blocks where they are what it takes."""
    source, order = tensor.source[0], tensor.source_order
    if len(tensor.shape) == 1:
        column = _floats(checkpoint, tensor, 0, 1).reshape(-1, 1)
        parts = [
            _ordered(column[start:stop], order) for start, stop in _spans(tensor, len(column), 1)
        ]
        yield np.concatenate(parts).reshape(1, -1)
        return
    height, width = checkpoint.shape(source)
    for start, stop in _spans(tensor, height, width):
        blocks = _blocks(checkpoint, tensor, start, stop)
        if blocks is not None:
            yield _ordered(blocks, order)
        else:
            yield _ordered(_floats(checkpoint, tensor, start, stop), order)


def _spans(tensor: Tensor, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Which rows of its source a tensor is made of: each span is whole or is put in order alone."""
    head = height // tensor.source_heads
    first, last = tensor.source_rows or (0, head)
    step = last - first
    if tensor.source_order is Order.SAME:
        step = max(1, _CHUNK_BYTES // (4 * width))
    for at in range(0, height, head):
        for start in range(at + first, at + last, step):
            yield start, min(start + step, at + last)


def _ordered(rows: _Rows, order: Order) -> _Rows:
    """The rows of one head in another order."""
    match order:
        case Order.SAME:
            return rows
        case Order.TRANSPOSED:
            return rows.T
        case Order.ADJACENT:
            return rows.reshape(2, -1, rows.shape[1]).swapaxes(0, 1).reshape(rows.shape)


def _blocks(checkpoint: AnyCheckpoint, tensor: Tensor, start: int, stop: int) -> Bytes | None:
    """Rows of a tensor's source as they are stored, if that is the format of the tensor."""
    if isinstance(checkpoint, Checkpoint) or tensor.source_order is Order.TRANSPOSED:
        return None
    source = tensor.source[0]
    blocks = checkpoint.blocks(source, tensor.float_type, start, stop)
    if blocks is None:
        return None
    # Each block begins with its scale.
    scales = blocks.reshape(-1, tensor.float_type.block_bytes)[:, :2].copy().view("<f2")
    if not np.isfinite(scales).all():
        raise FileError(
            f"{checkpoint.path}: tensor {source} has blocks whose scale is NaN or infinite; "
            f"download it again"
        )
    return blocks


def _floats(checkpoint: AnyCheckpoint, tensor: Tensor, start: int, stop: int) -> Floats:
    """Rows of a tensor's source, all of them numbers that the tensor's format can hold."""
    source, limit = tensor.source[0], _LARGEST[tensor.float_type]
    rows = checkpoint.rows(source, start, stop)
    # Written so that NaN, which compares as false, is caught too.
    if not (rows.min() >= -limit and rows.max() <= limit):
        raise FileError(
            f"{checkpoint.path}: tensor {source} has values that are NaN, infinite or too "
            f"large for {tensor.float_type.name}; download it again or use --weights f32"
        )
    return rows


def _unused(names: frozenset[str], n_layers: int) -> list[str]:
    """A line for the tensors beyond the last layer, and one for others that have no use."""

    def beyond(name: str) -> bool:
        parts = name.split(".")
        return any(
            layers == "layers" and number.isdecimal() and int(number) >= n_layers
            for layers, number in itertools.pairwise(parts)
        )

    unused = sorted(names)
    others = [name for name in unused if not beyond(name)]
    lines = []
    if extra := len(unused) - len(others):
        lines.append(f"tensors not used: {extra} of layers from {n_layers} on (draft layers)")
    if others:
        more = ", …" if len(others) > 3 else ""
        lines.append(f"tensors not used: {len(others)} ({', '.join(others[:3])}{more})")
    return lines

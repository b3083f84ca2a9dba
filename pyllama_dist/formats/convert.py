"""Converts a checkpoint of Hugging Face to a model directory.

The directory holds `model.m`, `tokenizer.json`, `chat_template.jinja` and `generation_config.json`.
Everything is checked before the first byte is written, and the files appear at the end, together.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import Arch, Architecture, FloatType, ModelConfig, Tensor
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.formats import header
from pyllama_dist.formats.checkpoint import Checkpoint
from pyllama_dist.formats.companions import companion_files
from pyllama_dist.formats.model_file import tensor_bytes, write_model
from pyllama_dist.formats.replacing import replacing

Floats = npt.NDArray[np.float32]

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
    architectures: Mapping[Arch, Architecture],
    progress: Callable[[int, int], None],
) -> Report:
    """Converts the checkpoint in `checkpoint_dir` to a model in `out_dir`.

    Args:
        checkpoint_dir: holds `config.json` and safetensors.
        out_dir: made if it is not there; files in it are replaced at the end.
        weights: number format of the matrices.
        architectures: those that can be converted.
        progress: is told the bytes of `model.m` written so far, and its size.

    Raises:
        FileError: the checkpoint is incomplete, damaged or not supported, or `out_dir` cannot be
            written. No file in `out_dir` was changed.
        UsageError: both directories are the same.
    """
    if checkpoint_dir.resolve() == out_dir.resolve():
        raise UsageError(f"{out_dir}: the checkpoint's own directory; give another one to write to")
    checkpoint = Checkpoint.open(checkpoint_dir)
    architecture = _architecture(checkpoint, architectures)
    warnings: list[str] = []
    config = _config(checkpoint, architecture, weights, warnings)
    tensors = architecture.tensors(config)
    sources = {tensor.name: _source(tensor, checkpoint) for tensor in tensors}
    _check_shapes(tensors, sources, checkpoint)
    warnings += _unused(checkpoint, frozenset(sources.values()), config.n_layers)
    companions = companion_files(checkpoint.path, checkpoint.config, warnings)
    size = _model_bytes(config, tensors, checkpoint_dir)

    def data(tensor: Tensor) -> Iterator[Floats]:
        return _chunks(checkpoint, sources[tensor.name], tensor)

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
            for name, content in companions.items():
                stack.enter_context(replacing(out_dir / name)).write(content)
            write_model(out_dir / "model.m", config, tensors, data, count)
    except OSError as error:
        raise FileError(
            f"{out_dir}: {error.strerror or error}; the model was not written, give another "
            f"directory"
        ) from error
    return Report(
        config=config,
        files=("model.m", *companions),
        n_tensors=len(tensors),
        checkpoint_bytes=checkpoint.size,
        model_bytes=size,
        warnings=tuple(warnings),
    )


def _architecture(
    checkpoint: Checkpoint, architectures: Mapping[Arch, Architecture]
) -> Architecture:
    file = checkpoint.path / "config.json"
    model_type = checkpoint.config.get("model_type")
    architecture = next((a for arch, a in architectures.items() if arch == model_type), None)
    if architecture is None:
        hint = "use its -hf version" if model_type == "chatglm" else "choose another checkpoint"
        raise FileError(
            f"{file}: model_type {model_type!r} is not supported, "
            f"only {', '.join(architectures)}; {hint}"
        )
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise FileError(
            f"{file}: the checkpoint is quantized already (quant_method {method!r}); "
            f"convert the bfloat16 one that it was made from"
        )
    return architecture


def _config(
    checkpoint: Checkpoint, architecture: Architecture, weights: FloatType, warnings: list[str]
) -> ModelConfig:
    """The configuration; whether there are biases, the tensors decide, not `config.json`."""
    try:
        said = architecture.config_from_hf(checkpoint.config, weights)
    except FileError as error:
        raise FileError(f"{checkpoint.path}: {error}") from None
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


def _source(tensor: Tensor, checkpoint: Checkpoint) -> str:
    """The tensor of the checkpoint that `tensor` comes from."""
    own = tensor.source[0]
    found = next((name for name in tensor.source if name in checkpoint.names), own)
    # Another than its own is right for a tied head only; else the checkpoint has lost something.
    source = found if checkpoint.config.get("tie_word_embeddings") else own
    checkpoint.check_type(source)
    return source


def _check_shapes(tensors: list[Tensor], sources: dict[str, str], checkpoint: Checkpoint) -> None:
    """Checks each tensor used; one that several are cut from must have just their rows."""
    expected: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        source, shape = sources[tensor.name], tensor.shape
        if tensor.source_rows is not None:
            stop = max(tensor.source_rows[1], expected.get(source, (0,))[0])
            shape = (stop, *shape[1:])
        expected[source] = shape
    for source, shape in expected.items():
        found = checkpoint.shape(source)
        if found != shape:
            raise FileError(
                f"{checkpoint.path}: tensor {source} is {list(found)}, config.json says "
                f"{list(shape)}; the files do not belong together, download them again"
            )


def _model_bytes(config: ModelConfig, tensors: list[Tensor], checkpoint_dir: Path) -> int:
    """Size of `model.m`; checks at the same time that the format can hold it."""
    try:
        start = header.encode(config)
    except ValueError as error:
        raise FileError(f"{checkpoint_dir / 'config.json'}: {error}") from None
    try:
        return len(start) + sum(tensor_bytes(tensor) for tensor in tensors)
    except ValueError as error:
        raise FileError(f"{checkpoint_dir}: {error}; convert with --weights f32") from None


def _chunks(checkpoint: Checkpoint, source: str, tensor: Tensor) -> Iterator[Floats]:
    """The rows of `tensor`, a few MiB at a time."""
    if len(tensor.shape) == 1:
        first, last = 0, 1
    else:
        first, last = tensor.source_rows or (0, tensor.shape[0])
    step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
    limit = _LARGEST[tensor.float_type]
    for start in range(first, last, step):
        rows = checkpoint.rows(source, start, min(start + step, last))
        # Written so that NaN, which compares as false, is caught too.
        if not (rows.min() >= -limit and rows.max() <= limit):
            raise FileError(
                f"{checkpoint.path}: tensor {source} has values that are NaN, infinite or too "
                f"large for {tensor.float_type.name}; download it again or use --weights f32"
            )
        yield rows


def _unused(checkpoint: Checkpoint, used: frozenset[str], n_layers: int) -> list[str]:
    """A line for the tensors beyond the last layer, and one for others that have no use."""

    def beyond(name: str) -> bool:
        parts = name.split(".")
        return any(
            layers == "layers" and number.isdecimal() and int(number) >= n_layers
            for layers, number in itertools.pairwise(parts)
        )

    unused = sorted(checkpoint.names - used)
    others = [name for name in unused if not beyond(name)]
    lines = []
    if extra := len(unused) - len(others):
        lines.append(f"tensors not used: {extra} of layers from {n_layers} on (draft layers)")
    if others:
        more = ", …" if len(others) > 3 else ""
        lines.append(f"tensors not used: {len(others)} ({', '.join(others[:3])}{more})")
    return lines

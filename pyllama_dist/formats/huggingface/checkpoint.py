"""A checkpoint directory of Hugging Face: `config.json` and safetensors, in one file or in shards.

Numbers are read a few rows at a time, so a checkpoint may be larger than memory.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import FileError
from pyllama_dist.files import read_json

Floats = npt.NDArray[np.float32]

# bfloat16 is the upper half of a float32; NumPy has no such type, so its bits are read as uint16.
_STORED_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Beginnings of names in checkpoints of models that have other parts, or were saved without a head.
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "layers.": "model.layers.",
    "embed_tokens.": "model.embed_tokens.",
    "norm.": "model.norm.",
}
_STACK = re.compile(r"(.*\.mlp\.experts\.)(gate|up|down|gate_up)_proj(?:\.weight)?")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    path: Path
    offset: int  # of its first byte in the file
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]


class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the directory.
        config: the parsed `config.json`.
        size: bytes of all tensors.
    """

    path: Path
    config: Mapping[str, object]
    size: int

    def __init__(
        self, path: Path, config: Mapping[str, object], stored: dict[str, _Stored]
    ) -> None:
        """Wraps what was found; use `open`."""
        self.path = path
        self.config = config
        self._stored = _as_expected(stored)
        self.size = sum(
            math.prod(tensor.shape) * np.dtype(_STORED_TYPES.get(tensor.dtype, "u1")).itemsize
            for tensor in stored.values()
        )

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads `config.json` and the headers of all tensor files.

        Raises:
            FileError: a file is missing or damaged, or the checkpoint has no safetensors.
        """
        config = read_json(path / "config.json")
        if (path / _SINGLE).exists():
            return cls(path, config, _read_header(path / _SINGLE))
        if (path / _INDEX).exists():
            return cls(path, config, _read_shards(path))
        raise FileError(
            f"{path}: neither {_SINGLE} nor {_INDEX} is there; "
            f"use a checkpoint in safetensors format and download all of its files"
        )

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            FileError: there is none of that name.
        """
        return self._find(name).shape

    def check_type(self, name: str) -> None:
        """Checks that the numbers of a tensor can be read.

        Raises:
            FileError: there is none of that name, or it is of a type that is not supported.
        """
        tensor = self._find(name)
        if tensor.dtype not in _STORED_TYPES:
            raise FileError(
                f"{tensor.path}: tensor {name} is of type {tensor.dtype}, supported are "
                f"{', '.join(_STORED_TYPES)}; {self._quantized}use the unquantized checkpoint"
            )

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Some rows of a matrix as `[stop - start, width]` float32; a vector is one row.

        Raises:
            FileError: there is no such tensor, its type is not supported, or reading failed.
            ValueError: rows outside the tensor.
        """
        self.check_type(name)
        tensor = self._find(name)
        height, width = math.prod(tensor.shape[:-1]), math.prod(tensor.shape[-1:])
        if not 0 <= start <= stop <= height:
            raise ValueError(f"{name} has {height} rows, not {start} to {stop}")
        dtype = np.dtype(_STORED_TYPES[tensor.dtype])
        count = (stop - start) * width
        offset = tensor.offset + start * width * dtype.itemsize
        try:
            values = np.fromfile(tensor.path, dtype, count, offset=offset)
        except OSError as error:
            raise FileError(f"{tensor.path}: {error}; reading tensor {name}") from error
        if len(values) < count:
            raise FileError(f"{tensor.path}: ends inside tensor {name}; download it again")
        if tensor.dtype == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype(np.float32, copy=False).reshape(stop - start, width)

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            quantized = self._quantized
            mend = "use the unquantized" if quantized else "download all files of the"
            raise FileError(
                f"{self.path}: tensor {name} is missing; {quantized}{mend} checkpoint"
                f"{'' if quantized else ' again'}"
            )
        return self._stored[name]

    @property
    def _quantized(self) -> str:
        """What config.json says of quantization, for errors; nothing if it says nothing."""
        quantization = self.config.get("quantization_config")
        if not quantization:
            return ""
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        return f"the checkpoint is quantized (quant_method {method!r}): "


def _as_expected(stored: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """The tensors under the names that models without other parts have, each expert by itself."""
    expected: dict[str, _Stored] = {}
    for name, tensor in stored.items():
        plain = name
        for prefix, usual in _PREFIXES.items():
            if name.startswith(prefix):
                plain = usual + name.removeprefix(prefix)
                break
        if plain in stored:
            plain = name
        expected.update(_experts(plain, tensor))
    return expected


def _experts(name: str, tensor: _Stored) -> Iterator[tuple[str, _Stored]]:
    """A tensor; of one that has the matrices of all experts, each of them.

    transformers 5 keeps `gate_up_proj [experts, 2 * width, dim]`, gate first, and `down_proj`.
    """
    found = _STACK.fullmatch(name)
    kinds = ("gate", "up") if found and found[2] == "gate_up" else (found[2],) if found else ()
    whole = len(tensor.shape) == 3 and 0 not in tensor.shape
    if found is None or not whole or tensor.shape[1] % len(kinds):
        yield name, tensor
        return
    height, width = tensor.shape[1] // len(kinds), tensor.shape[2]
    size = height * width * np.dtype(_STORED_TYPES.get(tensor.dtype, "u1")).itemsize
    for number, (expert, kind) in enumerate(itertools.product(range(tensor.shape[0]), kinds)):
        part = replace(tensor, offset=tensor.offset + number * size, shape=(height, width))
        yield f"{found[1]}{expert}.{kind}_proj.weight", part


def _read_shards(path: Path) -> dict[str, _Stored]:
    """The tensors that the index names, each in the file that it names."""
    index = path / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FileError(f"{index}: no object named weight_map; download it again")
    headers: dict[str, dict[str, _Stored]] = {}
    tensors: dict[str, _Stored] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise FileError(f"{index}: tensor {name} is in {file!r}, expected the name of a file")
        if file not in headers:
            if not (path / file).exists():
                raise FileError(
                    f"{path / file}: missing, and {_INDEX} names it for tensor {name}; download it"
                )
            headers[file] = _read_header(path / file)
        if name not in headers[file]:
            raise FileError(
                f"{path / file}: tensor {name} is missing, which {_INDEX} says is there; "
                f"download both again"
            )
        tensors[name] = headers[file][name]
    return tensors


def _read_header(path: Path) -> dict[str, _Stored]:
    """The tensors of one safetensors file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise FileError(
            f"{path}: reading it takes the safetensors library; "
            f"install it with `pip install pyllama-dist[root]`"
        ) from None
    # The library checks the header, every offset and the size of the file. But it gives no bfloat16
    # to NumPy, so the numbers are read here, from the offsets that it has found good.
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: {error}; the file is damaged, download it again") from None
    header.pop("__metadata__", None)
    return {
        name: _Stored(
            path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
        )
        for name, entry in header.items()
    }

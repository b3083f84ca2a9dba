"""The `.m` model file: a header, then the tensors one after the other, without names or padding.

Their order and shapes follow from the header, so both sides ask the architecture for its list.
"""

import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pyllama_dist.closing import Closing
from pyllama_dist.config import Arch, Architecture, FloatType, ModelConfig, Tensor
from pyllama_dist.errors import FileError
from pyllama_dist.formats.atomic_write import atomic_write
from pyllama_dist.formats.dllama import header
from pyllama_kernels.blocks import dequantize_q40, dequantize_q80, quantize_q40, quantize_q80

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class ModelFile(Closing):
    """A `.m` file, mapped into memory for reading.

    Attributes:
        config: what the header says.
        tensors: the tensors by name, in the order of the file.
        size: bytes of the file.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        starts: dict[str, int],
        mapping: mmap.mmap,
    ) -> None:
        """Wraps a mapping whose size was checked; use `open`."""
        self.config = config
        self.tensors = tensors
        self.size = len(mapping)
        self._starts = starts
        self._map = mapping
        self._bytes: Bytes = np.frombuffer(mapping, np.uint8)

    @classmethod
    def open(cls, path: Path, architectures: Mapping[Arch, Architecture]) -> Self:
        """Maps the file at `path` and checks that it is whole.

        Raises:
            FileError: it cannot be read, is no model file, or its size is not what its header says.
        """
        try:
            with path.open("rb") as file:
                config, start = header.read(file, path)
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FileError(
                f"{path}: {error.strerror}; a model is a directory made by `pyllama-dist convert`"
            ) from error
        tensors = {tensor.name: tensor for tensor in architectures[config.arch].tensors(config)}
        try:
            sizes = [tensor_bytes(tensor) for tensor in tensors.values()]
        except ValueError as error:
            raise FileError(f"{path}: {error}; convert the checkpoint again") from None
        *starts, end = itertools.accumulate(sizes, initial=start)
        if len(mapping) != end:
            what = "truncated" if len(mapping) < end else "too long"
            raise FileError(
                f"{path}: {what}, {len(mapping)} bytes where its header asks for {end}; "
                f"copy the file or convert the checkpoint again"
            )
        return cls(config, tensors, dict(zip(tensors, starts, strict=True)), mapping)

    def raw(self, name: str) -> Bytes:
        """The stored bytes, not copied: `[rows, row_bytes]` uint8; a vector is one row."""
        rows, row_bytes = _stored_shape(self.tensors[name])
        start = self._starts[name]
        return self._bytes[start : start + rows * row_bytes].reshape(rows, row_bytes)

    def slice(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> Bytes:
        """The stored bytes of a part of a tensor, not copied.

        Args:
            name: the tensor.
            rows: first row and the one after the last.
            cols: first column and the one after the last, on limits of blocks.

        Returns:
            `[rows, bytes]` uint8, strided unless it spans all columns.

        Raises:
            ValueError: outside the tensor, or columns that cut a block.
        """
        tensor = self.tensors[name]
        height, width = _rows(tensor), tensor.shape[-1]
        if not (0 <= rows[0] <= rows[1] <= height and 0 <= cols[0] <= cols[1] <= width):
            raise ValueError(f"{name} is [{height}, {width}]: no rows {rows}, columns {cols} in it")
        first, last = (tensor.float_type.row_bytes(col) for col in cols)
        return self.raw(name)[rows[0] : rows[1], first:last]

    def float32(self, name: str, rows: tuple[int, int] | None = None) -> Floats:
        """The values of a tensor, or of some of its rows, as a float32 copy of the tensor's shape.

        Raises:
            ValueError: rows outside the tensor.
        """
        tensor = self.tensors[name]
        part = self.slice(name, rows or (0, _rows(tensor)), (0, tensor.shape[-1]))
        values = _decode(part, tensor.float_type)
        return values if len(tensor.shape) > 1 else values.reshape(tensor.shape)

    def drop_pages(self) -> None:
        """Gives back the memory of pages read so far; the system may keep them as file cache."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the mapping; where views of it are still in use, the last of them does."""
        self._bytes = np.empty(0, np.uint8)
        with suppress(BufferError):
            self._map.close()


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in the file.

    Raises:
        ValueError: its rows are not whole blocks.
    """
    try:
        return math.prod(_stored_shape(tensor))
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from None


def write_model(
    path: Path,
    config: ModelConfig,
    tensors: list[Tensor],
    data: Callable[[Tensor], Iterator[Floats | Bytes]],
    progress: Callable[[int], None],
) -> None:
    """Writes a `.m` file, which appears under its name only when it is whole.

    Args:
        path: the file, replaced where it exists.
        config: what the header says.
        tensors: the tensors, in the order of the file.
        data: gives the rows of a tensor in chunks, `[rows, width]` float32; a vector is one row.
            `[rows, row_bytes]` uint8 are taken as they are, as bytes of the tensor's float type.
        progress: is told the bytes written since the last call.

    Raises:
        ValueError: the configuration or a tensor's rows do not fit the format, or `data` gives
            another number of rows.
        OSError: writing failed.
    """
    start = header.encode(config)
    with atomic_write(path) as file:
        file.write(start)
        for tensor in tensors:
            rows = 0
            for chunk in data(tensor):
                rows += len(chunk)
                progress(file.write(_encode(chunk, tensor).data))
            if rows != _rows(tensor):
                raise ValueError(f"{tensor.name}: {rows} rows given, {_rows(tensor)} expected")


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _stored_shape(tensor: Tensor) -> tuple[int, int]:
    """Rows, and bytes of a row."""
    return _rows(tensor), tensor.float_type.row_bytes(tensor.shape[-1])


def _encode(values: Floats | Bytes, tensor: Tensor) -> Bytes:
    if values.dtype == np.uint8:
        if values.shape[1] != _stored_shape(tensor)[1]:
            raise ValueError(f"{tensor.name}: {values.shape[1]} bytes given for a row")
        return np.ascontiguousarray(values, np.uint8)
    floats = np.asarray(values, np.float32)
    match tensor.float_type:
        case FloatType.Q40:
            return quantize_q40(floats)
        case FloatType.Q80:
            return quantize_q80(floats)
        case FloatType.F32:
            return np.ascontiguousarray(floats, "<f4").view(np.uint8)
        case FloatType.F16:
            raise ValueError("F16 tensors are not written")


def _decode(stored: Bytes, float_type: FloatType) -> Floats:
    match float_type:
        case FloatType.Q40:
            return dequantize_q40(stored)
        case FloatType.Q80:
            return dequantize_q80(stored)
        case FloatType.F32:
            return stored.copy().view("<f4").astype(np.float32, copy=False)
        case FloatType.F16:
            raise ValueError("F16 tensors are not read")

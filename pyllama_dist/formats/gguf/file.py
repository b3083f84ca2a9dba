"""A GGUF file, or the parts of a split one: metadata and tensors, read by the gguf library."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import FileError
from pyllama_dist.files import one_line

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField, ReaderTensor

_PART = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
_MAX_PARTS = 1000


class GgufFile:
    """An open file.

    Attributes:
        path: of the file, or of its first part.
        tensors: by llama.cpp's names; their data are mapped, not in memory.
    """

    def __init__(
        self,
        path: Path,
        fields: "Mapping[str, ReaderField]",
        tensors: "Mapping[str, ReaderTensor]",
    ) -> None:
        """Wraps what was read; use `open`."""
        self.path = path
        self.tensors = tensors
        self._fields = fields

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the metadata and the places of all tensors, of the other parts too.

        Raises:
            FileError: a file is missing, damaged or no GGUF file, it is not the first part, or the
                gguf library is not installed.
        """
        reader = _read(path)
        first = cls(path, reader.fields, {tensor.name: tensor for tensor in reader.tensors})
        n_parts = first.integer("split.count", 1)
        if n_parts <= 1:
            return first
        named = _PART.fullmatch(path.name)
        if named is None or first.integer("split.no") != 0 or n_parts > _MAX_PARTS:
            raise FileError(
                f"{path}: a part of a model in {n_parts} files; give the first one, under its "
                f"original name (…-00001-of-{n_parts:05}.gguf), with the others beside it"
            )
        tensors = dict(first.tensors)
        for part in range(2, n_parts + 1):
            other = _read(path.with_name(f"{named[1]}-{part:05}-of-{n_parts:05}.gguf"))
            tensors |= {tensor.name: tensor for tensor in other.tensors}
        return cls(path, reader.fields, tensors)

    def get(self, key: str) -> object:
        """The value of a key: a number, bool, string, or list of such; None if it is not there.

        Raises:
            FileError: it is a string that is not UTF-8.
        """
        field = self._fields.get(key)
        try:
            return None if field is None else field.contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise self.damaged(f"{key}: {one_line(error)}") from None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0.

        Raises:
            FileError: it is something else, or missing without a default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.damaged(f"{key} is {value!r}, expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; of a float32 the shortest decimal, as 1e-05 for 9.999999747378752e-06.

        Raises:
            FileError: it is something else, or missing without a default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.damaged(f"{key} is {value!r}, expected a number")
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def items(self, key: str, kind: type) -> list[Any]:
        """A list whose items are all of type `kind`; empty if it is not there.

        Raises:
            FileError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.damaged(f"{key} is no list of {kind.__name__}")
        return value

    def damaged(self, what: str) -> FileError:
        """The error to raise where the content makes no sense."""
        return FileError(f"{self.path}: {what}; download the file again or choose another one")


def _read(path: Path) -> "GGUFReader":
    """The library's reader, made to notice the end of the file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise FileError(
            f"{path}: a single file is read as GGUF, which takes the gguf library; "
            f"install it with `pip install pyllama-dist[gguf]`"
        ) from None

    class Bounded(GGUFReader):
        # Behind the end the library reads empty arrays, as often as a damaged count asks for.
        def _get(
            self,
            offset: int,
            dtype: npt.DTypeLike,
            count: int = 1,
            override_order: Literal["I", "S", "<"] | None = None,
        ) -> npt.NDArray[Any]:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"ends after {len(self.data)} bytes, byte {end} is asked for")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Bounded(path)
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; are all parts downloaded?") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise FileError(
            f"{path}: no sound GGUF file ({one_line(error)}); download it again"
        ) from None
    if reader.byte_order == "S":
        raise FileError(f"{path}: numbers are in big-endian order; choose a little-endian file")
    return reader

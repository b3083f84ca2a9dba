"""Reading the text files of models and checkpoints, with errors a user understands."""

import json
from pathlib import Path

from pyllama_dist.errors import FileError, UsageError

JSON_LIMIT = 64 << 20  # bytes; the index of a checkpoint of many shards has some MB


def one_line(error: BaseException) -> str:
    """The message of a library's exception without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def find_model(path: Path) -> Path:
    """The `.m` file that a path means: itself, or in a directory `model.m` or the only one.

    Raises:
        UsageError: the directory has several.
    """
    return find_file(path, "model.m", ".m", "--model FILE.m") if path.is_dir() else path


def find_file(directory: Path, name: str, suffix: str, flag: str) -> Path:
    """`name` in a directory; where it is not there, the only file that ends in `suffix`.

    Raises:
        UsageError: there are several; `flag` says how to choose.
    """
    own = directory / name
    found = [] if own.exists() else sorted(directory.glob(f"*{suffix}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise UsageError(f"{directory} has {len(found)} {suffix} files ({names}); say {flag}")
    return found[0] if found else own


def read_text(path: Path, limit: int) -> str:
    """The UTF-8 text of a file of at most `limit` bytes.

    Raises:
        FileError: the file is missing, unreadable, larger than `limit`, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise FileError(
            f"{path} does not exist; is the directory complete? copy it from the checkpoint again"
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None
    if len(data) > limit:
        raise FileError(f"{path} is larger than {limit:,} bytes; it is not a file of this kind")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is not UTF-8 text at byte {error.start}; copy it again from the checkpoint"
        ) from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, object]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        FileError: as `read_text`, or the file is not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is damaged: {one_line(error)}; copy it again from the checkpoint"
        ) from None
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value

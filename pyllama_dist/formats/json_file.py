"""JSON files of a checkpoint."""

import json
from pathlib import Path

from pyllama_dist.errors import FileError


def read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        FileError: it cannot be read, is no JSON, or is no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; is the checkpoint complete?") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: no JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value

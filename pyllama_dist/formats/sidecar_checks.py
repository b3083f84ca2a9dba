"""Checks of the text files beside `model.m`, made while a checkpoint is converted.

What is wrong with them is told then, not when the model is to answer.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import read_text
from pyllama_dist.text.chat_template import TEMPLATE_LIMIT, ChatTemplate
from pyllama_dist.text.named_tokens import FILE as NAMES_FILE
from pyllama_dist.text.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"
SIDECARS = ("tokenizer.json", "chat_template.jinja", NAMES_FILE, GENERATION_FILE)
_BOUNDS = {"temperature": (0, sys.float_info.max), "top_p": (0, 1)}


def as_json(value: Mapping[str, object]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check_sidecars(
    files: dict[str, bytes], vocab_size: int, source: Path, warnings: list[str]
) -> None:
    """Opens the files as a root does; leaves out what is wrong and has a default.

    Args:
        files: by name.
        vocab_size: of the model.
        source: the checkpoint, for errors.
        warnings: gets a line for each thing that was left out, or that may surprise.

    Raises:
        FileError: a file is damaged, or does not belong to the model.
    """
    generation = _sound_generation(json.loads(files[GENERATION_FILE]), vocab_size, warnings)
    files[GENERATION_FILE] = as_json(generation)
    ends = bool(generation["eos_token_id"])
    with TemporaryDirectory() as made:
        directory = Path(made)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        try:
            if "tokenizer.json" in files:
                ends = _check_text(directory, vocab_size, warnings)
            elif "chat_template.jinja" in files:
                read_text(directory / "chat_template.jinja", TEMPLATE_LIMIT)
        except UsageError as error:  # a library is not installed
            warnings.append(f"the tokenizer and the chat template were not checked: {error}")
        except FileError as error:
            raise FileError(str(error).replace(made, str(source))) from None
    if not ends:
        warnings.append(
            "no end-of-text token (eos_token_id) is named: answers do not end by themselves"
        )


def _check_text(directory: Path, vocab_size: int, warnings: list[str]) -> bool:
    """Checks the tokenizer and the chat template; whether a token ends answers."""
    tokenizer = Tokenizer.open(directory)
    fitted = tokenizer.fitted(vocab_size)
    beyond = [token.text for token in tokenizer.added.values() if token.id >= vocab_size]
    if beyond:
        warnings.append(
            f"added tokens beyond the model's {vocab_size}: {', '.join(beyond[:3])}"
            f"{', …' if len(beyond) > 3 else ''}; a prompt that has one will be refused"
        )
    ChatTemplate.open(directory, fitted)
    return bool(fitted.eos_ids)


def _sound_generation(
    generation: dict[str, object], vocab_size: int, warnings: list[str]
) -> dict[str, object]:
    """The generation config without what no model can do."""
    sound = dict(generation)
    for key, (low, high) in _BOUNDS.items():
        value: Any = generation.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (number and low <= value <= high):
            continue
        del sound[key]
        warnings.append(f"{key} in {GENERATION_FILE} is {value!r}, which cannot be: left out")
    eos = [id for id in _ids(generation["eos_token_id"]) if 0 <= id < vocab_size]
    if lost := [id for id in _ids(generation["eos_token_id"]) if id not in eos]:
        warnings.append(
            f"eos_token_id {', '.join(map(str, lost))} is beyond the model's {vocab_size} tokens: "
            f"left out"
        )
    return sound | {"eos_token_id": eos}


def _ids(value: object) -> list[int]:
    return value if isinstance(value, list) else []

"""The text files of a checkpoint as a model has them: tokenizer, template, generation config."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyllama_dist.errors import FileError
from pyllama_dist.files import read_json
from pyllama_dist.formats.huggingface import sentencepiece_file, tiktoken_file
from pyllama_dist.formats.sidecar_checks import GENERATION_FILE, as_json
from pyllama_dist.text.named_tokens import FILE as NAMES_FILE
from pyllama_dist.text.named_tokens import NAMES, named_texts

_LFS = b"version https://git-lfs.github.com/spec/"


def sidecar_files(
    checkpoint_dir: Path, config: Mapping[str, object], warnings: list[str]
) -> dict[str, bytes]:
    """The text files of a model directory, by name.

    Args:
        checkpoint_dir: where they come from.
        config: the checkpoint's `config.json`.
        warnings: gets a line for each that the checkpoint does not have.

    Raises:
        FileError: one of the files is there but damaged.
    """
    files: dict[str, bytes] = {}
    tokenizer, stops = _tokenizer(checkpoint_dir)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    else:
        warnings.append(
            "the checkpoint has no tokenizer.json or tokenizer.model: the model cannot read text"
        )
    template = _chat_template(checkpoint_dir)
    if template is not None:
        files["chat_template.jinja"] = template
    else:
        warnings.append("the checkpoint has no chat template: the model cannot chat")
    names = _names(checkpoint_dir)
    if names is not None:
        files[NAMES_FILE] = as_json(names)
    generation = _generation_config(checkpoint_dir, config, stops)
    files[GENERATION_FILE] = as_json(generation)
    return files


def _names(checkpoint_dir: Path) -> dict[str, str | None] | None:
    """The special tokens that templates know by a name; None if no file names them.

    What the newer file lacks, the older one tells.
    """
    files = [checkpoint_dir / name for name in ("special_tokens_map.json", NAMES_FILE)]
    found = [named_texts(read_json(file)) for file in files if file.exists()]
    return dict(itertools.chain.from_iterable(names.items() for names in found)) if found else None


def _tokenizer(checkpoint_dir: Path) -> tuple[bytes | None, list[int]]:
    """`tokenizer.json`, made from `tokenizer.model` if need be; and which ids end an answer there.

    Checkpoints from before `tokenizer.json` keep their special tokens in code, not in files.
    """
    ready = _read(checkpoint_dir / "tokenizer.json")
    path = checkpoint_dir / "tokenizer.model"
    data = _read(path) if ready is None else None
    if data is None:
        return ready, []
    if tiktoken_file.is_tiktoken(data):
        made, stops = tiktoken_file.tokenizer_json(data, path), tiktoken_file.STOPS
    else:
        made = sentencepiece_file.tokenizer_json(data, path, sentencepiece_file.SPECIAL)
        stops = sentencepiece_file.STOPS
    added = json.loads(made)["added_tokens"]
    return made, [token["id"] for token in added if token["content"] in stops]


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; make it a readable file") from error
    if data.startswith(_LFS):
        raise FileError(f"{path}: only git-LFS's pointer to the file; fetch it with `git lfs pull`")
    return data


def _chat_template(checkpoint_dir: Path) -> bytes | None:
    """The chat template: a file, or in `tokenizer_config.json` as a string or named "default"."""
    text = _read(checkpoint_dir / "chat_template.jinja")
    file = checkpoint_dir / "tokenizer_config.json"
    if text is not None or not file.exists():
        return text
    template = read_json(file).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return template.encode("utf-8", "surrogatepass") if isinstance(template, str) else None


def _generation_config(
    checkpoint_dir: Path, config: Mapping[str, object], stops: Sequence[int]
) -> dict[str, object]:
    """The checkpoint's generation config, with the ids in `config.json` and `stops` that end."""
    file = checkpoint_dir / GENERATION_FILE
    generation = read_json(file) if file.exists() else {}
    ids_by_name = {f"{name}_id": config.get(f"{name}_id") for name in NAMES}
    generation = {key: id for key, id in ids_by_name.items() if id is not None} | generation
    eos: list[int] = []
    for name, source in ((file.name, generation), ("config.json", config)):
        ids = source.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if isinstance(token, bool) or not isinstance(token, int):
                raise FileError(
                    f"{checkpoint_dir / name}: eos_token_id is {ids!r}, expected whole numbers; "
                    f"correct it"
                )
            eos.append(token)
    return generation | {"eos_token_id": list(dict.fromkeys([*eos, *stops]))}

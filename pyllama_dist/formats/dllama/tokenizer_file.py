"""Reads distributed-llama's tokenizer files (`.t`): pieces of bytes with scores, no rules.

After a header of int32 keys and values come the chat template, the ids that end an answer, and the
pieces: float32 score, uint32 length, bytes. All numbers are little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from pyllama_dist.errors import FileError
from pyllama_dist.files import one_line

MAGIC, OLD_MAGIC = 0x567124, 0x567123
VERSION, VOCAB_SIZE, MAX_TOKEN_LENGTH, BOS_ID, EOS_ID, PAD_ID = range(6)
CHAT_EOS_ID, CHAT_TEMPLATE, CHAT_STOP, N_EOS_TOKENS, ADD_BOS = range(6, 11)

FILE_LIMIT = 256 << 20  # bytes; Llama 3's file has 2 MB
TEXT_LIMIT = 1 << 20  # bytes of the chat template
EOS_LIMIT = 1024
_OLD_KEYS = (VOCAB_SIZE, MAX_TOKEN_LENGTH, BOS_ID, EOS_ID, PAD_ID)


@dataclass(frozen=True)
class TokenizerFile:
    """What a `.t` file holds.

    Attributes:
        path: of the file.
        pieces: the bytes of each token.
        scores: of each token; of two merges the one with the higher score comes first.
        bos_id: the token that begins a text, None if there is none.
        eos_ids: tokens that end an answer.
        add_bos: whether a text begins with `bos_id`.
        chat_template: source of a Jinja template, None if there is none.
    """

    path: Path
    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None

    @classmethod
    def open(cls, path: Path) -> "TokenizerFile":
        """Reads a file.

        Raises:
            FileError: the file is missing, damaged or of another kind.
        """
        try:
            with path.open("rb") as file:
                data = file.read(FILE_LIMIT + 1)
        except OSError as error:
            raise FileError(
                f"{path} cannot be read: {error.strerror or one_line(error)}; give a tokenizer file"
            ) from None
        if len(data) > FILE_LIMIT:
            raise FileError(f"{path} is larger than {FILE_LIMIT:,} bytes; it is no tokenizer file")
        try:
            return _read(path, _Bytes(data))
        except _DamagedError as error:
            raise FileError(f"{path}: {error}; make or download the file again") from None


class _DamagedError(Exception):
    """What is wrong with the file."""


class _Bytes:
    """The file's bytes, taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise _DamagedError(f"it ends at byte {len(self._data)}, in the middle of {what}")
        self._at += size
        return self._data[self._at - size : self._at]

    def ints(self, count: int, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", self.take(4 * count, what))


def _read(path: Path, data: _Bytes) -> TokenizerFile:
    pairs = _header(data)
    fields = dict(pairs)
    vocab_size, longest = fields.get(VOCAB_SIZE, 0), fields.get(MAX_TOKEN_LENGTH, 0)
    n_eos, template_size = fields.get(N_EOS_TOKENS, 0), fields.get(CHAT_TEMPLATE, 0)
    # The smallest piece takes nine bytes: this also bounds what is allocated below.
    _bounded("vocab_size", vocab_size, 1, data.left // 9)
    _bounded("max_token_length", longest, 1, FILE_LIMIT)
    _bounded("n_eos_tokens", n_eos, 0, EOS_LIMIT)
    _bounded("the size of the chat template", template_size, 0, TEXT_LIMIT)
    template = _text(data.take(template_size, "the chat template")) if template_size else None
    legacy = [value for key, value in pairs if key in (EOS_ID, CHAT_EOS_ID) and value >= 0]
    eos_ids = (*legacy, *data.ints(n_eos, "the ids that end an answer"))
    for id in eos_ids:
        _bounded("an id that ends an answer", id, 0, vocab_size - 1)
    bos_id = fields.get(BOS_ID, -1)
    _bounded("bos_id", bos_id, -1, vocab_size - 1)
    pieces, scores = [], []
    for id in range(vocab_size):
        score, length = struct.unpack("<fI", data.take(8, f"token {id}"))
        if not math.isfinite(score):
            raise _DamagedError(f"the score of token {id} is {score}")
        _bounded(f"the length of token {id}", length, 1, longest)
        scores.append(score)
        pieces.append(data.take(length, f"token {id}"))
    if data.left:
        raise _DamagedError(f"{data.left} bytes follow its {vocab_size} tokens")
    return TokenizerFile(
        path=path,
        pieces=tuple(pieces),
        scores=tuple(scores),
        bos_id=bos_id if bos_id >= 0 else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        # Files from before the key are of models that all take it.
        add_bos=bos_id >= 0 and fields.get(ADD_BOS, 1) != 0,
        chat_template=template,
    )


def _header(data: _Bytes) -> list[tuple[int, int]]:
    """Keys and values, in order."""
    (magic,) = data.ints(1, "the header")
    if magic == OLD_MAGIC:
        return list(zip(_OLD_KEYS, data.ints(len(_OLD_KEYS), "the header"), strict=True))
    if magic != MAGIC:
        raise _DamagedError("it is no tokenizer file of distributed-llama")
    (size,) = data.ints(1, "the header")
    _bounded("the size of its header", size, 8, 8 + 8 * 64)
    if size % 8:
        raise _DamagedError(f"its header has {size} bytes, not a whole number of pairs")
    values = data.ints((size - 8) // 4, "the header")
    pairs = list(zip(values[::2], values[1::2], strict=True))
    fields = dict(pairs)
    unknown = fields.keys() - range(11)
    if unknown:
        raise _DamagedError(f"header key {min(unknown)} is not known")
    if fields.get(VERSION) != 1:
        raise _DamagedError(f"its version is {fields.get(VERSION)}, not 1")
    stop = fields.get(CHAT_STOP, 0)
    _bounded("chat_stop", stop, 0, TEXT_LIMIT)
    data.take(stop, "chat_stop")  # has no meaning any more
    return pairs


def _bounded(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _DamagedError(f"{what} is {value}, not from {low} to {high}")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _DamagedError(f"its chat template is not UTF-8 at byte {error.start}") from None

"""What a tokenizer needs of a vocabulary, and the vocabularies of the tokenizers library."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol

from pyllama_dist.text.detokenize import byte_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """Plain text to ids, and an id to bytes; special tokens are none of its business."""

    @property
    def size(self) -> int:
        """One more than the highest id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of text without lone surrogates."""
        ...

    def piece(self, token: int, first: bool) -> bytes:
        """What a token adds to a text, nothing if unknown; `first` if no token came before it."""
        ...


class LibraryVocabulary:
    """A `tokenizer.json`, read by the tokenizers library."""

    def __init__(self, library: "Library", decoders: Collection[str]) -> None:
        """`library` knows no added tokens and has no post-processor; `decoders` are its types."""
        self.size = 1 + max(library.get_vocab().values(), default=-1)
        self._library = library
        self._alphabet = byte_alphabet() if "ByteLevel" in decoders else None
        self._byte_fallback = "ByteFallback" in decoders

    def encode(self, text: str) -> list[int]:
        """Ids of text without lone surrogates."""
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int, first: bool) -> bytes:
        """What a token adds to a text, nothing if unknown; `first` if no token came before it."""
        name = self._library.id_to_token(token) if 0 <= token < self.size else None
        if name is None:
            return b""
        if self._alphabet is not None:
            if all(char in self._alphabet for char in name):
                return bytes(self._alphabet[char] for char in name)
            return name.encode()
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(match[1])
        # SentencePiece decoders drop the space before the first word: a later token is what it adds
        # to the text of itself.
        once = self._library.decode([token])
        return (once if first else self._library.decode([token, token])[len(once) :]).encode()

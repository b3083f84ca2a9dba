"""What a tokenizer needs of a vocabulary, and the vocabularies of the tokenizers library."""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from pyllama_dist.text.detokenize import byte_alphabet

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(Protocol):
    """Plain text to ids, and an id to bytes; special tokens are none of its business."""

    @property
    def size(self) -> int:
        """One more than the highest id."""
        ...

    def normalize(self, text: str) -> str:
        """What the rules of normalization make of a text without lone surrogates."""
        ...

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of normalized text; `first` if the whole text begins with it."""
        ...

    def piece(self, token: int, first: bool) -> bytes:
        """What a token adds to a text, nothing if unknown; `first` if no token came before it."""
        ...


class LibraryVocabulary:
    """A `tokenizer.json`, read by the tokenizers library."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Makes the library's tokenizer.

        Args:
            fields: of `tokenizer.json`; added tokens and post-processors are not used.

        Raises:
            Exception: the library does not take them. It raises this very class.
        """
        from tokenizers import Tokenizer as Library

        plain = {
            **fields,
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,  # saved by training scripts; it would cut prompts
            "padding": None,
        }
        self._library = Library.from_str(json.dumps(plain))
        self._normalizer = self._library.normalizer
        self._library.normalizer = None
        # `prepend_scheme: first` puts a space before the first word of the whole text only.
        self._later = self._library
        later = _never_first(fields.get("pre_tokenizer"))
        if later != fields.get("pre_tokenizer"):
            self._later = Library.from_str(
                json.dumps({**plain, "pre_tokenizer": later, "normalizer": None})
            )
        decoders = _types(fields.get("decoder"))
        self.size = 1 + max(self._library.get_vocab().values(), default=-1)
        self._alphabet = byte_alphabet() if "ByteLevel" in decoders else None
        self._byte_fallback = "ByteFallback" in decoders

    def name(self, token: int) -> str | None:
        """The library's name of an id, None if it has none."""
        name: str | None = self._library.id_to_token(token)
        return name

    def normalize(self, text: str) -> str:
        """What the rules of normalization make of a text without lone surrogates."""
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def encode(self, text: str, first: bool) -> list[int]:
        """Ids of normalized text; `first` if the whole text begins with it.

        The library tells where text begins before normalization; here it is after. They differ
        where `prepend_scheme: first` meets a normalizer that cuts or adds what begins a text.
        """
        library = self._library if first else self._later
        return list(library.encode(text, add_special_tokens=False).ids)

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


def _never_first(part: object) -> object:
    """A pre-tokenizer of tokenizer.json for text that does not begin the whole text."""
    match part:
        case {"type": "Sequence", "pretokenizers": [*parts], **rest}:
            parts = [_never_first(one) for one in parts]
            return {"type": "Sequence", "pretokenizers": parts, **rest}
        case {"type": "Metaspace", "prepend_scheme": "first", **rest}:
            return {"type": "Metaspace", "prepend_scheme": "never", **rest}
    return part


def _types(decoder: object) -> set[str]:
    """The types of the decoders in the `decoder` of tokenizer.json."""
    if not isinstance(decoder, dict):
        return set()
    parts = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*map(_types, parts))

"""Token ids back to text, one token at a time."""

import codecs
from collections.abc import Callable


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in the vocabulary of a byte-level BPE.

    Printable bytes of Latin-1 stand for themselves, the other 68 are U+0100 and up in order
    (GPT-2's `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


class DetokenizeStream:
    """Text of a growing sequence of tokens, released as soon as it is whole characters.

    Works on bytes: `piece(id, first)` gives a token's bytes, None when it is not to be printed, and
    an incremental UTF-8 decoder holds an unfinished character back. Bytes that can no longer
    become a character give U+FFFD at once, as in decoding all bytes together. The tokenizers
    library's `DecodeStream` (0.23) has no flush, and after an invalid byte it withholds all text up
    to the next valid character.
    """

    def __init__(self, piece: Callable[[int, bool], bytes | None]) -> None:
        self._piece = piece
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        data = self._piece(token, self._first)
        if data is None:
            return ""
        self._first = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was never finished."""
        return self._utf8.decode(b"", final=True)

"""Vocabularies whose merges are given by scores: those of distributed-llama's `.t` files.

Of all neighbours whose joined bytes are a piece, those with the highest score are joined, the
leftmost if several have it, until none are left. No rule cuts the text into words first.
The tokenizers library cannot do this exactly: each of its merges has a rank of its own, but here
`a`+`ba` and `ab`+`a` have the same.
"""

import heapq
import re
from collections import Counter
from collections.abc import Collection, Sequence

from pyllama_dist.errors import UsageError

# What is a mark, not text, beside bos and eos.
_MARK = re.compile(rb"<(?:\||\xef\xbd\x9c).+(?:\||\xef\xbd\x9c)>", re.DOTALL)
_SENTENCEPIECE_MARKS = (b"<unk>", b"<s>", b"</s>", b"<pad>")


class ScoredVocabulary:
    """Pieces of bytes with scores.

    Attributes:
        size: number of pieces.
        special: ids that no plain text gives.
        hidden: those of `special` that are marks, not text (`<think>` is text).
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        scores: Sequence[float],
        bos_id: int | None,
        eos_ids: Collection[int],
    ) -> None:
        self.size = len(pieces)
        self._pieces = tuple(pieces)
        counts = Counter(piece for piece in pieces if len(piece) == 1)
        # Byte-level BPE starts from bytes, each of which is a piece once. SentencePiece starts from
        # characters; it has bytes too, as the last resort: of two equal pieces they are the first.
        self._byte_level = len(counts) == 256 and set(counts.values()) == {1}
        marks = {id for id, piece in enumerate(pieces) if self._is_mark(piece)}
        named = {*eos_ids, *(() if bos_id is None else (bos_id,))}
        # Converters of byte-level BPE put special tokens last, and bos is the first of them.
        last_byte = max((id for id, piece in enumerate(pieces) if len(piece) == 1), default=-1)
        if self._byte_level and bos_id is not None and bos_id > last_byte:
            self.special = frozenset(range(bos_id, self.size)) | named
        else:
            self.special = frozenset(marks | named)
        self.hidden = self.special & (marks | named)
        regular = [(piece, id) for id, piece in enumerate(pieces) if id not in self.special]
        self._ids = dict(regular)
        self._scores = {piece: scores[id] for piece, id in self._ids.items()}
        self._unknown = next((id for id, piece in enumerate(pieces) if piece == b"<unk>"), None)

    def _is_mark(self, piece: bytes) -> bool:
        # In byte-level BPE, `<s>` is what HTML and its readers make of it.
        known = not self._byte_level and piece in _SENTENCEPIECE_MARKS
        return known or _MARK.fullmatch(piece) is not None

    def piece(self, token: int, first: bool) -> bytes:
        """The bytes of a token, nothing if unknown; the same wherever it is."""
        return self._pieces[token] if 0 <= token < self.size else b""

    def normalize(self, text: str) -> str:
        """The text as it is: these vocabularies have no normalizer."""
        return text

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of text without lone surrogates, in time n log n; the same wherever it is.

        Raises:
            UsageError: the vocabulary has neither a character nor its bytes.
        """
        return [self._id(symbol) for symbol in self._merged(self._symbols(text))]

    def _symbols(self, text: str) -> list[bytes]:
        if self._byte_level:
            return [bytes([byte]) for byte in text.encode()]
        symbols: list[bytes] = []
        for char in text:
            data = char.encode()
            symbols += [data] if data in self._ids else [bytes([byte]) for byte in data]
        return symbols

    def _id(self, symbol: bytes) -> int:
        found = self._ids.get(symbol, self._unknown)
        if found is None:
            raise UsageError(f"the tokenizer has no token for {symbol!r}; leave it out")
        return found

    def _merged(self, symbols: list[bytes]) -> list[bytes]:
        """The symbols after all merges. A merged symbol takes its left one's place."""
        left = list(range(-1, len(symbols) - 1))
        right = list(range(1, len(symbols) + 1))
        heap: list[tuple[float, int, int]] = []  # -score, place, length: best and leftmost first

        def offer(place: int) -> None:
            after = right[place]
            if after < len(symbols):
                joined = symbols[place] + symbols[after]
                score = self._scores.get(joined)
                if score is not None:
                    heapq.heappush(heap, (-score, place, len(joined)))

        for place in range(len(symbols)):
            offer(place)
        while heap:
            _, place, length = heapq.heappop(heap)
            after = right[place]
            # An offer is stale once one of its symbols was merged: lengths tell, they only grow.
            if not symbols[place] or after >= len(symbols):
                continue
            if len(symbols[place]) + len(symbols[after]) != length:
                continue
            symbols[place] += symbols[after]
            symbols[after] = b""
            right[place] = right[after]
            if right[after] < len(symbols):
                left[right[after]] = place
            offer(place)
            if left[place] >= 0:
                offer(left[place])
        return [symbol for symbol in symbols if symbol]

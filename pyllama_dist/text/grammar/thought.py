"""Grammars for models that think first: the grammar holds for the answer, not for the thought.

The prompt may have opened the thought already, or the model may open it, or it answers at once. A
thought ends with `</think>`, with a tool call that the grammar allows, or when its budget is spent:
then the tokens of `</think>` are forced. The tags may be tokens, or ordinary text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from pyllama_dist.text.grammar.matcher import U32, Grammar, Matcher
from pyllama_dist.text.thinking import CLOSE, OPEN
from pyllama_dist.text.tokenizer import Tokenizer

_CLOSE = CLOSE.encode()
# A token that ends the tag and begins the answer would escape the grammar.
_JOINS_ANSWER = re.compile(re.escape(_CLOSE[-1:]) + rb"\s*\S")


@dataclass(frozen=True)
class ThinkTags:
    """How a tokenizer writes the tags of a thought.

    Attributes:
        vocab_size: of the tokenizer.
        openings: the ways in which a model opens a thought, as tokens.
        close: the tokens that end one.
        pieces: the bytes of each token where the closing tag is ordinary text, else none.
        every: a mask of all tokens but those that end an answer.
        clean: a mask of those of them that do not both end the tag and begin the answer.
    """

    vocab_size: int
    openings: tuple[tuple[int, ...], ...]
    close: tuple[int, ...]
    pieces: tuple[bytes, ...]
    every: U32
    clean: U32

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ThinkTags":
        """The tags of a tokenizer; where they are text, it looks at all tokens once."""
        size = tokenizer.vocab_size

        def tokens(tag: str) -> tuple[int, ...]:
            added = tokenizer.added.get(tag)
            known = added is not None and added.id < size
            return (added.id,) if added is not None and known else tuple(tokenizer.encode(tag))

        opening, close = tokens(OPEN), tokens(CLOSE)
        added = tokenizer.added.get(CLOSE)
        single = added is not None and close == (added.id,)
        pieces = () if single else tuple(map(tokenizer.token_bytes, range(size)))
        every = _bits(size, range(size)) & ~_bits(size, tokenizer.eos_ids)
        joining = (token for token, piece in enumerate(pieces) if _JOINS_ANSWER.search(piece))
        clean = every & ~_bits(size, joining)
        line_break = tuple(tokenizer.encode("\n"))
        return cls(size, (opening, line_break + opening), close, pieces, every, clean)


class AfterThought:
    """Says which tokens may come next; a guide of one generation, as `Matcher` is."""

    def __init__(
        self, tags: ThinkTags, grammar: Grammar | None, *, opened: bool, budget: int | None = None
    ) -> None:
        """A guide of a new reply.

        Args:
            tags: of the model's tokenizer.
            grammar: of the answer; None: the answer is free.
            opened: whether the prompt ends in an open thought.
            budget: tokens of the thought before it is ended; None: any number.

        Raises:
            UsageError: as `Grammar.start`.
        """
        self._tags, self._grammar, self._budget = tags, grammar, budget
        self._answer: Matcher | None = None if grammar is None else grammar.start()
        self._call = None if grammar is None else grammar.call_token
        self._openings = tags.openings
        self._thought = 0  # tokens
        self._tail = b""  # of the thought
        self._forced: tuple[int, ...] = ()
        self._stage = _Stage.START
        if opened:
            self._think()

    def mask(self) -> U32 | None:
        """The tokens that may come next, as `Matcher.mask`; None: all may.

        Raises:
            UsageError: as `Matcher.mask`.
        """
        size = self._tags.vocab_size
        if self._stage is _Stage.CLOSING:
            return _bits(size, self._forced[:1])
        if self._stage is _Stage.THOUGHT:
            return self._thought_mask()
        if self._stage is _Stage.ANSWER or self._grammar is None:
            return None if self._answer is None else self._answer.mask()
        if self._tags.pieces and self._answer is not None:
            return self._answer.mask()  # a model that thinks of itself has the tags as tokens
        begun = _bits(size, (opening[0] for opening in self._openings))
        return begun if self._answer is None else self._answer.mask() | begun

    def accept(self, token: int) -> None:
        """Tells the token that was chosen.

        Raises:
            UsageError: the mask did not allow it.
        """
        match self._stage:
            case _Stage.START:
                self._start(token)
            case _Stage.THOUGHT:
                self._continue(token)
            case _Stage.CLOSING:
                self._forced = self._forced[1:]
                if not self._forced:
                    self._stage = _Stage.ANSWER
            case _Stage.ANSWER if self._answer is not None:
                self._answer.accept(token)

    @property
    def thinking(self) -> bool:
        """Whether the tokens of a thought come."""
        return self._stage in (_Stage.THOUGHT, _Stage.CLOSING)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end of the answer."""
        answer = self._answer if self._stage is _Stage.ANSWER else None
        return answer is not None and answer.finished

    def copy(self) -> "AfterThought":
        """A guide for another generation that has begun in the same way."""
        made = AfterThought.__new__(AfterThought)
        made.__dict__.update(self.__dict__)
        made._answer = None if self._answer is None else self._answer.copy()
        return made

    def _start(self, token: int) -> None:
        left = tuple(opening[1:] for opening in self._openings if opening[0] == token)
        if () in left:
            if self._grammar is not None:  # what came so far is none of the answer
                self._answer = self._grammar.start()
            self._think()
            return
        self._openings = left
        if not left:
            self._stage = _Stage.ANSWER
        if self._answer is not None:
            if left and not self._answer.allows(token):
                self._answer = None
            else:
                self._answer.accept(token)

    def _think(self) -> None:
        self._stage = _Stage.THOUGHT
        self._spend()

    def _continue(self, token: int) -> None:
        self._thought += 1
        if token == self._call and self._answer is not None and self._answer.allows(token):
            self._stage = _Stage.ANSWER
            self._answer.accept(token)
        elif self._closes(token):
            self._stage = _Stage.ANSWER
        else:
            self._spend()

    def _spend(self) -> None:
        if self._budget is not None and self._thought >= self._budget:
            self._stage, self._forced = _Stage.CLOSING, self._tags.close

    def _closes(self, token: int) -> bool:
        if not self._tags.pieces:
            return (token,) == self._tags.close
        piece = self._tags.pieces[token] if token < len(self._tags.pieces) else b""
        self._tail += piece
        found = _CLOSE in self._tail
        self._tail = self._tail[-len(_CLOSE) + 1 :]
        return found

    def _thought_mask(self) -> U32 | None:
        if self._grammar is None:
            return None
        # A thought that ends the reply would leave no answer.
        begun = any(self._tail.endswith(_CLOSE[:size]) for size in range(1, len(_CLOSE)))
        # A reply's reader takes it for a call, wherever it comes.
        call, answer = self._call, self._answer
        if call is None or answer is None or answer.allows(call):
            return self._tags.clean if begun else self._tags.every
        mask = (self._tags.clean if begun else self._tags.every).copy()
        mask[call >> 5] &= ~np.uint32(1 << (call & 31))
        return mask


class _Stage(Enum):
    START = auto()  # a thought may be opened, or the answer begins
    THOUGHT = auto()
    CLOSING = auto()  # the thought's end is forced
    ANSWER = auto()


def _bits(vocab_size: int, tokens: Iterable[int]) -> U32:
    """A mask of [ceil(vocab / 32)] uint32 that allows these tokens."""
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    ids = np.fromiter(tokens, np.int64)
    np.bitwise_or.at(mask, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return mask

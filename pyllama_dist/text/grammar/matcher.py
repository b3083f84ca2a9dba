"""A grammar, and how far a generation has come in it."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import UsageError
from pyllama_dist.text.grammar.checker import MAX_GRAMMAR_SIZE, MAX_LEXER_STATES
from pyllama_dist.text.grammar.library import library

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_QUOTED = re.compile(r"\n +1 \| ")  # what follows is the source

U32 = npt.NDArray[np.uint32]


class Matcher:
    """Says which tokens may come next in one generation; for one thread at a time."""

    def __init__(self, library_matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = library_matcher, vocab_size

    def mask(self) -> U32:
        """The tokens that may come next.

        Tokens that end an answer are among them where the grammar allows an end.

        Returns:
            [ceil(vocab / 32)] uint32: bit i % 32 of word i // 32 is set if token i may come.

        Raises:
            UsageError: the grammar has become too complex.
        """
        mask = np.zeros(-(-self._vocab_size // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Tells the token that was chosen.

        Raises:
            UsageError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._check()

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        return self._matcher.validate_tokens([token]) == 1

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end of the answer."""
        return self._matcher.is_stopped()

    def copy(self) -> "Matcher":
        """A matcher for another generation that has begun in the same way."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise grammar_error(self._matcher.get_error())


@dataclass(frozen=True)
class Grammar:
    """A checked grammar for the answers of one model.

    Attributes:
        source: in the dialect of Lark that llguidance reads.
        call_token: the token that begins a tool call, None if the tokenizer has none.
        vocab_size: of the tokenizer.
    """

    source: str
    call_token: int | None
    vocab_size: int
    tokenizer: "LLTokenizer"

    def start(self) -> Matcher:
        """A matcher for a new answer; takes about a millisecond.

        Raises:
            UsageError: the grammar does not suit the tokenizer.
        """
        module = library()
        limits = module.LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            verbose_errors=False,  # they would tell what was generated
        )
        found = module.LLMatcher(self.tokenizer, self.source, log_level=0, limits=limits)
        if found.is_error():
            raise grammar_error(found.get_error())
        return Matcher(found, self.vocab_size)


def grammar_error(said: str) -> UsageError:
    """An error of the library's, without the source that it quotes."""
    told = " ".join(_QUOTED.split(said)[0].replace("<non-verbose/>", "").split())[:300]
    if told == "NoExtensionBias":
        told = "no text satisfies it"
    return UsageError(f"the grammar cannot be used: {told}; change or simplify the schema")

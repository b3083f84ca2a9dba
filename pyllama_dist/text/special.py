"""Keeps special strings in people's text from becoming special tokens.

A chat template writes its own `<|user|>` and pastes in what people wrote. Once both are one
string, a `<|user|>` that somebody typed looks exactly like one that the template wrote, and would
let a message, a web page or a tool's result speak as another role. So before rendering, every such
string in the contents is broken by a noncharacter after its first character, and `Rendered` keeps
the text with these marks: what is whole was written by the template. The marks are dropped when
the text is cut into tokens and whenever it is shown.

U+FDD0 is a noncharacter: Unicode reserves it for a program's internal use, so no text to be
exchanged contains it, and templates neither strip it as white space nor escape it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MARK = "\ufdd0"
SIGN = "\ufdd1"  # before a whole special string while the text around it is normalized


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation in which only the template's own special strings are whole."""

    marked: str

    @property
    def text(self) -> str:
        """The text as people may see it, without marks."""
        return unmarked(self.marked)


def unmarked(text: str) -> str:
    """`text` without marks and signs."""
    return text.replace(MARK, "").replace(SIGN, "")


def well_formed(text: str) -> str:
    """`text` with halves of surrogate pairs joined, and U+FFFD for each lone one.

    A terminal hands over bytes that are not UTF-8 as lone surrogates; no tokenizer takes them.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Breaker:
    """Breaks the given special strings wherever they occur in a value."""

    def __init__(self, strings: Iterable[str]) -> None:
        found = sorted(filter(None, strings), key=len, reverse=True)
        whole = "|".join(map(re.escape, found))
        # The lookahead finds overlapping occurrences too: each loses its first character.
        self._start = re.compile(f"(?=(?:{whole}))(.)", re.DOTALL) if found else None
        # A beginning of letters alone is left: every role and key would have to be broken with it.
        self._beginnings = tuple(
            {text[:n] for text in found for n in range(1, len(text)) if not text[:n].isalpha()}
        )

    def text(self, text: str) -> str:
        """`text` with a mark in every special string, and after the beginning of one at its end.

        The end matters because templates join the parts of a message: `<|us` and `er|>`.
        """
        text = unmarked(well_formed(text))
        if self._start is not None:
            text = self._start.sub(rf"\1{MARK}", text)
        body = text.rstrip()
        return body + MARK + text[len(body) :] if body.endswith(self._beginnings) else text

    def value(self, value: object) -> object:
        """A copy of a JSON-like value with every string in it broken."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

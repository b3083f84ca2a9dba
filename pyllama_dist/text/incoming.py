"""The text of a reply that has come and is not parsed yet, with the tags in it.

Parsers are generators that read from it. Where what they need has not come, they yield None, and go
on when more is there: `yield from` makes a parser of smaller ones. What a parser gives so depends
on the text alone, never on how it was cut into tokens.

A tag (`<think>`, `<tool_call>`) is found by its token's id where the tokenizer has a token for it:
the same letters spelled with ordinary tokens are text. Such a tag is one lone surrogate in the
text here, which no UTF-8 decoder ever gives. A tag without a token is found by its letters.
"""

import re
from collections.abc import Generator, Iterable, Mapping
from typing import TypeAlias, TypeVar

from pyllama_dist.text.added_tokens import AddedToken

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]
_SURROGATES = range(0xD800, 0xE000)


class Incoming:
    """Text between the tokens that come and the parsers that take it.

    Attributes:
        ended: nothing more will come.
        cut: the model would have gone on; only where it has ended.
    """

    def __init__(self, added: Mapping[str, AddedToken], tags: Iterable[str]) -> None:
        """`added` are the tokenizer's added tokens by text, `tags` all that will be looked for."""
        self.ended = self.cut = False
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._sought: dict[str, str] = {}  # tag: what stands for it in the text
        self._tokens: dict[int, tuple[str, str]] = {}  # id: what stands for it, its text
        self._shown: dict[int, str] = {}
        self._patterns: dict[tuple[str, ...], re.Pattern[str]] = {}
        for code, tag in zip(_SURROGATES, dict.fromkeys(tags), strict=False):
            self._sought[tag] = tag
            if (token := added.get(tag)) is not None:
                self._sought[tag] = chr(code)
                self._tokens[token.id] = chr(code), tag
                self._shown[code] = "" if token.special else tag

    def push(self, token: int, text: str) -> None:
        """Adds a token; `text` is what the detokenizer gave for it."""
        if token in self._tokens:
            stands, tag = self._tokens[token]
            text = text.removesuffix(tag) + stands  # before it: an unfinished character
        self._add(text)

    def finish(self, text: str, cut: bool) -> None:
        """Adds the last text, which belongs to no token."""
        self._add(text)
        self.ended, self.cut = True, cut

    def _add(self, text: str) -> None:
        keep = self._at if self._mark is None else self._mark
        self._text = self._text[keep:] + text
        self._at -= keep
        if self._mark is not None:
            self._mark = 0

    def is_token(self, tag: str) -> bool:
        """Whether a tag is found by its token."""
        return self._sought[tag] != tag

    def shown(self, text: str) -> str:
        """`text` with tags as people see them: special tokens not at all."""
        return text.translate(self._shown)

    def shown_tag(self, tag: str) -> str:
        """What people see of a tag that turned out to be none."""
        return self.shown(self._sought[tag])

    # --- what may prove to be something else

    def mark(self) -> None:
        """Keeps all from here, until it is clear what it is."""
        self._mark = self._at

    def rewind(self) -> None:
        """Goes back to the mark."""
        assert self._mark is not None
        self._at, self._mark = self._mark, None

    def unmark(self) -> None:
        """Goes on from here."""
        self._mark = None

    # --- reading

    def until(self, *tags: str) -> tuple[str, str | None]:
        """Takes the text before the first of `tags`, and the tag.

        Returns:
            The text that has come, without an end that may still become a tag; and the tag, None if
            it has not come.
        """
        found = self._pattern(tags).search(self._text, self._at)
        if found:
            text = self._text[self._at : found.start()]
            self._at = found.end()
            return self.shown(text), tags[(found.lastindex or 0) - 1]
        text = self._text[self._at :]
        text = text[: len(text) - (0 if self.ended else self._begun(text, tags))]
        self._at += len(text)
        return self.shown(text), None

    def _pattern(self, tags: tuple[str, ...]) -> re.Pattern[str]:
        if tags not in self._patterns:
            sought = (self._sought.get(tag, tag) for tag in tags)
            either = "|".join(f"({re.escape(text)})" for text in sought)
            self._patterns[tags] = re.compile(either or r"(?!)")
        return self._patterns[tags]

    def _begun(self, text: str, tags: tuple[str, ...]) -> int:
        """Characters at the end of `text` with which one of `tags` may begin."""
        sought = [self._sought.get(tag, tag) for tag in tags]
        longest = max(map(len, sought), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next(
            (size for size in sizes if any(tag.startswith(text[-size:]) for tag in sought)), 0
        )

    def opening(self, *tags: str) -> Wait[str | None]:
        """Takes the tag that comes next, and white space before it; None if none of `tags` does."""
        while True:
            body = self._text[self._at :].lstrip()
            for tag in tags:
                if body.startswith(self._sought[tag]):
                    self._at = len(self._text) - len(body) + len(self._sought[tag])
                    return tag
            begun = any(self._sought[tag].startswith(body) for tag in tags)
            if self.ended or (body and not begun):
                return None
            yield

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Drops what matches `pattern` here, of what has come."""
        if found := pattern.match(self._text, self._at):
            self._at = found.end()

    def peek(self) -> Wait[str]:
        """The next character, not taken; "" at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def char(self) -> Wait[str]:
        """Takes the next character; "" at the end."""
        char = yield from self.peek()
        self._at += len(char)
        return char

    def solid(self) -> Wait[str]:
        """Takes white space; the next character after it, not taken, or "" at the end."""
        while (char := (yield from self.peek())).isspace():
            self._at += 1
        return char

    def rest(self) -> str:
        """Takes all that has come; tags stand in it as they do here, see `shown`."""
        text = self._text[self._at :]
        self._at = len(self._text)
        return text

    def put_back(self, size: int) -> None:
        """Gives back the last `size` characters of what `rest` gave."""
        self._at -= size

    def put_back_tag(self, tag: str) -> None:
        """Gives back a tag that `until` gave."""
        self._at -= len(self._sought[tag])


def is_tag(char: str) -> bool:
    """Whether a character of the text stands for a tag that is a token."""
    return char != "" and ord(char) in _SURROGATES

"""Finds added tokens in a text, as the tokenizers library does.

An added token lies outside the vocabulary that is merged. The text is cut at added tokens first;
those that are `normalized` are looked for in what the normalizer makes of the rest.
Source of the rules: `AddedVocabulary::find_matches` of the library (0.23).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# White space as Unicode has it; Python counts the separators of ASCII as well.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_SPACES = frozenset(_SPACE)
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """A token outside the BPE vocabulary.

    Attributes:
        id: its id.
        text: what it stands for.
        special: whether it is hidden when decoding.
        normalized: whether it is looked for after normalization.
        lstrip: whether it takes white space before it.
        rstrip: whether it takes white space after it.
        single_word: whether it must not touch a word.
    """

    id: int
    text: str
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Found:
    """A part of a text: an added token, or text between added tokens."""

    start: int
    text: str
    token: AddedToken | None


class Finder:
    """Cuts texts at added tokens."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        """`tokens` are added tokens by what to look for."""
        self._tokens = tokens
        # The leftmost first, of those that begin there the longest, as the library does.
        patterns = sorted(filter(None, tokens), key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, patterns)) if patterns else r"(?!)")

    def parts(self, text: str) -> Iterator[Found]:
        """The parts of a text, in order; none of them is empty."""
        done = 0
        for match in self._any.finditer(text):
            token, (start, stop) = self._tokens[match[0]], match.span()
            if token.single_word and any(
                map(_WORD.match, (text[start - 1 : start], text[stop : stop + 1]))
            ):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip(_SPACE))
            if token.rstrip:
                while text[stop : stop + 1] in _SPACES:
                    stop += 1
            if done < start:
                yield Found(done, text[done:start], None)
            yield Found(start, text[start:stop], token)
            done = stop
        if done < len(text):
            yield Found(done, text[done:], None)

"""Reads JSON from a reply while it comes."""

import json

from pyllama_dist.text.incoming import Incoming, Wait, is_tag


class NoJsonError(Exception):
    """What comes is no JSON, or the reply ends in it."""


class ObjectEnd:
    """Finds where an object or array ends.

    Attributes:
        broken: a tag that is a token has come before the end, outside of strings.
    """

    def __init__(self) -> None:
        self.broken = False
        self._depth = 0
        self._string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Characters of `text`, the next, up to the end or what breaks it; None if in neither."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = char == "\\"
                self._string = char != '"'
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
            elif is_tag(char):
                self.broken = True
                return at
        return None


def string(incoming: Incoming) -> Wait[str]:
    """Takes a string; its value.

    Raises:
        NoJsonError: none comes.
    """
    yield from incoming.solid()
    text = yield from _string_text(incoming)
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise NoJsonError from None
    if not isinstance(value, str):
        raise NoJsonError
    return value


def _string_text(incoming: Incoming) -> Wait[str]:
    text = yield from incoming.char()
    if text != '"':
        raise NoJsonError
    while True:
        char = yield from incoming.char()
        if not char:
            raise NoJsonError
        text += incoming.shown(char)
        if char == "\\":
            text += incoming.shown((yield from incoming.char()))
        elif char == '"':
            return text


def value_text(incoming: Incoming) -> Wait[str]:
    """Takes a value of any type, as it is spelled.

    Raises:
        NoJsonError: none comes.
    """
    first = yield from incoming.solid()
    if first == '"':
        return (yield from _string_text(incoming))
    text = ""
    if first in ("{", "["):
        end = ObjectEnd()
        while True:
            more = incoming.rest()
            size = end.find(more)
            if end.broken or (size is None and incoming.ended):
                raise NoJsonError
            text += incoming.shown(more[:size])
            if size is not None:
                incoming.put_back(len(more) - size)
                return text
            yield
    while (char := (yield from incoming.peek())) and char not in ",}]" and not is_tag(char):
        text += yield from incoming.char()
    if not char or not text.strip():
        raise NoJsonError
    return text.strip()


def key(incoming: Incoming) -> Wait[str | None]:
    """Takes an object's next key and the colon after it; None at the object's end, which is taken.

    Raises:
        NoJsonError: neither comes.
    """
    char = yield from incoming.solid()
    if char == ",":
        yield from incoming.char()
        char = yield from incoming.solid()
    if char == "}":
        yield from incoming.char()
        return None
    name = yield from string(incoming)
    yield from incoming.solid()
    if (yield from incoming.char()) != ":":
        raise NoJsonError
    return name

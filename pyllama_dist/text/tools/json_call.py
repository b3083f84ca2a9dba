"""Calls that are a JSON object: `{"name": "f", "arguments": {...}}`, or with `parameters`."""

import json
from collections.abc import Callable

from pyllama_dist.text.events import CallArguments
from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.tools.format import Arguments, Call
from pyllama_dist.text.tools.json_text import NoJsonError, key, string, value_text
from pyllama_dist.text.tools.raw_object import object_arguments

NAME = "name"
ARGUMENTS = ("arguments", "parameters")
_BEFORE_NAME = (*ARGUMENTS, "id", "type")  # any other key first: it is another object


def json_call(
    incoming: Incoming,
    index: int,
    accepts: Callable[[str], bool],
    around: tuple[str, str] | None = None,
) -> Wait[Call | None]:
    """Reads a call's object up to its name; None, and nothing taken, if no such object comes.

    Args:
        incoming: text of the reply.
        index: the call's number in the reply.
        accepts: whether a name is one.
        around: the tags before and after the object, if there are any.
    """
    incoming.mark()
    try:
        name, given = yield from _name(incoming)
    except NoJsonError:
        name, given = "", None
    if not name or not accepts(name):
        incoming.rewind()
        return None
    incoming.unmark()
    return Call(name, _arguments(incoming, index, given, around))


def _name(incoming: Incoming) -> Wait[tuple[str, str | None]]:
    """Reads members up to the name; and the arguments, where they came before it."""
    given = None
    if (yield from incoming.solid()) != "{":
        raise NoJsonError
    yield from incoming.char()
    while (member := (yield from key(incoming))) != NAME:
        if member not in _BEFORE_NAME:
            raise NoJsonError
        text = yield from value_text(incoming)
        if member in ARGUMENTS:
            given = text
    return (yield from string(incoming)), given


def _arguments(
    incoming: Incoming, index: int, given: str | None, around: tuple[str, str] | None
) -> Arguments:
    """Reads the members after the name; arguments that came before it are `given`."""
    streamed, whole = False, True
    try:
        while (member := (yield from key(incoming))) is not None:
            first = member in ARGUMENTS and given is None and not streamed
            if first and (yield from incoming.solid()) == "{":
                streamed = True
                whole = yield from object_arguments(incoming, index)
                if not whole:
                    break
            else:
                text = yield from value_text(incoming)
                given = text if first else given
    except NoJsonError:
        if incoming.cut and given is None and not streamed:
            return False
    if not streamed:
        yield CallArguments(index, _object(given))
    if around is not None:
        yield from _skip(incoming, *around)
    return whole


def _object(given: str | None) -> str:
    """Arguments that did not come as an object: none, or the JSON text of one in a string."""
    if given is None or given == "null":
        return "{}"
    try:
        inner = json.loads(given, strict=False)
        if isinstance(inner, str) and isinstance(json.loads(inner), dict):
            return inner
    except (ValueError, RecursionError):
        pass
    return given or "{}"


def _skip(incoming: Incoming, start: str, end: str) -> Wait[None]:
    """Drops what is left of a call, up to its last tag or the next call's first."""
    while True:
        _, tag = incoming.until(start, end)
        if tag == start:
            incoming.put_back_tag(start)
        if tag is not None or incoming.ended:
            return
        yield

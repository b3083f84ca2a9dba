"""Calls of GLM-4 and GLM-4-0414: no tags, only the name, a line break and a JSON object.

    get_weather
    {"city": "Berlin"}

Nothing but the declared names tells a call from an answer. The role's token separates calls.
"""

from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.tools.declared import DeclaredTools
from pyllama_dist.text.tools.format import Call
from pyllama_dist.text.tools.raw_object import object_arguments

ROLE = "<|assistant|>"


class GlmBareFormat:
    """See the module."""

    tags = (ROLE,)
    openers = (ROLE,)
    bare = True

    def call(
        self, incoming: Incoming, tools: DeclaredTools, index: int, opener: str | None
    ) -> Wait[Call | None]:
        """A declared name alone on its line, before an object."""
        incoming.mark()
        yield from incoming.solid()
        name = yield from _declared_line(incoming, tools)
        if name is None or not (yield from _object_comes(incoming)):
            incoming.rewind()
            return None
        incoming.unmark()
        return Call(name, object_arguments(incoming, index))


def _declared_line(incoming: Incoming, tools: DeclaredTools) -> Wait[str | None]:
    """Takes a line that is a declared name; None as soon as it can be none."""
    line = ""
    while any(name.startswith(line) for name in tools):
        char = yield from incoming.char()
        if char == "\n":
            return line if line in tools else None
        if not char:
            return None
        line += char
    return None


def _object_comes(incoming: Incoming) -> Wait[bool]:
    """Whether a JSON object begins; takes the white space before it."""
    before = yield from incoming.solid()
    return before == "{"

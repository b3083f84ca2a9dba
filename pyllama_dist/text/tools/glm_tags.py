"""Calls of GLM-4.5 and later: tags around the name, and around each argument.

    <tool_call>name
    <arg_key>key</arg_key>
    <arg_value>value</arg_value>
    </tool_call>

GLM-4.5 and 4.6 write these line breaks, GLM-4.7 and 5 none. A string is written as it is, anything
else as JSON.
"""

import json

from pyllama_dist.text.events import CallArguments
from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.thinking import CLOSE
from pyllama_dist.text.tools.declared import DeclaredTools
from pyllama_dist.text.tools.format import Arguments, Call
from pyllama_dist.text.tools.schema import STRING, typed

START, END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class GlmTagFormat:
    """See the module."""

    tags = (START, END, KEY, KEY_END, VALUE, VALUE_END)
    openers = (START,)
    bare = False

    def call(
        self, incoming: Incoming, tools: DeclaredTools, index: int, opener: str | None
    ) -> Wait[Call | None]:
        """A name up to the first tag or line break; without a name it is no call."""
        incoming.mark()
        yield from incoming.solid()
        name = ""
        while True:
            text, end = incoming.until(*self.tags, CLOSE, "\n")
            name += text
            if end is not None or incoming.ended:
                break
            yield
        if end is not None and end != "\n":
            incoming.put_back_tag(end)
        name = name.strip()
        if not name or (end is None and incoming.cut):
            incoming.rewind()
            return None
        incoming.unmark()
        return Call(name, _arguments(incoming, tools, name, index))


def _arguments(incoming: Incoming, tools: DeclaredTools, name: str, index: int) -> Arguments:
    before = "{"  # what separates the next argument
    while (key := (yield from _key(incoming))) is not None:
        head = f"{before}{json.dumps(key, ensure_ascii=False)}: "
        types = tools.types(name, key)
        if types == STRING:
            yield CallArguments(index, head + '"')
        value = ""
        while True:
            text, end = incoming.until(VALUE_END, END)
            if types != STRING:
                value += text
            elif text:  # escapes of whole characters do not depend on their neighbours
                yield CallArguments(index, json.dumps(text, ensure_ascii=False)[1:-1])
            if end is not None or incoming.ended:
                break
            yield None
        if end is None and incoming.cut:
            return False
        yield CallArguments(index, '"' if types == STRING else head + typed(value, types))
        before = ", "
        if end == END:
            incoming.put_back_tag(END)
    if incoming.cut:
        return False
    yield CallArguments(index, "{}" if before == "{" else "}")
    return True


def _key(incoming: Incoming) -> Wait[str | None]:
    """Takes the next argument's key, and the tag that opens its value; None if no more comes.

    The call's end is taken, the next call's beginning is not.
    """
    key = ""
    inside = False
    while True:
        text, tag = incoming.until(KEY, KEY_END, VALUE, END, START)
        if inside:
            key += text
        match tag:
            case None if incoming.ended:
                return None
            case None:
                yield
            case "<arg_key>":
                key, inside = "", True
            case "</arg_key>":
                inside = False
            case "<arg_value>":
                return key.strip()
            case "</tool_call>":
                return None
            case "<tool_call>":
                incoming.put_back_tag(START)
                return None

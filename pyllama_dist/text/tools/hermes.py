"""Calls of Hermes and Qwen: a JSON object between tags.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Berlin"}}
</tool_call>
"""

from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.tools.declared import DeclaredTools
from pyllama_dist.text.tools.format import Call
from pyllama_dist.text.tools.json_call import json_call

START, END = "<tool_call>", "</tool_call>"


class HermesFormat:
    """See the module."""

    tags = (START, END)
    openers = (START,)
    bare = False

    def call(
        self, incoming: Incoming, tools: DeclaredTools, index: int, opener: str | None
    ) -> Wait[Call | None]:
        """An object with any name."""
        return json_call(incoming, index, bool, (START, END))

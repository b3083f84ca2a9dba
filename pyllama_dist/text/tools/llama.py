"""Calls of Llama 3: a JSON object instead of an answer, maybe after a token.

    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Berlin"}}

Without the token only a declared name tells a call from an answer that is JSON.
"""

from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.tools.declared import DeclaredTools
from pyllama_dist.text.tools.format import Call
from pyllama_dist.text.tools.json_call import json_call

PYTHON = "<|python_tag|>"


class LlamaFormat:
    """See the module."""

    tags = (PYTHON,)
    openers = (PYTHON,)
    bare = True

    def call(
        self, incoming: Incoming, tools: DeclaredTools, index: int, opener: str | None
    ) -> Wait[Call | None]:
        """An object with a declared name; after the token with any name."""
        accepts = tools.__contains__ if opener is None else bool
        return json_call(incoming, index, accepts)

"""How a model's reasoning is told from its answer.

Reasoning models write `<think>...</think>` before the answer. Who opens it differs: GLM-4.7 and
GLM-Z1 find `<think>` at the end of their prompt, so that only `</think>` comes; GLM-4.5 and 4.6
write both. The tags may be tokens of their own, or ordinary text that comes in several pieces.
"""

import re

from pyllama_dist.text.special import Rendered

OPEN, CLOSE = "<think>", "</think>"
# One revision of GLM-Z1's template writes a line break as a backslash and an n.
_OPENED = re.compile(rf"{OPEN}(?:\s|\\n)*\Z")


def opens(prompt: Rendered) -> bool:
    """Whether a prompt ends in a thought that the model goes on with."""
    return _OPENED.search(prompt.marked) is not None

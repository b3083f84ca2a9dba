"""Which format of tool calls a model was trained on, by the text of its chat template."""

import re

from pyllama_dist.text.tools.format import ToolFormat
from pyllama_dist.text.tools.glm_bare import GlmBareFormat
from pyllama_dist.text.tools.glm_tags import GlmTagFormat
from pyllama_dist.text.tools.hermes import HermesFormat
from pyllama_dist.text.tools.llama import LlamaFormat

_ARGUMENTS = re.compile(r"""\\?["']arguments\\?["']\s*:""")  # as written to the model
_PARAMETERS = re.compile(r"""\\?["']name\\?["']\s*:.{1,60}\\?["']parameters\\?["']\s*:""")
_BARE = re.compile("metadata|observation")


def format_of(template_source: str) -> ToolFormat | None:
    """The format that a template teaches; None if it teaches none that is known.

    Args:
        template_source: text of the Jinja template.
    """
    if "<arg_key>" in template_source:
        return GlmTagFormat()
    if "<tool_call>" in template_source:
        # `<function=` is Qwen3-Coder's, which has the same tag around another format.
        known = _ARGUMENTS.search(template_source) and "<function=" not in template_source
        return HermesFormat() if known else None
    if "<|python_tag|>" in template_source or _PARAMETERS.search(template_source):
        return LlamaFormat()
    return GlmBareFormat() if _BARE.search(template_source) else None


def grammar_format_of(template_source: str) -> str | None:
    """What `text.grammar.calls` calls the format that a template teaches; None if it has none."""
    match format_of(template_source):
        case GlmTagFormat():
            # GLM-4.5 and 4.6 break the line before each tag, in the template's text or in its code.
            lines = "\n<arg_key>" in template_source or "\\n<arg_key>" in template_source
            return "glm45" if lines else "glm47"
        case HermesFormat():
            return "hermes"
        case GlmBareFormat():
            return "glm0414"
    return None


def calls_are_messages(template_source: str) -> bool:
    """Whether a template knows no `tool_calls` but a message with `metadata` for each call.

    So GLM-4 and GLM-4-0414: the call is an assistant's message with the name as `metadata`, and the
    role of a result is `observation`.
    """
    return "metadata" in template_source and "tool_calls" not in template_source

"""The body of /v1/responses. Unknown fields are ignored.

Items of the input and tools are objects of many types, of which some are skipped: those that are
used have a class here, which `conversation.py` checks them against.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pyllama_dist.api.requests import Content, Count, Effort, Name, Sampled, Text

_ITEMS, _TOOLS = 1 << 14, 256

Key = Annotated[str, Meta(max_length=512)]
CallId = Annotated[str, Meta(max_length=256)]


class MessageItem(Struct):
    """What somebody has said; an item without a type that has a role is one."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Struct):
    """A call that the model has made; its arguments are the JSON text of an object."""

    call_id: CallId
    name: CallId
    arguments: Text = "{}"


class CallOutputItem(Struct):
    """What a call has given."""

    call_id: CallId
    output: Content


class ReasoningPart(Struct):
    """A part of a thought."""

    text: Text


class ReasoningItem(Struct):
    """What the model has thought."""

    content: Annotated[list[ReasoningPart], Meta(max_length=1024)] | None = None


class PlainFormat(Struct, tag="text"):
    """Any text."""


class ObjectFormat(Struct, tag="json_object"):
    """Any JSON object."""


class SchemaFormat(Struct, tag="json_schema"):
    """JSON in the shape of a schema."""

    name: Name
    schema: dict[str, Any]
    description: Text | None = None
    strict: bool | None = None


class TextSettings(Struct):
    """What the text of an answer must look like."""

    format: PlainFormat | ObjectFormat | SchemaFormat | None = None


class ReasoningSettings(Struct):
    """How much the model shall think."""

    effort: Effort | None = None


class ResponsesRequest(Sampled, kw_only=True):
    """The body of /v1/responses."""

    input: Text | Annotated[list[dict[str, Any]], Meta(max_length=_ITEMS)] | None = None
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    include: Annotated[list[str], Meta(max_length=64)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    thinking_budget: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    # told again in the answer
    metadata: (
        Annotated[
            dict[
                Annotated[str, Meta(max_length=64)],
                Annotated[str, Meta(max_length=512)],
            ],
            Meta(max_length=16),
        ]
        | None
    ) = None
    prompt_cache_key: Key | None = None
    safety_identifier: Key | None = None
    user: Key | None = None
    # what needs a server that keeps answers, or prompts
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

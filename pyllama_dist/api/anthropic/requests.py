"""The bodies of /v1/messages and /v1/messages/count_tokens. Unknown fields are ignored.

Fields are those of Anthropic's client for Python, package `anthropic` 2.14.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from pyllama_dist.api.requests import Count, Share, Text

_MESSAGES, _BLOCKS, _TOOLS, _STOPS = 4096, 1024, 256, 64
_Id = Annotated[str, Meta(max_length=256)]


class Block(Struct):
    """A block of a message's content; which fields it has depends on its type."""

    type: Annotated[str, Meta(max_length=64)]
    text: Text | None = None
    thinking: Text | None = None
    id: _Id | None = None
    name: _Id | None = None
    input: dict[str, Any] | None = None
    tool_use_id: _Id | None = None
    content: "Text | Annotated[list[Block], Meta(max_length=_BLOCKS)] | None" = None
    is_error: bool | None = None


Blocks = Annotated[list[Block], Meta(max_length=_BLOCKS)]


class InputMessage(Struct):
    """One message of a conversation; a tool's results are in the user's."""

    role: Literal["system", "user", "assistant"]
    content: Text | Blocks


class ClientTool(Struct):
    """A tool; those of a type other than `custom` would run on Anthropic's servers."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}$")] | None = None
    type: Annotated[str, Meta(max_length=64)] | None = None
    description: Text | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    """Whether a tool may or must be called, and which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: _Id | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Struct):
    """Whether the model thinks, and for how many tokens."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None


class OutputFormat(Struct):
    """A JSON schema for an answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """What an answer must look like, and how hard the model tries."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Struct, kw_only=True):
    """The body of /v1/messages/count_tokens: what makes the prompt."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=_MESSAGES)]
    model: Annotated[str, Meta(max_length=512)] | None = None
    system: Text | Blocks | None = None
    tools: Annotated[list[ClientTool], Meta(max_length=_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Count
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=_STOPS)]
        | None
    ) = None
    stream: bool | None = None

"""From the messages of a request to the tokens that the model reads, and a parser of its reply."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pyllama_dist.api.errors import bad_request, of_engine
from pyllama_dist.api.requests import ChatRequest, Message, Stops, text_of
from pyllama_dist.api.service import Service
from pyllama_dist.conversation import ModelParts
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.reply import ReplyParser
from pyllama_dist.text.special import Rendered

_RESERVED = {  # what the server writes, and what Jinja and templates call
    *("messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template"),
    *("bos_token", "eos_token", "raise_exception", "strftime_now"),
    *("range", "namespace", "dict", "cycler", "joiner", "lipsum"),
}
_VALUE = 4096  # characters of a template's variable


@dataclass(frozen=True)
class Prompt:
    """What the model reads."""

    tokens: Sequence[int]
    rendered: Rendered | None
    tools: Sequence[Mapping[str, Any]]  # that the model reads of
    may_call: bool = True  # whether what looks like a call is one

    def parser(self, parts: ModelParts, stops: Sequence[str]) -> ReplyParser:
        """What turns the tokens of a reply into events; one for each choice."""
        calls = self.may_call and self.tools
        tool_format = parts.template.tool_format if parts.template and calls else None
        return ReplyParser(self.rendered, parts.tokenizer.added, tool_format, self.tools, stops)


def stop_strings(stops: Stops) -> list[str]:
    """The strings that end an answer."""
    if stops is None:
        return []
    return [stops] if isinstance(stops, str) else list(stops)


def prompt_of(service: Service, body: ChatRequest) -> Prompt:
    """The prompt of a conversation.

    Raises:
        ApiError: the model takes no such conversation.
    """
    parts = service.ready().parts
    messages = [_message(message, number) for number, message in enumerate(body.messages)]
    tools = _tools(body)
    if parts.template is None:
        texts = [str(message["content"]) for message in messages]
        if tools:
            raise bad_request("this model has no chat template, so it takes no tools", "tools")
        return Prompt(parts.tokenizer.encode_raw("\n".join(texts)), None, ())
    variables = {
        name: value for name, value in _variables(body).items() if name in parts.template.reads
    }
    try:
        rendered = parts.template.render(messages, tools=tools or None, variables=variables)
        tokens = parts.tokenizer.encode_template(rendered)
        return Prompt(tokens, rendered, tools, body.tool_choice != "none")
    except PyllamaError as error:
        failed = of_engine(error)
        failed.param = "messages"
        raise failed from None


def _message(message: Message, number: int) -> dict[str, object]:
    place = f"messages[{number}]"
    if message.role == "tool" and message.tool_call_id is None:
        raise bad_request(f"{place} has no tool_call_id", f"{place}.tool_call_id")
    fields = msgspec.to_builtins(message).items()
    given = {name: value for name, value in fields if value is not None}
    return {**given, "content": text_of(message.content, f"{place}.content")}


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    """Functions as templates read them; other kinds of tools are skipped, as Codex needs it."""
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(body.tools or ()):
        if tool.type != "function":
            continue
        if tool.function is None:
            raise bad_request(f"tools[{number}] has no function", f"tools[{number}].function")
        fields = msgspec.to_builtins(tool.function).items()
        given = {name: value for name, value in fields if value is not None and name != "strict"}
        tools.append({"type": "function", "function": given})
    return tools


def _variables(body: ChatRequest) -> dict[str, object]:
    """What the template may read besides: switches for reasoning, in all their spellings."""
    found: dict[str, object] = {}
    if body.reasoning_effort == "none":
        found["enable_thinking"] = False
    elif body.reasoning_effort is not None:
        found["reasoning_effort"] = body.reasoning_effort
    if body.thinking is not None:
        if body.thinking.type is not None:
            found["enable_thinking"] = body.thinking.type == "enabled"
        if body.thinking.clear_thinking is not None:
            found["clear_thinking"] = body.thinking.clear_thinking
    for name, value in (body.chat_template_kwargs or {}).items():
        place = "chat_template_kwargs"
        if name in _RESERVED or not name.isidentifier():
            raise bad_request(f"{place}: {name!r} cannot be set by a request", place)
        if not isinstance(value, str | int | float | bool | None):
            raise bad_request(f"{place}: {name} must be a text, a number or true or false", place)
        if isinstance(value, str) and len(value) > _VALUE:
            raise bad_request(f"{place}: {name} has more than {_VALUE} characters", place)
        found[name] = value
    return found

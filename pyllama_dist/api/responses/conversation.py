"""From the body of /v1/responses to that of /v1/chat/completions.

Reasoning, text and calls of one turn are items of their own here, and one message there, as
templates read it. Items and tools of types that a model without a server's tools cannot use are
skipped: Codex sends them whatever the model is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from pyllama_dist.api.errors import bad_request
from pyllama_dist.api.requests import (
    Call,
    CalledFunction,
    ChatRequest,
    Function,
    Message,
    ResponseFormat,
    Sampled,
    Schema,
    Tool,
    refused,
    text_of,
)
from pyllama_dist.api.responses.requests import (
    CallItem,
    CallOutputItem,
    MessageItem,
    ObjectFormat,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
)

_T = TypeVar("_T")
_ITEMS: Mapping[str, type[MessageItem | CallItem | CallOutputItem | ReasoningItem]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
LOGPROBS = "message.output_text.logprobs"  # in `include`


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """What a chat would be asked.

    Raises:
        ApiError: a field is wrong, or needs a server that keeps answers.
    """
    _refuse_memory(body)
    sampled: dict[str, Any] = {name: getattr(body, name) for name in Sampled.__struct_fields__}
    logprobs = LOGPROBS in (body.include or ())
    return ChatRequest(
        **sampled | {"n": None, "max_tokens": None},
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        tools=[Tool("function", function) for function in functions(body)] or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
        thinking_budget=body.thinking_budget,
    )


def functions(body: ResponsesRequest) -> Sequence[Function]:
    """The tools that the model may call."""
    return [
        _checked(tool, Function, f"tools[{number}]")
        for number, tool in enumerate(body.tools or ())
        if tool.get("type") == "function"
    ]


def _refuse_memory(body: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if getattr(body, name):
            raise bad_request(
                f"{name}: this server keeps no answers, conversations or prompts; "
                "send all of the conversation as input",
                name,
            )


def _checked(value: Mapping[str, Any], kind: type[_T], place: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise refused(error, place) from None


def _messages(body: ResponsesRequest) -> list[Message]:
    given = body.input or ""
    found = _of_items(given) if isinstance(given, list) else [Message("user", given)]
    if not found:
        found = [Message("user", "")]  # templates expect that somebody has said something
    if body.instructions:
        found.insert(0, Message("system", body.instructions))
    return found


def _of_items(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    found: list[Message] = []
    for number, item in enumerate(items):
        place = f"input[{number}]"
        type_ = item.get("type") or ("message" if "role" in item else "item_reference")
        if type_ == "item_reference":
            raise bad_request(
                f"{place} refers to an item, and this server keeps none; send the item", place
            )
        if isinstance(type_, str) and (kind := _ITEMS.get(type_)) is not None:
            _add(found, _checked(item, kind, place), place)
    return found


def _add(
    found: list[Message],
    item: MessageItem | CallItem | CallOutputItem | ReasoningItem,
    place: str,
) -> None:
    """Adds an item to a conversation: to the turn of the model that it belongs to, if to any."""
    match item:
        case MessageItem("assistant", content):
            # Text after a call belongs to the turn of the call; two texts are two turns.
            turn = _turn(found, lambda turn: turn.content is None or turn.tool_calls)
            turn.content = f"{turn.content or ''}{text_of(content, f'{place}.content')}"
        case MessageItem(role, content):
            found.append(Message(role, text_of(content, f"{place}.content")))
        case ReasoningItem(content):
            # One that only its server can read, or none at all, begins no turn.
            if thought := "".join(part.text for part in content or ()):
                turn = _turn(found, lambda turn: not turn.content and not turn.tool_calls)
                turn.reasoning_content = f"{turn.reasoning_content or ''}{thought}"
        case CallItem(call_id, name, arguments):
            turn = _turn(found, lambda turn: True)
            call = Call(CalledFunction(name, arguments), call_id)
            turn.tool_calls = [*(turn.tool_calls or ()), call]
        case CallOutputItem(call_id, output):
            text = text_of(output, f"{place}.output")
            found.append(Message("tool", text, tool_call_id=call_id))


def _turn(found: list[Message], takes: Callable[[Message], object]) -> Message:
    """The turn of the model in which a conversation ends, if it takes more; else a new one."""
    if not found or found[-1].role != "assistant" or not takes(found[-1]):
        found.append(Message("assistant"))
    return found[-1]


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    match body.text and body.text.format:
        case ObjectFormat():
            return ResponseFormat("json_object")
        case SchemaFormat(name, schema, _, strict):
            return ResponseFormat("json_schema", Schema(name, schema=schema, strict=strict))
    return None


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "name": str(name)}:
            return _function(name)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*tools]}:
            names = [
                _function(tool["name"])
                for tool in tools
                if isinstance(tool, dict)
                and tool.get("type") == "function"
                and isinstance(tool.get("name"), str)
            ]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}}
    raise bad_request(
        "tool_choice is none of none, auto, required, {type: function, name} "
        "and {type: allowed_tools, mode, tools}",
        "tool_choice",
    )


def _function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}

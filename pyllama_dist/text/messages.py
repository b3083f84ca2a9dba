"""Messages of OpenAI's API as chat templates read them.

Clients send contents in parts, arguments as text and roles that no template knows. Two generations
of templates read tool calls: as `tool_calls` of a message, or, GLM-4 and GLM-4-0414, as one message
for each call, with the tool's name as `metadata`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyllama_dist.errors import UsageError

Message = Mapping[str, Any]
_TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # type of a part: where its text is


def for_templates(
    messages: Iterable[Message], *, calls_as_messages: bool = False
) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Args:
        messages: as in OpenAI's API; reasoning may be `reasoning_content` or `reasoning`.
        calls_as_messages: the template reads calls as messages with `metadata`.

    Raises:
        UsageError: the arguments of a tool call are no JSON object.
    """
    plain = [_plain(message) for message in messages]
    if calls_as_messages:
        return [message for each in plain for message in _as_messages(each)]
    return [
        message | {"tool_calls": list(map(_with_object, calls))}
        if (calls := _calls(message))
        else message
        for message in plain
    ]


def _plain(message: Message) -> dict[str, Any]:
    """A message with one text as content, and names of fields and roles that templates know."""
    changed = dict(message)
    match message.get("content"):
        case None if "content" in message or message.get("role") in ("assistant", "tool"):
            # Beside tool calls; templates would write "None", or look into it.
            changed["content"] = ""
        case [*parts] if all(isinstance(part, Mapping) for part in parts):
            texts = [part.get(_TEXT_PARTS.get(str(part.get("type")))) for part in parts]
            if None not in texts:
                changed["content"] = "".join(map(str, texts))
    match message.get("role"):
        case "developer":
            changed["role"] = "system"
        case "assistant" if isinstance(changed.get("reasoning"), str):
            reasoning = changed.pop("reasoning")
            if not isinstance(changed.get("reasoning_content"), str):
                changed["reasoning_content"] = reasoning
    return changed


def _calls(message: Message) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list | tuple) else ()


def _as_messages(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message in which calls and results are messages of their own."""
    if message.get("role") == "tool":
        yield message | {"role": "observation"}
        return
    calls = [call.get("function", call) for call in _calls(message) if isinstance(call, Mapping)]
    if not calls or message.get("content"):
        yield {key: value for key, value in message.items() if key != "tool_calls"}
    for call in calls:
        yield {"role": "assistant", "metadata": call.get("name"), "content": _object_text(call)}


def _object_text(call: Mapping[str, Any]) -> str:
    """The arguments of a call as JSON text: where they are text, as the model spelled them."""
    match call.get("arguments"):
        case str(text) if text.strip():
            _object(call.get("name"), text)
            return text
        case Mapping() as arguments:
            return json.dumps(arguments, ensure_ascii=False)
    return "{}"


def _with_object(call: Any) -> Any:
    """A tool call whose arguments are an object, not the JSON text of one."""
    match call:
        case {"function": Mapping() as function}:
            return {**call, "function": _with_object(function)}
        case {"arguments": str(text)}:
            return {**call, "arguments": _object(call.get("name"), text)}
    return call


def _object(name: object, text: str) -> dict[str, Any]:
    """The object that a call's arguments are the JSON text of."""
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UsageError(
            f"the arguments of the tool call {name!r} are no JSON object; "
            "send what the model wrote, or leave the call out"
        )
    return arguments

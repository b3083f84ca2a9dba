"""From the body of a request to the same conversation as /v1/chat/completions takes it."""

from collections.abc import Iterator, Sequence

from pyllama_dist.api.anthropic.requests import (
    Block,
    ClientTool,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    OutputConfig,
    OutputFormat,
    ThinkingConfig,
    ToolChoice,
)
from pyllama_dist.api.errors import ApiError, bad_request
from pyllama_dist.api.requests import (
    Call,
    CalledFunction,
    ChatRequest,
    Function,
    Message,
    ResponseFormat,
    Schema,
    Thinking,
    Tool,
)

# Claude Code's first system text has a hash that changes with each request, and everything after
# it would have to be read again.
_CLIENT_HEADER = "x-anthropic-"


def conversation(body: CountTokensRequest) -> ChatRequest:
    """The conversation that is asked for.

    Raises:
        ApiError: the model takes no such thing; the message names the place.
    """
    messages = list(_system(body.system, "system")) if body.system is not None else []
    for number, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{number}].content")
    choice, output = body.tool_choice, body.output_config or OutputConfig()
    # Whoever does not ask for thoughts expects an answer that begins with text.
    thinking = body.thinking or ThinkingConfig("disabled")
    thinks = thinking.type != "disabled"
    return ChatRequest(
        messages=messages,
        tools=_tools(body.tools or ()),
        tool_choice=_choice(choice),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        response_format=_format(output.format),
        reasoning_effort=output.effort,
        thinking=Thinking("enabled" if thinks else "disabled"),
        thinking_budget=thinking.budget_tokens if thinks else None,
    )


def generation(body: MessagesRequest) -> ChatRequest:
    """The conversation, and how it goes on.

    Raises:
        ApiError: as `conversation`; or there is nothing to answer.
    """
    if body.messages[-1].role == "assistant":
        raise bad_request(
            "the last message is the assistant's, and this server does not continue one; "
            "end with a user's"
        )
    asked = conversation(body)
    asked.max_tokens = body.max_tokens
    asked.temperature, asked.top_p, asked.top_k = body.temperature, body.top_p, body.top_k
    asked.stop = body.stop_sequences
    return asked


def _system(content: str | Sequence[Block], place: str) -> Iterator[Message]:
    texts = [content] if isinstance(content, str) else _texts(content, place)
    if kept := [text for text in texts if text and not text.startswith(_CLIENT_HEADER)]:
        yield Message("system", "\n".join(kept))


def _messages(message: InputMessage, place: str) -> Iterator[Message]:
    """The messages of one: results of tools are messages of their own, before the text."""
    if message.role == "system":
        yield from _system(message.content, place)
        return
    if isinstance(message.content, str):
        yield Message(message.role, message.content)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Call] = []
    results: list[Message] = []
    for number, block in enumerate(message.content):
        here = f"{place}[{number}]"
        match message.role, block:
            case _, Block(type="text", text=str(text)):
                texts.append(text)
            case "user", Block(type="tool_result", tool_use_id=str(id)):
                results.append(Message("tool", _result(block, here), tool_call_id=id))
            case "assistant", Block(type="tool_use", id=str(id), name=str(name), input=dict(input)):
                calls.append(Call(CalledFunction(name, input), id))
            case "assistant", Block(type="thinking", thinking=str(thought)):
                thoughts.append(thought)
            case "assistant", Block(type="redacted_thinking"):
                pass
            case _:
                raise _unreadable(block, here)
    yield from results
    if message.role == "assistant" or texts or not results:
        yield Message(
            message.role,
            "\n".join(texts),
            reasoning_content="\n".join(thoughts) or None,
            tool_calls=calls or None,
        )


def _result(block: Block, place: str) -> str:
    """What a tool said; templates have no place for `is_error`."""
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(_texts(content, f"{place}.content"))
    return f"Error: {text}" if block.is_error else text


def _texts(blocks: Sequence[Block], place: str) -> Iterator[str]:
    for number, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            raise _unreadable(block, f"{place}[{number}]")
        yield block.text


def _unreadable(block: Block, place: str) -> ApiError:
    return bad_request(
        f"{place}: this model cannot read this block of type {block.type!r}; it reads text, "
        "tool_result in a user's message, thinking and tool_use in an assistant's, with all fields",
        place,
    )


def _tools(tools: Sequence[ClientTool]) -> list[Tool]:
    """The client's tools; nobody here runs those that a server would run."""
    found = []
    for number, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            continue
        if tool.name is None:
            raise bad_request(f"tools[{number}] has no name")
        function = Function(tool.name, tool.description, tool.input_schema, tool.strict)
        found.append(Tool("function", function))
    return found


def _format(wanted: OutputFormat | None) -> ResponseFormat | None:
    if wanted is None:
        return None
    return ResponseFormat("json_schema", Schema(schema=wanted.schema))


def _choice(choice: ToolChoice | None) -> str | dict[str, object] | None:
    match choice:
        case None:
            return None
        case ToolChoice("any"):
            return "required"
        case ToolChoice("tool", str(name)):
            return {"type": "function", "function": {"name": name}}
        case ToolChoice("tool"):
            raise bad_request("tool_choice of type tool has no name")
    return choice.type

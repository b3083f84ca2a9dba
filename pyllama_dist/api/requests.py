"""The bodies of requests, checked while they are decoded. Unknown fields are ignored.

Fields are OpenAI's, and those that clients of vLLM and llama-server send besides.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from pyllama_dist.api.errors import ApiError, bad_request

BODY_BYTES = 16 << 20
_MESSAGES, _TOOLS, _STOPS = 4096, 256, 4
_TEXT = 8 << 20  # characters

Text = Annotated[str, Meta(max_length=_TEXT)]
Stops = (
    Annotated[str, Meta(min_length=1, max_length=256)]
    | Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=_STOPS)]
    | None
)
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=10)]  # logits are divided by it
Id = Annotated[int, Meta(ge=0, lt=1 << 31)]
Ids = Annotated[list[Id], Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class StreamOptions(Struct):
    """What a stream carries besides."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Function(Struct):
    """A function that the model may call."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool; those that are no functions are skipped."""

    type: str
    function: Function | None = None


class Part(Struct):
    """A part of a message's content."""

    type: str
    text: Text | None = None
    refusal: Text | None = None


class CalledFunction(Struct):
    """What the model called: arguments are the JSON text of an object."""

    name: Annotated[str, Meta(max_length=256)]
    arguments: Text | dict[str, Any] = "{}"


class Call(Struct):
    """A call in an assistant's message."""

    function: CalledFunction
    id: Annotated[str, Meta(max_length=256)] | None = None
    type: str = "function"


Content = Text | Annotated[list[Part], Meta(max_length=1024)]


class Message(Struct):
    """One message of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[list[Call], Meta(max_length=256)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None


class Schema(Struct):
    """A JSON schema for an answer."""

    name: Annotated[str, Meta(max_length=256)] | None = None
    description: Text | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ResponseFormat(Struct):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema: dict[str, Any] | None = None  # as llama-server takes it, beside json_object


class Thinking(Struct):
    """Z.ai's switch for reasoning."""

    type: Literal["enabled", "disabled"] | None = None
    clear_thinking: bool | None = None


class Sampled(Struct, kw_only=True):
    """What all requests for generated text have."""

    model: Annotated[str, Meta(max_length=512)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Meta(ge=-100, le=100)],
            ],
            Meta(max_length=1024),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stops = None
    stop_token_ids: Annotated[list[Id], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None


class ChatRequest(Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=32)] | None = None
    thinking: Thinking | None = None
    thinking_budget: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    modalities: list[str] | None = None


class CompletionRequest(Sampled, kw_only=True):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Any], Meta(max_length=1 << 20)]  # of texts, ids, or lists of ids
        | None
    ) = None
    suffix: Text | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class TokenizeRequest(Struct):
    """The body of /tokenize, as llama-server's clients and as vLLM's send it."""

    content: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=_MESSAGES)] | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Struct):
    """The body of /detokenize."""

    tokens: Ids


_T = TypeVar("_T")


def decode(body: bytes, kind: type[_T]) -> _T:
    """The request of a body.

    Raises:
        ApiError: it is no JSON, or a field is wrong; `param` says which.
        RecursionError: it is nested too deeply.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise refused(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is no JSON: {error}") from None


def refused(error: msgspec.ValidationError, place: str = "") -> ApiError:
    """What tells which field is wrong; `place` is the path of what was checked."""
    said, _, path = str(error).rpartition(" - at `")
    if not said:
        said, path = str(error), "$`"
    path = path.rstrip("`").removeprefix("$").replace("[...]", "")
    param = (place + path).removeprefix(".") or None
    return bad_request(f"{param or 'the body'}: {said}", param)


def text_of(content: Content | None, place: str) -> str | None:
    """The text of a content, whose parts must all be text.

    Raises:
        ApiError: one is an image, a sound or a file.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "refusal", "input_text", "output_text") or text is None:
            raise bad_request(
                f"a part of type {part.type!r} in {place}: this model reads text only",
                f"{place}[{number}]",
            )
        texts.append(text)
    return "".join(texts)

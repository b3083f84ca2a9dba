"""/v1/messages: a conversation goes on, told as content blocks."""

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256

import msgspec

from pyllama_dist.api.answer import Answer, Piece, Ping
from pyllama_dist.api.anthropic.conversation import conversation, generation
from pyllama_dist.api.anthropic.errors import error_object
from pyllama_dist.api.anthropic.requests import CountTokensRequest, MessagesRequest
from pyllama_dist.api.chat import begin_answer
from pyllama_dist.api.dialect import Dialect, Json, named_event
from pyllama_dist.api.prompts import prompt_of
from pyllama_dist.api.service import Service
from pyllama_dist.text.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
)

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass
class Message:
    """A message that is being written."""

    id: str
    model: str
    answer: Answer
    max_tokens: int

    async def whole(self) -> Json:
        """The message in one piece: what the events of its stream add up to.

        Raises:
            ApiError: the generation failed.
        """
        content: list[Json] = []
        async for event in self.chunks():
            match event:
                case {"type": "content_block_start", "content_block": block}:
                    content.append(block)
                case {"type": "content_block_delta", "delta": delta}:
                    for name in delta.keys() - {"type"}:
                        content[-1][name] = content[-1].get(name, "") + delta[name]
        for block in content:
            if block["type"] == "tool_use":
                block["input"] = _input(block.pop("partial_json", ""))
        return self._message(content)

    async def chunks(self) -> AsyncIterator[Json | None]:
        """The events of a stream; None if nothing has happened for some time.

        Raises:
            ApiError: the generation failed.
        """
        blocks = ContentBlocks()
        yield {"type": "message_start", "message": self._message([])}
        async for item in self.answer.items():
            match item:
                case Ping():
                    yield None
                case Piece(_, events):
                    for event in events:
                        for told in blocks.add(event):
                            yield told
        for told in blocks.close():
            yield told
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **self._stop(),
            "usage": self._usage(),
        }

    def _stop(self) -> Json:
        """Why the message ended; null before."""
        (choice,) = self.answer.choices
        stop = choice.parser.stop if choice.reason == "stop" else None
        reason = _STOP_REASONS[choice.reason] if choice.reason else None
        if stop is not None:
            reason = "stop_sequence"
        elif choice.reason == "length" and choice.tokens < self.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _usage(self) -> Json:
        """The tokens so far. All that was read stays in the cache, so none count as its creation;
        when a stream begins it may not be known yet how many came from it.
        """
        (choice,) = self.answer.choices
        cached = self.answer.cached_tokens
        return {
            "input_tokens": len(self.answer.prompt) - cached,  # without those from the cache
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": choice.tokens,
            "output_tokens_details": {"thinking_tokens": choice.reasoning_tokens},
        }


class ContentBlocks:
    """Tells the events of a reply as those of content blocks, of which one at a time is open."""

    def __init__(self) -> None:
        self._index, self._type = -1, ""  # of the open block, or of the last one and ""
        self._thought = sha256()

    def add(self, event: Event) -> Iterator[Json]:
        """What is to be told of an event."""
        match event:
            case Reasoning(text):
                self._thought.update(text.encode())
                yield from self._open("thinking", thinking="", signature="")
                yield self._delta("thinking_delta", thinking=text)
            case Content(text):
                yield from self._open("text", text="")
                yield self._delta("text_delta", text=text)
            case CallStart(_, id, name):
                yield from self._open("tool_use", id=id, name=name, input={})
            case CallArguments(_, text):
                yield self._delta("input_json_delta", partial_json=text)
            case CallEnd():
                yield from self.close()

    def close(self) -> Iterator[Json]:
        """Ends the open block, if one is.

        Nobody checks the signature of a thought, but clients keep no thought without one.
        """
        if self._type == "thinking":
            yield self._delta("signature_delta", signature=self._thought.hexdigest())
        if self._type:
            yield {"type": "content_block_stop", "index": self._index}
        self._type = ""

    def _open(self, type_: str, **fields: object) -> Iterator[Json]:
        if self._type == type_:
            return
        yield from self.close()
        self._index, self._type = self._index + 1, type_
        block = {"type": type_, **fields}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, type_: str, **fields: str) -> Json:
        delta = {"type": type_, **fields}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _input(arguments: str) -> msgspec.Raw:
    """The object of a call's arguments as the model spelled it; `{}` if it was cut off."""
    try:
        msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return msgspec.Raw(b"{}")
    return msgspec.Raw(arguments.encode())


def count_tokens(service: Service, body: CountTokensRequest) -> Json:
    """How many tokens the model would read.

    Raises:
        ApiError: it takes no such conversation.
    """
    service.ready()
    service.check_model(body.model)
    return {"input_tokens": len(prompt_of(service, conversation(body)).tokens)}


async def begin(service: Service, body: MessagesRequest, key: str, held: ExitStack) -> Message:
    """Begins to answer a conversation; `held` ends that.

    Raises:
        ApiError: it cannot be.
    """
    model = service.check_model(body.model)
    answer = await begin_answer(service, generation(body), key, held)
    return Message(f"msg_{secrets.token_hex(12)}", model, answer, body.max_tokens)


DIALECT = Dialect(
    MessagesRequest,
    lambda body: 1,
    begin,
    error=error_object,
    event=named_event,
    ping=named_event({"type": "ping"}),
    last=b"",
)

"""/v1/chat/completions: a conversation goes on."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pyllama_dist.api.answer import Answer, Ended, Head, Item, Piece, Ping, Progress, requests_of
from pyllama_dist.api.dialect import Dialect, Json
from pyllama_dist.api.errors import bad_request
from pyllama_dist.api.guides import constraint_of
from pyllama_dist.api.prompts import prompt_of, stop_strings
from pyllama_dist.api.requests import ChatRequest
from pyllama_dist.api.service import Service
from pyllama_dist.engine.sampler import TokenLogprobs
from pyllama_dist.text.events import CallArguments, CallStart, Content, Event, Reasoning
from pyllama_dist.text.reply import Reply
from pyllama_dist.text.tokenizer import Tokenizer


@dataclass
class Chat:
    """A conversation that is answered."""

    body: ChatRequest
    answer: Answer
    head: Head
    tokenizer: Tokenizer

    async def whole(self) -> Json:
        """The answer in one piece.

        Raises:
            ApiError: the generation failed.
        """
        replies = [Reply() for _ in self.answer.choices]
        found: list[list[TokenLogprobs]] = [[] for _ in replies]
        async for item in self.answer.items():
            if isinstance(item, Piece):
                found[item.index] += item.logprobs
                for event in item.events:
                    replies[item.index].add(event)
        choices = [
            {
                "index": choice.index,
                "message": _message(reply),
                "logprobs": (
                    {"content": self._logprobs(logprobs), "refusal": None}
                    if self.body.logprobs
                    else None
                ),
                "finish_reason": choice.reason,
            }
            for choice, reply, logprobs in zip(self.answer.choices, replies, found, strict=True)
        ]
        return {
            **self.head.fields("chat.completion"),
            "choices": choices,
            "usage": self.answer.usage(),
            "timings": self.answer.timings(),
        }

    async def chunks(self) -> AsyncIterator[Json | None]:
        """The answer piece by piece; None if nothing has happened for some time.

        Raises:
            ApiError: the generation failed.
        """
        options = self.body.stream_options
        usage = options is not None and bool(options.include_usage)
        each = options is not None and bool(options.continuous_usage_stats)

        def chunk(choices: list[Json], **more: object) -> Json:
            found = {**self.head.fields("chat.completion.chunk"), "choices": choices}
            if usage:
                found["usage"] = self.answer.usage() if each and choices else None
            if self.body.timings_per_token and choices:
                found["timings"] = self.answer.timings()
            return found | more

        for choice in self.answer.choices:
            yield chunk([_delta(choice.index, {"role": "assistant", "content": ""})])
        async for item in self.answer.items(progress=bool(self.body.return_progress)):
            if isinstance(item, Ping):
                yield None
            else:
                for choices, more in self._told(item):
                    yield chunk(choices, **more)
        if usage:
            yield chunk([], usage=self.answer.usage())

    def _told(self, item: Item) -> Iterator[tuple[list[Json], Json]]:
        """Choices of each chunk that tells an item, and what else it has."""
        match item:
            case Progress():
                progress = {
                    "total": item.total,
                    "cache": item.cached,
                    "processed": item.done,
                    "time_ms": round(1e3 * item.seconds),
                }
                yield [_delta(0, {})], {"prompt_progress": progress}
            case Piece(index, events, logprobs):
                for delta in _deltas(events):
                    told: Json = _delta(index, delta)
                    if self.body.logprobs and "content" in delta:
                        told["logprobs"] = {"content": self._logprobs(logprobs), "refusal": None}
                        logprobs = ()
                    yield [told], {}
            case Ended(index, reason):
                last = {**_delta(index, {}), "finish_reason": reason}
                yield [last], {"timings": self.answer.timings()}

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> list[Json]:
        return logprobs_json(self.tokenizer, found, self.body.top_logprobs or 0)


def logprobs_json(tokenizer: Tokenizer, found: Sequence[TokenLogprobs], most: int) -> list[Json]:
    """Logprobs of tokens, and of the `most` likeliest in the place of each."""

    def told(token: int, logprob: float) -> Json:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return [
        {**told(one.token, one.logprob), "top_logprobs": [told(*pair) for pair in one.top[:most]]}
        for one in found
    ]


def _message(reply: Reply) -> Json:
    content = reply.content if reply.content or not reply.calls else None
    found: Json = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        found["reasoning_content"] = reply.reasoning
    if reply.calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.calls
        ]
    return found


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _deltas(events: Sequence[Event]) -> list[Json]:
    """Deltas of a step's events; neighbours of one kind become one."""
    found: list[Json] = []

    def text(name: str, piece: str) -> None:
        if found and name in found[-1]:
            found[-1][name] += piece
        else:
            found.append({name: piece})

    for event in events:
        match event:
            case Reasoning(piece):
                text("reasoning_content", piece)
            case Content(piece):
                text("content", piece)
            case CallStart(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                found.append({"tool_calls": [call]})
            case CallArguments(index, piece):
                called = {"index": index, "function": {"arguments": piece}}
                found.append({"tool_calls": [called]})
    return found


async def begin(service: Service, body: ChatRequest, key: str, held: ExitStack) -> Chat:
    """Begins to answer a conversation; `held` ends that.

    Raises:
        ApiError: it cannot be.
    """
    head = Head.of(service, "chatcmpl", body.model)
    answer = await begin_answer(service, body, key, held)
    return Chat(body, answer, head, service.ready().parts.tokenizer)


async def begin_answer(service: Service, body: ChatRequest, key: str, held: ExitStack) -> Answer:
    """Begins to answer a conversation, in whatever dialect it will be told; `held` ends that.

    Raises:
        ApiError: it cannot be.
    """
    parts = service.ready().parts
    _check(body)
    # A long prompt may take a second to tokenize, in which other answers go on.
    prompt = await asyncio.to_thread(prompt_of, service, body)
    requests = requests_of(
        service,
        body,
        prompt.tokens,
        body.max_completion_tokens or body.max_tokens,
        param="messages",
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        key=key,
        constrain=await constraint_of(service, body, prompt),
    )
    stops = stop_strings(body.stop)
    answer = Answer(
        service,
        prompt.tokens,
        requests,
        lambda: prompt.parser(parts, stops),
        one_call=body.parallel_tool_calls is False,
    )
    held.callback(answer.close)
    return answer


def _check(body: ChatRequest) -> None:
    """What fields demand of each other."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if body.max_tokens == 0:
        raise bad_request("max_tokens is 0; ask for one at least", "max_tokens")
    if set(body.modalities or ()) - {"text"}:
        raise bad_request("modalities: this model writes text only", "modalities")


DIALECT = Dialect(ChatRequest, lambda body: body.n or 1, begin)

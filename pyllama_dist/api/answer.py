"""One request's answer, whatever dialect it is told in: choices, and what happens to them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pyllama_dist.api.errors import ApiError, bad_request, of_engine
from pyllama_dist.api.request_log import spend
from pyllama_dist.api.requests import Sampled
from pyllama_dist.api.service import Service
from pyllama_dist.engine.sampler import F32, Sampler, Sampling, TokenLogprobs
from pyllama_dist.engine.sequence import Request, Timings
from pyllama_dist.engine.stream import Stream
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.detokenize import DetokenizeStream
from pyllama_dist.text.events import CallEnd, Content, Event, Reasoning
from pyllama_dist.text.reply import ReplyParser

Reason = Literal["stop", "length", "tool_calls"]
PING_SECONDS = 10.0  # of silence, after which a client is told that the server is there


@dataclass(frozen=True)
class Piece:
    """What a step made certain of a choice."""

    index: int
    events: Sequence[Event]
    logprobs: Sequence[TokenLogprobs] = ()  # of the tokens of content, if they were asked for


@dataclass(frozen=True)
class Ended:
    """A choice is complete."""

    index: int
    reason: Reason


@dataclass(frozen=True)
class Progress:
    """Tokens of the prompt that are there, `cached` of them from the cache."""

    total: int
    cached: int
    done: int
    seconds: float


@dataclass(frozen=True)
class Ping:
    """Nothing has happened for some time."""


Item = Piece | Ended | Progress | Ping


@dataclass
class Choice:
    """One of the continuations that were asked for."""

    index: int
    stream: Stream
    parser: ReplyParser
    text: DetokenizeStream
    one_call: bool = False  # the first call ends it
    reason: Reason | None = None
    tokens: int = 0  # up to its end; the engine may have come further
    reasoning_tokens: int = 0
    calls: int = 0
    cut_call: bool = False
    _thinking: bool = False
    _undecided: list[tuple[TokenLogprobs, str]] = field(default_factory=list)  # with their texts
    _begun: bool = False  # content has come
    _read: int = 0  # logprobs of the stream

    @property
    def ended(self) -> bool:
        """Whether further tokens do not count: a stop string has come, or the one call."""
        return self.parser.stop is not None or (self.one_call and self.calls > 0)

    def push(self, tokens: Sequence[int]) -> Piece:
        """What some tokens make certain; those after its end do not count."""
        events: list[Event] = []
        logprobs: list[TokenLogprobs] = []
        for token in tokens:
            if self.ended:
                break
            self.tokens += 1
            text = self.text.push(token)
            found = self.parser.push(token, text)
            self._note(found, logprobs, text)
            self.reasoning_tokens += self._thinking
            events += found
        return Piece(self.index, events, logprobs)

    def finish(self) -> Piece:
        """The rest, and why it ended."""
        cut = self.stream.finish_reason != "stop"
        events = list(self.parser.finish(self.text.flush(), cut=cut))
        logprobs: list[TokenLogprobs] = []
        self._note(events, logprobs, None)
        if self.parser.stop is None and self.cut_call:
            self.reason = "length"
        elif self.calls:
            self.reason = "tool_calls"
        elif self.parser.stop is not None or not cut:
            self.reason = "stop"
        else:
            self.reason = "length"
        return Piece(self.index, events, logprobs)

    def _note(
        self, events: Sequence[Event], logprobs: list[TokenLogprobs], text: str | None
    ) -> None:
        """Finds out which tokens are of the content; `text` is that of a new one."""
        if text is not None and self._read < len(self.stream.logprobs):
            self._undecided.append((self.stream.logprobs[self._read], text))
            self._read += 1
        for event in events:
            match event:
                case Content(content):
                    self._thinking = False
                    # Blank tokens before the first word are no part of it, unless it has them.
                    self._begun = self._begun or content[:1].isspace()
                    for one, own in self._undecided:
                        self._begun = self._begun or not own.isspace()
                        if self._begun:
                            logprobs.append(one)
                    self._undecided = []
                case CallEnd(complete=complete):
                    self.calls += complete
                    self.cut_call = not complete
                case Reasoning():
                    self._thinking = True
                    self._undecided = []
                case _:
                    self._thinking = False
                    self._undecided = []


@dataclass(frozen=True)
class Head:
    """What all that is said of one answer begins with."""

    id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str

    @classmethod
    def of(cls, service: Service, prefix: str, model: str | None) -> "Head":
        """That of a new answer.

        Raises:
            ApiError: there is no model of this name.
        """
        name = service.check_model(model)
        id_ = f"{prefix}-{secrets.token_hex(12)}"
        return cls(id_, int(time.time()), name, service.fingerprint)

    def fields(self, object_: str) -> dict[str, object]:
        """As JSON has it, for an object of this type."""
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Answer:
    """What was asked for, and its choices while they come. Whoever began it closes it."""

    def __init__(
        self,
        service: Service,
        prompt: Sequence[int],
        requests: Sequence[Request],
        make_parser: Callable[[], ReplyParser],
        *,
        one_call: bool = False,
    ) -> None:
        """Begins generations; with `one_call`, the first call of a tool ends a choice.

        Raises:
            ApiError: they cannot be.
        """
        tokenizer = service.ready().parts.tokenizer
        self.prompt, self._service = prompt, service
        self._arrived, self._reason = time.monotonic(), "abort"
        self._first: float | None = None  # when the first token came
        self.choices = [
            Choice(index, stream, make_parser(), tokenizer.stream(), one_call)
            for index, stream in enumerate(service.submit(requests))
        ]

    async def items(self, *, progress: bool = False) -> AsyncIterator[Item]:
        """What happens, until all choices are complete.

        Raises:
            ApiError: the generation failed.
        """
        queue: asyncio.Queue[Item | ApiError] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._follow(choice, queue, progress)) for choice in self.choices
        ]
        try:
            open_ = len(tasks)
            while open_:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        item = await queue.get()
                except TimeoutError:
                    item = Ping()
                if isinstance(item, ApiError):
                    self._reason = "error"
                    raise item
                open_ -= isinstance(item, Ended)
                yield item
            self._reason = str(self.choices[0].reason)
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Cancels what has not ended; to be called once, however far it came."""
        for choice in self.choices:
            choice.stream.close()
        timings = [choice.stream.timings for choice in self.choices]
        self._service.metrics.ended(self._reason, timings, time.monotonic() - self._arrived)
        spend(len(self.prompt), self.cached_tokens, self.generated_tokens, self._reason)

    async def _follow(
        self, choice: Choice, queue: "asyncio.Queue[Item | ApiError]", progress: bool
    ) -> None:
        told, last = -1, 0.0
        timings = choice.stream.timings
        try:
            async for tokens in self._service.tokens(choice.stream):
                if tokens:
                    last = self._measure(last)
                    piece = choice.push(tokens)
                    if piece.events:
                        queue.put_nowait(piece)
                    if choice.ended:
                        break
                elif progress and choice.index == 0 and self._first is None:
                    done = timings.cached_tokens + timings.computed_tokens
                    if done != told:
                        told = done
                        queue.put_nowait(
                            Progress(
                                len(self.prompt),
                                timings.cached_tokens,
                                min(done, len(self.prompt)),
                                time.monotonic() - self._arrived,
                            )
                        )
            piece = choice.finish()
            if piece.events:
                queue.put_nowait(piece)
            queue.put_nowait(Ended(choice.index, choice.reason or "stop"))
        except ApiError as error:
            queue.put_nowait(error)
        except Exception as error:  # a parser's fault is that request's alone
            queue.put_nowait(of_engine(error))
            raise

    def _measure(self, last: float) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._service.metrics.first(now - self._arrived)
        elif last:
            self._service.metrics.token(now - last)
        return now

    def usage(self) -> dict[str, object]:
        """OpenAI's account of the tokens."""
        generated = self.generated_tokens
        return {
            "prompt_tokens": len(self.prompt),
            "completion_tokens": generated,
            "total_tokens": len(self.prompt) + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices)
            },
        }

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the cache."""
        return self.choices[0].stream.timings.cached_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens of all choices up to their ends."""
        return sum(choice.tokens for choice in self.choices)

    def timings(self) -> dict[str, float]:
        """llama-server's account of the time, of the first choice."""
        return timings_of(self.choices[0].stream.timings)


def timings_of(timings: Timings) -> dict[str, float]:
    """llama-server's account of the time of a generation."""
    read = timings.prompt_tokens - timings.cached_tokens
    prompt, predicted = timings.prefill_seconds, timings.decode_seconds
    n = timings.generated_tokens
    return {
        "cache_n": timings.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round(1e3 * prompt, 3),
        "prompt_per_token_ms": round(1e3 * prompt / max(1, read), 3),
        "prompt_per_second": round(read / prompt, 3) if prompt else 0.0,
        "predicted_n": n,
        "predicted_ms": round(1e3 * predicted, 3),
        "predicted_per_token_ms": round(1e3 * predicted / max(1, n - 1), 3),
        "predicted_per_second": round((n - 1) / predicted, 3) if predicted and n > 1 else 0.0,
        "queue_ms": round(1e3 * timings.waiting_seconds, 3),
    }


def requests_of(
    service: Service,
    body: Sampled,
    prompt: Sequence[int],
    max_tokens: int | None,
    *,
    param: str,
    top_logprobs: int | None,
    key: str,
    constrain: Callable[[Sampler], Callable[[F32], int]] | None = None,
) -> list[Request]:
    """What the engine is asked for, one request for each choice.

    Args:
        service: which is ready.
        body: how tokens are chosen.
        prompt: ids.
        max_tokens: None for as many as there is room for.
        param: the field that the prompt was made of.
        top_logprobs: of each token, so many likely ones are told; None for none at all.
        key: of the client.
        constrain: makes the sampler of a choice obey a grammar.

    Raises:
        ApiError: the prompt does not fit, or a field is wrong.
    """
    model = service.ready()
    tokenizer, engine = model.parts.tokenizer, model.engine
    if len(prompt) >= engine.seq_len:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens, the context {engine.seq_len}; shorten it",
            param,
            "context_length_exceeded",
        )
    wrong = [id for id in body.logit_bias or () if int(id) >= tokenizer.vocab_size]
    if wrong:
        most = tokenizer.vocab_size - 1
        raise bad_request(f"logit_bias: {wrong[0]} is no token id from 0 to {most}", "logit_bias")
    stop = set() if body.ignore_eos else set(tokenizer.eos_ids)
    stop |= set(body.stop_token_ids or ())
    requests = []
    for index in range(body.n or 1):
        try:
            sampler = Sampler(_sampling(service, body, index), tokenizer.vocab_size)
        except PyllamaError as error:
            raise of_engine(error) from None
        sampler.begin(prompt)
        requests.append(
            Request(
                prompt,
                constrain(sampler) if constrain else sampler,
                stop=frozenset(stop),
                max_tokens=max_tokens,
                logprobs=None if top_logprobs is None else sampler.logprobs(top_logprobs),
                group=key,
                salt=body.cache_salt or "",
            )
        )
    return requests


def _sampling(service: Service, body: Sampled, index: int) -> Sampling:
    parts = service.ready().parts
    seed = None if body.seed is None else (body.seed + index) % (1 << 64)
    bias: Mapping[int, float] = {int(id): value for id, value in (body.logit_bias or {}).items()}
    return replace(
        parts.sampling(body.temperature, body.top_p, seed),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or body.repeat_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        bias=bias,
    )

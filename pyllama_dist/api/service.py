"""The model behind the server: whether it is there, and who may ask it."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from pyllama_dist.api.bridge import Bridge
from pyllama_dist.api.errors import ApiError, bad_request, of_engine, unavailable
from pyllama_dist.api.metrics import Metrics, NodeUse
from pyllama_dist.conversation import ModelParts
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sequence import Request
from pyllama_dist.engine.stream import Stream
from pyllama_dist.errors import PyllamaError
from pyllama_dist.net.messages import Usage
from pyllama_dist.text.grammar.grammars import Grammars
from pyllama_dist.text.grammar.thought import ThinkTags

log = logging.getLogger(__name__)

_USAGE_SECONDS = 1.0  # workers are asked at most so often
_WATCH_SECONDS = 1.0  # between two looks after idle nodes
_GUESSED_SECONDS = 10.0  # for an answer, while none has been given yet
_T = TypeVar("_T")


@dataclass(frozen=True)
class Limits:
    """How much the server takes on."""

    parallel: int  # sequences that run at once
    queue: int  # further ones that may wait
    thinking: int | None = None  # tokens of a thought, where a request says nothing of it


@dataclass(frozen=True)
class Model:
    """A model that serves: its files, and the engine that runs it.

    Attributes:
        nodes: their addresses, the root first.
    """

    parts: ModelParts
    engine: Engine
    bridge: Bridge
    nodes: Sequence[str]

    @cached_property
    def grammars(self) -> Grammars:
        """Makes grammars for its answers."""
        return Grammars(self.parts.tokenizer)

    @cached_property
    def think_tags(self) -> ThinkTags:
        """How it writes the tags of a thought."""
        return ThinkTags.of(self.parts.tokenizer)


@dataclass
class Service:
    """A model that is loading, ready, or lost; the loop's thread alone changes it.

    Attributes:
        names: of the model: its own, and further ones that clients may use.
        model: None until it is ready.
        failure: why it does not serve any more.
    """

    names: Sequence[str]
    limits: Limits
    metrics: Metrics
    model: Model | None = None
    failure: ApiError | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    fingerprint: str = ""
    last_nodes: Sequence[NodeUse] = ()  # for after a node was lost
    _sequences: int = 0  # that run or wait
    _by_key: Counter[str] = field(default_factory=Counter)
    _seconds: float = _GUESSED_SECONDS  # of an answer, as the latest ones took
    _usage: tuple[float, list[Usage]] = (0.0, [])
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def begin(self, model: Model) -> None:
        """From now on it serves."""
        self.model = model
        n = len(model.nodes)
        log.info("%s is ready on %d node%s", self.names[0], n, "s" * (n > 1))

    def stop(self, why: ApiError) -> None:
        """From now on it serves no more; those that wait for an answer are told why."""
        self.failure = self.failure or why
        if self.model is not None:
            self.model.bridge.after_step(0, 0.0)

    def close(self) -> None:
        """Ends what was started besides the engine."""
        if self.model is not None:
            self.model.grammars.close()

    def ready(self) -> Model:
        """What serves.

        Raises:
            ApiError: it is loading, or was lost.
        """
        self._refuse_if_lost()
        if self.model is None:
            raise unavailable("Loading model", "loading")
        return self.model

    def _refuse_if_lost(self) -> None:
        if self.failure is not None:
            raise replace(self.failure)  # each time anew: an error keeps where it was raised

    def check_model(self, name: str | None) -> str:
        """The name that an answer has.

        Raises:
            ApiError: there is no model of this name.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"no model {name!r}; there is {', '.join(self.names)}",
                code="model_not_found",
                param="model",
            )
        return name or self.names[0]

    @contextmanager
    def admitted(self, count: int, key: str) -> Iterator[None]:
        """Room for so many sequences of one client, while the context lasts.

        Raises:
            ApiError: there is none; `Retry-After` says when there may be.
        """
        room = self.limits.parallel + self.limits.queue
        if count > room:
            raise bad_request(f"{count} texts at once, {room} at most; send fewer in a request")
        others = len(self._by_key.keys() - {key})
        fair = room if not others else max(count, room - others)  # one place for each other key
        if self._sequences + count > room or self._by_key[key] + count > fair:
            waiting = max(0, self._sequences - self.limits.parallel) + count
            seconds = waiting * self._seconds / self.limits.parallel
            retry = str(min(120, max(1, round(seconds))))
            raise ApiError(
                429,
                f"{self._sequences} sequences run or wait, {room} at most; try again in {retry} s",
                "rate_limit_error",
                "queue_full",
                headers={"retry-after": retry},
            )
        self._sequences += count
        self._by_key[key] += count
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
            self._sequences -= count
            self._by_key[key] -= count
            if not self._by_key[key]:
                del self._by_key[key]

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Begins generations.

        Raises:
            ApiError: they cannot be.
        """
        engine = self.ready().engine
        try:
            return engine.submit_all(requests)
        except PyllamaError as error:
            raise of_engine(error) from None

    async def tokens(self, stream: Stream) -> AsyncIterator[list[int]]:
        """The tokens of a stream as they come; leaving it early cancels it.

        Raises:
            ApiError: the generation failed, or the server ends.
        """
        bridge = self.ready().bridge
        try:
            async for tokens in bridge.read(stream):
                self._refuse_if_lost()
                yield tokens
        except PyllamaError as error:
            failed = of_engine(error)
            if failed.status == 503:
                self.failure = failed
            raise failed from None
        finally:
            stream.close()
        if stream.finish_reason == "interrupted":
            self._refuse_if_lost()

    async def usage(self) -> list[Usage]:
        """What steps have cost each worker; at most a second old."""
        engine = self.ready().engine
        async with self._asking:
            when, found = self._usage
            if time.monotonic() - when > _USAGE_SECONDS:
                found = await self._between_steps(engine, engine.root.usage)
                self._usage = time.monotonic(), found
            return found

    async def watch(self) -> None:
        """Looks after the nodes while nobody asks for anything, until one is lost."""
        while self.failure is None:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.model is not None and not self.model.engine.load.running:
                engine = self.model.engine
                with suppress(ApiError):
                    await self._between_steps(engine, engine.root.check)

    async def _between_steps(self, engine: Engine, function: Callable[[], _T]) -> _T:
        """What a function of the root returns; if it fails, nothing is served any more.

        Raises:
            ApiError: it has failed.
        """
        try:
            future = engine.call_between_steps(function)
            return await asyncio.shield(asyncio.wrap_future(future))
        except Exception as error:
            self.failure = of_engine(error)
            raise replace(self.failure) from None

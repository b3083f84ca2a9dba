"""A dialect: how clients of one API ask for text, and how they are told it."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from pyllama_dist.api.errors import ApiError
from pyllama_dist.api.service import Service

Json = dict[str, Any]
_B = TypeVar("_B", bound="Body")


class Body(Protocol):
    """What a request for text has in every dialect."""

    stream: bool | None


class Told(Protocol):
    """An answer that has begun."""

    async def whole(self) -> Json:
        """The answer in one piece.

        Raises:
            ApiError: the generation failed.
        """
        ...

    def chunks(self) -> AsyncIterator[Json | None]:
        """The answer piece by piece; None if nothing has happened for some time.

        Raises:
            ApiError: the generation failed.
        """
        ...


def openai_error(error: ApiError, request_id: str) -> Json:
    """The object that tells an error; OpenAI's does not name the request."""
    return error.body()


def data_event(chunk: Mapping[str, Any]) -> bytes:
    """A server-sent event that has no name."""
    return b"data: %b\n\n" % msgspec.json.encode(chunk)


def named_event(chunk: Mapping[str, Any]) -> bytes:
    """A server-sent event named by the type of what it tells; an error of OpenAI's has none."""
    return b"event: %b\n%b" % (chunk.get("type", "error").encode(), data_event(chunk))


@dataclass(frozen=True)
class Dialect(Generic[_B]):
    """One API.

    Attributes:
        body: of its requests.
        sequences: that a request needs.
        begin: begins an answer for a client, named by its key; the stack ends it.
        error: the object that tells an error of the request that has this id.
        event: an object of a stream as it travels.
        ping: what is sent in a stream while nothing happens.
        last: what ends a stream that did not fail.
    """

    body: type[_B]
    sequences: Callable[[_B], int]
    begin: Callable[[Service, _B, str, ExitStack], Coroutine[Any, Any, Told]]
    error: Callable[[ApiError, str], Json] = openai_error
    event: Callable[[Mapping[str, Any]], bytes] = data_event
    ping: bytes = b": ping\n\n"
    last: bytes = b"data: [DONE]\n\n"

"""Server-sent events: an answer piece by piece, while the client is there to take it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyllama_dist.api.errors import ApiError, of_engine
from pyllama_dist.api.leaving import unless_gone

log = logging.getLogger(__name__)

_SEND_SECONDS = 60.0  # for a client to take a piece
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Events, each a JSON object; a client that leaves, or takes nothing, ends them."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[Mapping[str, Any] | None], held: ExitStack) -> None:
        """A stream.

        Args:
            chunks: what to send; None for a sign of life.
            held: is closed at the end, whatever happens.
        """
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._chunks, self._held = chunks, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self._held, suppress(ApiError):  # it has left
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def give(data: bytes, more: bool = True) -> None:
            body = {"type": "http.response.body", "body": data, "more_body": more}
            async with asyncio.timeout(_SEND_SECONDS):
                await send(body)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        last = _DONE
        try:
            async with aclosing(self._chunks) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    await give(_PING if chunk is None else _event(chunk))
        except ApiError as error:
            last = _event(error.body())
        except TimeoutError:
            return
        except Exception as error:
            log.exception("a stream has failed")
            last = _event(of_engine(error).body())
        await give(last, more=False)


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(chunk)

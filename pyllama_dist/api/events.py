"""Server-sent events: an answer piece by piece, while the client is there to take it."""

import logging
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyllama_dist.api.dialect import Dialect, Told
from pyllama_dist.api.errors import ApiError, of_engine
from pyllama_dist.api.leaving import unless_gone

log = logging.getLogger(__name__)

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """An answer as it comes; a client that leaves, or takes nothing, ends it."""

    media_type = "text/event-stream"

    def __init__(self, dialect: Dialect[Any], told: Told, held: ExitStack) -> None:
        """A stream; `held` is closed at its end, whatever happens."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._dialect, self._told, self._held = dialect, told, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self._held, suppress(ApiError):  # it has left
            await unless_gone(receive, self._send(send, scope["state"]["request_id"]))

    async def _send(self, send: Send, request_id: str) -> None:
        async def give(data: bytes, more: bool = True) -> None:
            body = {"type": "http.response.body", "body": data, "more_body": more}
            await send(body)

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        dialect, last = self._dialect, self._dialect.last
        try:
            async with aclosing(self._told.chunks()) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    await give(dialect.ping if chunk is None else dialect.event(chunk))
        except ApiError as error:
            last = dialect.event(dialect.error(error, request_id))
        except Exception as error:
            log.exception("a stream has failed")
            last = dialect.event(dialect.error(of_engine(error), request_id))
        await give(last, more=False)

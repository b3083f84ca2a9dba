"""HTTP of a connection: uvicorn's, and an end for clients that never finish what they send."""

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyllama_dist.api.errors import ApiError, bad_request

HEADER_SECONDS = 20.0  # for the header of a request, and for a body that nobody reads any more


class HttpProtocol(H11Protocol):
    """Closes a connection whose request does not come, and tells errors as the API does.

    uvicorn bounds how long a connection is idle between two requests, but neither the time before
    the first one nor that within a header.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._stop()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when what came is no HTTP."""
        self._refuse(bad_request(msg))

    def _watch(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if not (answered and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)):
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._cut)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        self._refuse(ApiError(408, "the request did not arrive in time", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless an answer has begun, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(error.body())
            length = str(len(body)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", length)]
            response = h11.Response(
                status_code=error.status, headers=[*headers, (b"connection", b"close")]
            )
            parts = map(self.conn.send, (response, h11.Data(data=body), h11.EndOfMessage()))
            self.transport.write(b"".join(part or b"" for part in parts))
        self.transport.close()

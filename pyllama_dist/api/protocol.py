"""HTTP of a connection: uvicorn's, and an end for clients that neither send nor take."""

import asyncio

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyllama_dist.api.errors import ApiError, bad_request

HEADER_SECONDS = 20.0  # for the header of a request, and for a body that nobody reads any more

SEND_SECONDS = 60.0  # for a client to take a part of what waits for it
_LEAST_BYTES = 4096  # of such a part


class HttpProtocol(H11Protocol):
    """Ends a connection whose request does not come, or whose answer is not taken.

    uvicorn bounds how long a connection is idle between two requests, but neither the time before
    the first one nor that within a header; and what it closes stays open until all was taken.
    Errors are told as the API tells them.
    """

    _deadline: asyncio.TimerHandle | None = None  # for what is received
    _stalled: asyncio.TimerHandle | None = None  # for what is sent

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.transport.set_write_buffer_limits(high=0)  # `pause_writing` whenever something waits
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._stop()
        self._go_on()

    def pause_writing(self) -> None:
        """See asyncio.Protocol: something waits to be sent."""
        super().pause_writing()
        self._expect()

    def resume_writing(self) -> None:
        """See asyncio.Protocol: nothing waits to be sent."""
        super().resume_writing()
        self._go_on()

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

    def _expect(self) -> None:
        """Aborts if the client does not take a part of what waits."""
        unsent = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() > unsent - _LEAST_BYTES:
                self.transport.abort()
            else:
                self._expect()

        self._stalled = self.loop.call_later(SEND_SECONDS, check)

    def _go_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

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

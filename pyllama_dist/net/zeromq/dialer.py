"""The root's end: a DEALER for each worker."""

import time
from contextlib import suppress

import zmq

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Message
from pyllama_dist.net.transport import ROOT, Address, Channel, LostError, Mesh, Raw
from pyllama_dist.net.zeromq.mesh import ZmqMesh
from pyllama_dist.net.zeromq.sockets import (
    CLOSED,
    CONNECT_SECONDS,
    GOODBYE_MS,
    LOST,
    REFUSED,
    SEND_SECONDS,
    WEIGHTS_AHEAD,
    Socket,
    close_socket,
    connect,
    events,
    open_context,
    open_socket,
    parse,
    poll,
)


class ZmqDialer:
    """How a root reaches workers."""

    def __init__(self) -> None:
        self._context = open_context()

    def connect(self, address: Address) -> Channel:
        """A channel to a worker.

        Raises:
            NodeError: nobody is there, or somebody else is.
        """
        wanted = LOST | REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        socket, monitor = open_socket(self._context, zmq.DEALER, wire.HARD_LIMIT, wanted)
        # With it, what a worker said before it went would go with the connection, unread.
        socket.immediate = 0
        socket.sndhwm = WEIGHTS_AHEAD
        try:
            connect(socket, f"tcp://{address}")
            if not poll([(monitor, zmq.POLLIN)], time.monotonic() + CONNECT_SECONDS):
                raise NodeError(
                    f"nobody answers at {address}; is the worker running, and is that its "
                    f"address? start it with: pyllama-dist worker --port {address.port}"
                )
            if next(events(monitor))[0] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise NodeError(
                    f"what listens at {address} is not a pyllama-dist worker; check the port"
                )
        except BaseException:
            close_socket(socket, monitor)
            raise
        return _DealerChannel(address, socket, monitor)

    def mesh(self) -> Mesh:
        """The root's data connections. It never listens."""
        return ZmqMesh(self._context, host="127.0.0.1")

    def close(self) -> None:
        """Lets last messages leave and frees the sockets' thread."""
        self._context.destroy(linger=GOODBYE_MS)


class _DealerChannel:
    """The root's end of a conversation with a worker."""

    def __init__(self, address: Address, socket: Socket, monitor: Socket) -> None:
        self.address = str(address)
        self._socket, self._monitor = socket, monitor

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """See `Channel`."""
        parts = [wire.encode(message)] if raw is None else [wire.encode(message), raw]
        deadline = time.monotonic() + SEND_SECONDS
        while True:
            with suppress(zmq.Again):
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                return
            if not self._wait(zmq.POLLOUT, deadline):
                raise LostError(f"it took nothing for {SEND_SECONDS:.0f} s", self.address)

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """See `Channel`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._wait(zmq.POLLIN, deadline):
            raise LostError(f"it did not answer in {timeout:.0f} s", self.address)
        try:
            return parse(self._socket.recv_multipart(copy=False))
        except ProtocolError as error:
            raise ProtocolError(f"the link of {ROOT} and {self.address}: {error}") from None

    def close(self, last: Message | None = None) -> None:
        """See `Channel`."""
        if last is not None:
            with suppress(zmq.ZMQError):
                self._socket.send(wire.encode(last), zmq.NOBLOCK)
        close_socket(self._socket, self._monitor, GOODBYE_MS)

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Waits until the socket can be read or written; whether it can."""
        ready = poll([(self._socket, event), (self._monitor, zmq.POLLIN)], deadline)
        # What a peer said before it went is still there to be read.
        if self._monitor in ready and self._socket not in ready:
            raise LostError(CLOSED, self.address)
        return bool(ready)

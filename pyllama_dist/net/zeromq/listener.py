"""A worker's public socket: a ROUTER, and the one conversation that goes on through it."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import zmq

from pyllama_dist import errors
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Error, Hello, Message, Phase, Welcome
from pyllama_dist.net.transport import ROOT, Address, Channel, LostError, Mesh, Raw
from pyllama_dist.net.zeromq.mesh import ZmqMesh
from pyllama_dist.net.zeromq.sockets import (
    CLOSED,
    GOODBYE_MS,
    LOST,
    REFUSED,
    WEIGHTS_AHEAD,
    Watched,
    bind,
    close_socket,
    events,
    open_context,
    open_socket,
    parse,
    poll,
)

log = logging.getLogger("pyllama_dist")

_QUIET_SECONDS = 10.0  # between two lines about dropped connections


class ZmqListener:
    """Where roots knock. See `Listener`."""

    def __init__(self, host: str, port: int, data_ports: Sequence[int] = (0,)) -> None:
        """Listens.

        Args:
            host: name or address of the interface.
            port: 0 chooses a free one.
            data_ports: those that data connections may use; 0: any free one.

        Raises:
            NodeError: the port is taken, or the host is not this machine's.
        """
        self._context = open_context()
        self._host, self._data_ports = host, data_ports
        self._socket, self._monitor = open_socket(
            self._context, zmq.ROUTER, wire.HARD_LIMIT, REFUSED | LOST
        )
        self._socket.router_mandatory = 1
        self._socket.rcvhwm = WEIGHTS_AHEAD
        try:
            self.port = bind(self._socket, host, port)
        except errors.NodeError:
            self._context.destroy()
            raise
        self.address = str(Address(host, self.port))
        self._finished: deque[bytes] = deque(maxlen=64)  # whose late messages mean nothing
        self._dropped, self._quiet_until = 0, 0.0  # connections dropped since the last word on it
        self._known = 0  # connections that have said something, and so may close without a word

    @property
    def sources(self) -> list[Watched]:
        """What has to be polled before `take`."""
        return [(self._socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)]

    def take(self) -> tuple[bytes, list[zmq.Frame]] | None:
        """The next message and who sent it, without waiting.

        Also reads what the monitor has to tell: unread, it would block all connections.
        """
        for event, _ in events(self._monitor):
            self._report(event)
        try:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return identity.bytes, frames

    def accept(self) -> tuple[Channel, Message]:
        """See `Listener`."""
        while True:
            poll(self.sources, None)
            while (taken := self.take()) is not None:
                identity, frames = taken
                try:
                    message, _ = parse(frames)
                    if isinstance(message, Hello):
                        self._known += 1
                        channel = _RouterChannel(self, identity, _origin(frames), message.session)
                        return channel, message
                    reason = f"{type(message).__name__} before hello"
                except errors.ProtocolError as error:
                    reason = str(error)
                self.refuse(identity, frames, reason)

    def mesh(self) -> Mesh:
        """See `Listener`."""
        return ZmqMesh(self._context, self._host, self._data_ports)

    def refuse(self, identity: bytes, frames: list[zmq.Frame], reason: str) -> None:
        """Answers somebody who is not served, once."""
        if identity in self._finished:
            return
        log.warning("refused a peer at %s: %s", _origin(frames), reason)
        self._known += 1
        self.forget(identity)
        self.answer(identity, Error(Phase.HELLO, reason[:4096]))

    def answer(self, identity: bytes, message: Message) -> None:
        """Says something to a peer if it can take it at once."""
        with suppress(zmq.ZMQError):
            self._socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)

    def send(self, identity: bytes, message: Message) -> None:
        """Says something to the root.

        Raises:
            LostError: it is gone.
        """
        try:
            self._socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            raise LostError(CLOSED, ROOT) from None

    def forget(self, identity: bytes) -> None:
        """From now on nothing but a new hello counts from this peer."""
        self._finished.append(identity)

    def close(self) -> None:
        """Stops listening."""
        close_socket(self._socket, self._monitor, GOODBYE_MS)
        self._context.destroy(linger=GOODBYE_MS)

    def _report(self, event: int) -> None:
        if event == LOST and self._known:
            self._known -= 1
            return
        self._dropped += 1
        if time.monotonic() < self._quiet_until:
            return  # a port scanner would fill the log
        log.warning(
            "dropped %d connections to %s: they do not speak ZeroMQ, or sent a frame above %d MiB; "
            "only a pyllama-dist root may connect here",
            self._dropped,
            self.address,
            wire.HARD_LIMIT >> 20,
        )
        self._dropped, self._quiet_until = 0, time.monotonic() + _QUIET_SECONDS


class _RouterChannel:
    """A worker's end of the conversation with its root."""

    def __init__(
        self, listener: ZmqListener, identity: bytes, address: str, session: bytes
    ) -> None:
        self.address = address
        self._listener, self._identity, self._session = listener, identity, session
        self._welcome: Welcome | None = None

    @property
    def sources(self) -> list[Watched]:
        """What has to be polled before `take`."""
        return self._listener.sources

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """See `Channel`. A worker sends no raw frames."""
        if isinstance(message, Welcome):
            self._welcome = message
        self._listener.send(self._identity, message)

    def take(self) -> tuple[Message, Raw] | None:
        """The root's next message, without waiting; others are refused."""
        while (taken := self._listener.take()) is not None:
            identity, frames = taken
            if identity == self._identity:
                try:
                    return parse(frames)
                except errors.ProtocolError as error:
                    where = f"the link of {ROOT} and {self._listener.address}"
                    raise errors.ProtocolError(f"{where}: {error}") from None
            if self._welcome is not None and self._is_same_root(frames):
                self._listener.answer(identity, self._welcome)
                continue
            busy = f"busy: this worker serves the root at {self.address}; try later"
            self._listener.refuse(identity, frames, busy)
        return None

    def _is_same_root(self, frames: list[zmq.Frame]) -> bool:
        """Whether this is a hello of the session: the root has this worker under two names."""
        try:
            message, _ = parse(frames)
        except errors.ProtocolError:
            return False
        return isinstance(message, Hello) and message.session == self._session

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """See `Channel`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not poll(self.sources, deadline):
                raise LostError(f"it said nothing for {timeout:.0f} s", ROOT)
            if (taken := self.take()) is not None:
                return taken

    def close(self, last: Message | None = None) -> None:
        """See `Channel`."""
        if last is not None:
            self._listener.answer(self._identity, last)
        self._listener.forget(self._identity)


def _origin(frames: list[zmq.Frame]) -> str:
    """The address that a message came from."""
    try:
        return str(frames[-1].get("Peer-Address")).removeprefix("::ffff:")
    except (IndexError, zmq.ZMQError):
        return "an unknown address"

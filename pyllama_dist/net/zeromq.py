"""The transport between machines: ZeroMQ over TCP. See `PROTOCOL.md` for sockets and options."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from pyllama_dist import errors
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Bye, Error, Hello, Link, Message, Phase
from pyllama_dist.net.transport import ROOT, Address, Channel, LostError, Mesh, Raw

log = logging.getLogger("pyllama_dist")

CONNECT_SECONDS = 5.0
_SEND_SECONDS = 60.0
_HEARTBEAT_MS, _SILENCE_MS = 2_000, 10_000
_GOODBYE_MS = 500  # for a last message to leave, and for one that explains a closed connection
_WEIGHTS_AHEAD = 8  # raw frames that wait in a socket: memory of up to 8 MiB on each side

CLOSED = "its connection closed, or it fell silent"

_Watched = tuple[zmq.Socket[bytes], int]  # a socket and what is waited for

_LOST = zmq.EVENT_DISCONNECTED
_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def _url(address: Address) -> str:
    return f"tcp://{address}"


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, limit: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.ipv6 = True
    socket.immediate = 1
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _SILENCE_MS
    socket.maxmsgsize = limit
    return socket


def _close(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], linger: int = 0) -> None:
    socket.disable_monitor()
    monitor.close(linger=0)  # or the context waits for it without end
    socket.close(linger=linger)


def _parse(frames: list[bytes]) -> tuple[Message, Raw]:
    if not 1 <= len(frames) <= 2:
        raise errors.ProtocolError(f"a message of {len(frames)} frames, expected 1 or 2")
    message = wire.decode(frames[0])
    raw = frames[1] if len(frames) == 2 else b""
    if len(raw) > wire.MAX_RAW:
        raise errors.ProtocolError(
            f"a raw frame of {len(raw)} bytes is above the limit of {wire.MAX_RAW}"
        )
    return message, raw


def _milliseconds(deadline: float | None) -> int:
    return -1 if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))


class _DealerChannel:
    """The root's end of a conversation with a worker."""

    def __init__(
        self, address: Address, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]
    ) -> None:
        self.address = str(address)
        self._socket, self._monitor = socket, monitor

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """See `Channel`."""
        parts = [wire.encode(message)] if raw is None else [wire.encode(message), raw]
        deadline = time.monotonic() + _SEND_SECONDS
        while True:
            with suppress(zmq.Again):
                self._socket.send_multipart(parts, zmq.NOBLOCK)
                return
            if not self._wait(zmq.POLLOUT, deadline):
                raise LostError(f"it took nothing for {_SEND_SECONDS:.0f} s", self.address)

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """See `Channel`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._wait(zmq.POLLIN, deadline):
            raise LostError(f"it did not answer in {timeout:.0f} s", self.address)
        return _parse(self._socket.recv_multipart())

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Waits until the socket can be read or written; whether it can."""
        watched = [(self._socket, event), (self._monitor, zmq.POLLIN)]
        ready = [s for s, _ in zmq.zmq_poll(watched, _milliseconds(deadline))]
        # What a peer said before it went is still there to be read.
        if self._monitor in ready and self._socket not in ready:
            recv_monitor_message(self._monitor)
            raise LostError(CLOSED, self.address)
        return bool(ready)

    def close(self, last: Message | None = None) -> None:
        """See `Channel`."""
        if last is not None:
            with suppress(zmq.ZMQError):
                self._socket.send(wire.encode(last), zmq.NOBLOCK)
        _close(self._socket, self._monitor, _GOODBYE_MS)


class ZmqDialer:
    """How a root reaches workers."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def connect(self, address: Address) -> Channel:
        """A channel to a worker.

        Raises:
            NodeError: nobody is there, or somebody else is.
        """
        socket = _socket(self._context, zmq.DEALER, wire.HARD_LIMIT)
        socket.sndhwm = _WEIGHTS_AHEAD
        events = _LOST | _REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        monitor = socket.get_monitor_socket(events)
        socket.connect(_url(address))
        try:
            if not monitor.poll(int(CONNECT_SECONDS * 1000)):
                raise errors.NodeError(
                    f"nobody answers at {address}; is the worker running, and is that its "
                    f"address? start it with: pyllama-dist worker --port {address.port}"
                )
            if recv_monitor_message(monitor)["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise errors.NodeError(
                    f"what listens at {address} is not a pyllama-dist worker; check the port"
                )
        except BaseException:
            _close(socket, monitor)
            raise
        return _DealerChannel(address, socket, monitor)

    def mesh(self) -> Mesh:
        """The root's data connections. It never listens."""
        return ZmqMesh(self._context, host="127.0.0.1")

    def close(self) -> None:
        """Lets last messages leave and frees the sockets' thread."""
        self._context.term()


class _RouterChannel:
    """A worker's end of the conversation with its root."""

    def __init__(self, listener: "ZmqListener", identity: bytes, address: str) -> None:
        self.address = address
        self.listener, self.identity = listener, identity

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """See `Channel`."""
        del raw  # a worker sends none
        try:
            self.listener.socket.send_multipart([self.identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            raise LostError(CLOSED, ROOT) from None

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """See `Channel`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not self.listener.socket.poll(_milliseconds(deadline)):
                raise LostError(f"it said nothing for {timeout:.0f} s", ROOT)
            identity, *frames = self.listener.socket.recv_multipart()
            if identity == self.identity:
                return _parse(frames)
            self.listener.refuse(identity, frames, busy_with=self.address)

    def close(self, last: Message | None = None) -> None:
        """See `Channel`."""
        if last is not None:
            self.listener.answer(self.identity, last)
        self.listener.forget(self.identity)


class ZmqListener:
    """A worker's public door."""

    def __init__(self, host: str, port: int) -> None:
        """Listens.

        Args:
            host: name or address of the interface.
            port: 0 chooses a free one.

        Raises:
            NodeError: the port is taken, or the host is not this machine's.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._host = host
        self.socket = _socket(self._context, zmq.ROUTER, wire.HARD_LIMIT)
        self.socket.router_mandatory = 1
        self.socket.rcvhwm = _WEIGHTS_AHEAD
        try:
            self._address = Address(host, _bind(self.socket, host, port))
        except zmq.ZMQError as error:
            self.socket.close()
            self._context.term()
            taken = error.errno == zmq.EADDRINUSE
            remedy = (
                "another worker may be running; choose another --port, or 0 for any free one"
                if taken
                else "is that an address of this machine?"
            )
            raise errors.NodeError(f"cannot listen on {host}:{port}: {error}; {remedy}") from None
        self.address = str(self._address)
        self.port = self._address.port
        self._monitor = self.socket.get_monitor_socket(_REFUSED | _LOST)
        self._finished: deque[bytes] = deque(maxlen=64)  # whose late messages mean nothing
        self._known = 0  # connections that have said something, and so may close without a word

    def accept(self) -> tuple[Channel, Message]:
        """See `Listener`."""
        watched = [(self.socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)]
        while True:
            ready = [s for s, _ in zmq.zmq_poll(watched, -1)]
            if self._monitor in ready:
                self._report(recv_monitor_message(self._monitor)["event"])
            if self.socket not in ready:
                continue
            identity, *frames = self.socket.recv_multipart()
            try:
                message, _ = _parse(frames)
                if isinstance(message, Hello):
                    self._known += 1
                    return _RouterChannel(self, identity, _peer(identity)), message
                reason = f"{type(message).__name__} before hello"
            except errors.ProtocolError as error:
                reason = str(error)
            if identity not in self._finished:
                log.warning("refused a peer: %s", reason)
                self._known += 1
                self.forget(identity)
                self._refuse(identity, reason)

    def mesh(self) -> Mesh:
        """See `Listener`."""
        return ZmqMesh(self._context, self._host)

    def refuse(self, identity: bytes, frames: list[bytes], busy_with: str) -> None:
        """Answers somebody who is not the root that is served."""
        if identity in self._finished:
            return
        self._known += 1
        self.forget(identity)
        try:
            _parse(frames)
            self._refuse(identity, f"busy: this worker serves the root {busy_with}; try later")
        except errors.ProtocolError as error:
            log.warning("refused a peer: %s", error)
            self._refuse(identity, str(error))

    def forget(self, identity: bytes) -> None:
        """From now on nothing but a new hello counts from this peer."""
        self._finished.append(identity)

    def close(self) -> None:
        """Stops listening."""
        _close(self.socket, self._monitor, _GOODBYE_MS)
        self._context.term()

    def answer(self, identity: bytes, message: Message) -> None:
        """Says something to a peer if it can take it at once."""
        with suppress(zmq.ZMQError):
            self.socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)

    def _refuse(self, identity: bytes, reason: str) -> None:
        self.answer(identity, Error(Phase.HELLO, reason[:4096]))

    def _report(self, event: int) -> None:
        if event == _LOST and self._known:
            self._known -= 1
        else:
            log.warning(
                "dropped a connection to %s: it does not speak ZeroMQ, or sent a frame above "
                "%d MiB; only a pyllama-dist root may connect here",
                self.address,
                wire.HARD_LIMIT >> 20,
            )


def _peer(identity: bytes) -> str:
    return f"#{identity.hex()[-4:]}"


def _bind(socket: zmq.Socket[bytes], host: str, port: int) -> int:
    """Binds and returns the port, which ZeroMQ chooses if it is 0."""
    socket.bind(f"tcp://{f'[{host}]' if ':' in host else host}:{port or '*'}")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    return int(endpoint.rpartition(":")[2])


class ZmqMesh:
    """The data connections of one node."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", host: str) -> None:
        self._context, self._host = context, host
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
        self._bound: set[int] = set()
        self._names: Sequence[str] = ()

    def bind(self, nodes: Sequence[int]) -> list[int]:
        """See `Mesh`."""
        ports = []
        for node in nodes:
            socket = self._open(node)
            ports.append(_bind(socket, self._host, 0))
            self._bound.add(node)
        return ports

    def connect(self, peers: Mapping[int, Address]) -> None:
        """See `Mesh`."""
        for node, address in peers.items():
            try:
                self._open(node).connect(_url(address))
            except zmq.ZMQError as error:
                raise errors.NodeError(f"cannot connect to {address}: {error}") from None

    def greet(self, session: bytes, node: int, names: Sequence[str], timeout: float) -> None:
        """See `Mesh`."""
        self._names = names
        deadline = time.monotonic() + timeout
        link = wire.encode(Link(session, node))
        # Who connects speaks first: only then does the other end know that it is not alone.
        for peer in self._sockets:
            if peer not in self._bound:
                self._send(peer, link, deadline)
        for peer, socket in self._sockets.items():
            if not socket.poll(_milliseconds(deadline)):
                raise LostError(
                    f"no data connection after {timeout:.0f} s; does a firewall stand between?",
                    names[peer],
                )
            theirs = wire.decode(socket.recv())
            if theirs != Link(session, peer):
                raise errors.ProtocolError(f"a stranger spoke for {names[peer]}: {theirs!r}")
            if peer in self._bound:
                self._send(peer, link, deadline)

    def send(self, node: int, frame: memoryview) -> None:
        """See `Mesh`."""
        self._send(node, frame, time.monotonic() + _SEND_SECONDS)

    def receive(
        self, frames: Mapping[int, memoryview], timeout: float
    ) -> Iterator[tuple[int, int]]:
        """See `Mesh`."""
        deadline = time.monotonic() + timeout
        pending = dict(frames)
        while True:
            for node in list(pending):
                try:
                    received = self._sockets[node].recv_into(pending[node], flags=zmq.NOBLOCK)
                except zmq.Again:
                    continue
                del pending[node]
                yield node, received
            if not pending:
                return
            watched = [(self._sockets[node], zmq.POLLIN) for node in pending]
            if not self._poll(watched, deadline):
                names = ", ".join(self._names[node] for node in pending)
                raise LostError(f"sent nothing for {timeout:.0f} s", names)

    def wait(self, channel: Channel) -> tuple[Message, Raw]:
        """See `Mesh`."""
        if not isinstance(channel, _RouterChannel):
            raise TypeError("only a worker waits for a root")
        try:
            while True:
                self._poll([(channel.listener.socket, zmq.POLLIN)], None)
                try:
                    return channel.receive(0)
                except LostError:
                    continue  # it was somebody else, and has been refused
        except LostError as lost:
            # A peer that ends a session in good order closes its connection too.
            try:
                message, raw = channel.receive(_GOODBYE_MS / 1000)
            except LostError:
                raise lost from None
            if isinstance(message, Bye | Error):
                return message, raw
            raise

    def close(self) -> None:
        """See `Mesh`."""
        for node, socket in self._sockets.items():
            _close(socket, self._monitors[node])
        self._sockets, self._monitors = {}, {}

    def _open(self, node: int) -> zmq.Socket[bytes]:
        # PAIR takes one peer and no other: a stranger can neither hear nor speak in between.
        socket = _socket(self._context, zmq.PAIR, wire.MAX_DATA)
        socket.reconnect_ivl = -1
        self._sockets[node] = socket
        self._monitors[node] = socket.get_monitor_socket(_LOST)
        return socket

    def _send(self, node: int, frame: Raw, deadline: float) -> None:
        socket = self._sockets[node]
        while True:
            with suppress(zmq.Again):
                # Copied: the pipe is written again before ZeroMQ's own thread has sent a frame.
                socket.send(frame, zmq.NOBLOCK, copy=True)
                return
            if not self._poll([(socket, zmq.POLLOUT)], deadline):
                raise LostError("no room to send to it; is it reachable?", self._names[node])

    def _poll(self, sockets: Sequence[_Watched], deadline: float | None) -> bool:
        """Waits until one of the sockets can be read or written; whether one can.

        Raises:
            LostError: a peer is gone.
        """
        watched = [*sockets, *((monitor, zmq.POLLIN) for monitor in self._monitors.values())]
        ready = {s for s, _ in zmq.zmq_poll(watched, _milliseconds(deadline))}
        for node, monitor in self._monitors.items():
            if monitor in ready:
                recv_monitor_message(monitor)
                raise LostError(CLOSED, self._names[node])
        return bool(ready)

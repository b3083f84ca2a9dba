"""The data connections of one node: a PAIR for each other node."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import zmq

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Bye, Error, Link, Message
from pyllama_dist.net.transport import ROOT, Address, Channel, LostError, Raw
from pyllama_dist.net.zeromq.sockets import (
    CLOSED,
    GOODBYE_MS,
    LOST,
    NOBLOCK,
    SPIN,
    Context,
    Socket,
    Watched,
    bind,
    close_socket,
    connect,
    events,
    open_socket,
    poll,
    readable,
    yield_core,
)


@dataclass
class _Peer:
    """A data connection."""

    socket: Socket
    monitor: Socket
    bound: bool = False  # this node listens, and the peer connects
    connection: int | None = None  # the peer's, among those that strangers may have tried


@runtime_checkable
class _Pollable(Protocol):
    """A worker's channel to its root, which can be waited for together with the peers."""

    @property
    def sources(self) -> list[Watched]: ...

    def take(self) -> tuple[Message, Raw] | None: ...


class ZmqMesh:
    """See `Mesh`."""

    def __init__(self, context: Context, host: str) -> None:
        self._context, self._host = context, host
        self._peers: dict[int, _Peer] = {}
        self._names: Sequence[str] = ()

    def bind(self, nodes: Sequence[int]) -> list[int]:
        """See `Mesh`."""
        ports = []
        for node in nodes:
            peer = self._open(node)
            peer.bound = True
            ports.append(bind(peer.socket, self._host, 0))
        return ports

    def connect(self, peers: Mapping[int, Address]) -> None:
        """See `Mesh`."""
        for node, address in peers.items():
            connect(self._open(node).socket, address)

    def greet(self, session: bytes, node: int, names: Sequence[str], timeout: float) -> None:
        """See `Mesh`."""
        self._names = names
        deadline = time.monotonic() + timeout
        link = wire.encode(Link(session, node))
        # Who connects speaks first: only then does the other end know that it is not alone.
        for other, peer in self._peers.items():
            if not peer.bound:
                self._send(other, link, deadline)
        for other, peer in self._peers.items():
            if not poll([(peer.socket, zmq.POLLIN)], deadline):
                raise LostError(
                    f"no data connection after {timeout:.0f} s; does a firewall stand between?",
                    names[other],
                )
            frame = peer.socket.recv(copy=False)
            theirs = wire.decode(frame.buffer)
            if theirs != Link(session, other):
                raise ProtocolError(f"a stranger spoke for {names[other]}: {theirs!r}")
            peer.connection = int(frame.get(zmq.SRCFD))
            if peer.bound:
                self._send(other, link, deadline)

    def exchange(
        self,
        to: Sequence[int],
        frame: memoryview,
        frames: Mapping[int, memoryview],
        timeout: float,
    ) -> list[tuple[int, int]]:
        """See `Mesh`."""
        started = time.monotonic()
        for node in to:
            self._send(node, frame, started + timeout)
        started = time.monotonic()
        pending, found = list(frames), []
        while True:
            late = []
            for node in pending:
                socket = self._peers[node].socket
                if readable(socket):
                    found.append((node, socket.recv_into(frames[node], flags=NOBLOCK)))
                else:
                    late.append(node)
            if not late:
                return found
            pending = late
            if time.monotonic() < started + SPIN:
                yield_core()
                continue
            watched = [(self._peers[node].socket, zmq.POLLIN) for node in pending]
            deadline = started + timeout
            if time.monotonic() > deadline or not self._poll(watched, deadline):
                names = ", ".join(self._names[node] for node in pending)
                raise LostError(f"sent nothing for {timeout:.0f} s", names)

    def wait(self, channel: Channel, timeout: float | None) -> tuple[Message, Raw]:
        """See `Mesh`."""
        if not isinstance(channel, _Pollable):
            raise TypeError("only a worker waits for a root")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                if not self._poll(channel.sources, deadline):
                    raise LostError(f"it said nothing for {timeout:.0f} s", ROOT)
                if (taken := channel.take()) is not None:
                    return taken
        except LostError as lost:
            # A peer that ends a session in good order closes its connection too.
            try:
                message, raw = channel.receive(GOODBYE_MS / 1000)
            except LostError:
                raise lost from None
            if isinstance(message, Bye | Error):
                return message, raw
            raise

    def check(self) -> None:
        """See `Mesh`."""
        self._poll([], time.monotonic())

    def close(self) -> None:
        """See `Mesh`."""
        for peer in self._peers.values():
            close_socket(peer.socket, peer.monitor)
        self._peers = {}

    def _open(self, node: int) -> _Peer:
        # PAIR takes one peer and no other: a stranger can neither hear nor speak in between.
        socket, monitor = open_socket(self._context, zmq.PAIR, wire.MAX_DATA, LOST)
        socket.reconnect_ivl = -1
        self._peers[node] = _Peer(socket, monitor)
        return self._peers[node]

    def _send(self, node: int, frame: Raw, deadline: float) -> None:
        socket = self._peers[node].socket
        while True:
            try:
                # Copied: the pipe is written again before ZeroMQ's own thread has sent a frame.
                socket.send(frame, NOBLOCK, copy=True)
                return
            except zmq.Again:
                pass
            if time.monotonic() > deadline or not self._poll([(socket, zmq.POLLOUT)], deadline):
                raise LostError("no room to send to it; is it reachable?", self._names[node])

    def _poll(self, watched: Sequence[Watched], deadline: float | None) -> bool:
        """Waits until one of the sockets is ready, or a stranger was turned away; whether so.

        Raises:
            LostError: a peer is gone.
        """
        monitors = [(peer.monitor, zmq.POLLIN) for peer in self._peers.values()]
        ready = poll([*watched, *monitors], deadline)
        for node, peer in self._peers.items():
            if peer.monitor not in ready:
                continue
            for _, connection in events(peer.monitor):
                if peer.connection in (None, connection):
                    if not self._names:
                        raise NodeError("a node was lost before it said who it is")
                    raise LostError(CLOSED, self._names[node])
        return bool(ready)

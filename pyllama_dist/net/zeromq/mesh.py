"""The data connections of one node: a PAIR for each other node."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import zmq

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Bye, Error, Link, Message
from pyllama_dist.net.transport import ROOT, Channel, Endpoint, LostError, Raw
from pyllama_dist.net.zeromq.endpoints import bind_endpoint, url
from pyllama_dist.net.zeromq.sockets import (
    CLOSED,
    GOODBYE_MS,
    LOST,
    NOBLOCK,
    Context,
    Socket,
    Watched,
    close_socket,
    connect,
    events,
    open_socket,
    poll,
    readable,
    yield_core,
)

# Seconds of busy-polling before a receive blocks: waking a blocked thread takes longer. The thread
# yields its core between two polls. If a yield takes longer than `CROWDED` seconds, other threads
# need the core, and it stops polling.
BUSY_POLL, CROWDED = 1e-3, 1e-4
# After a poll that did not receive everything, the next N exchanges block at once: a yield
# does not always free the core for those who need it. N doubles each time, from the first value up
# to the second.
BACKOFF = 32, 4096
# A frame above this size may not fit into the kernel's socket buffer. libzmq's I/O thread sends the
# rest when it is scheduled: a node that computes meanwhile keeps it, and so its peers, waiting for
# milliseconds (prompts on 2 nodes of one thread: a third slower). So an exchange waits for it.
_LARGE = 1 << 16
NAP_MS = 50  # a receive blocks for so long before it checks that all peers are connected


@dataclass
class _Peer:
    """A data connection."""

    socket: Socket
    monitor: Socket
    bound: bool = False  # whether this node bound the endpoint and the peer connects
    port: int = 0  # of the end that is bound
    connection: int | None = None  # descriptor of the peer's connection; others are strangers'


@runtime_checkable
class _Pollable(Protocol):
    """A worker's channel to its root, which can be polled together with the peers."""

    @property
    def sources(self) -> list[Watched]: ...

    def take(self) -> tuple[Message, Raw] | None: ...


class ZmqMesh:
    """See `Mesh`."""

    def __init__(self, context: Context, host: str, ports: Sequence[int] = (0,)) -> None:
        """A mesh.

        Args:
            context: of all its sockets.
            host: where data connections are waited for.
            ports: those that they may use, one each; 0: any free one.
        """
        self._context, self._host, self._ports = context, host, ports
        self._peers: dict[int, _Peer] = {}
        self.names: Sequence[str] = ()
        self._blocking = 0  # the next exchanges that block without polling
        self._next_blocking = BACKOFF[0]

    def bind(self, nodes: Sequence[int]) -> list[Endpoint]:
        """See `Mesh`."""
        endpoints = []
        for node in nodes:
            peer = self._open(node)
            peer.bound = True
            endpoint = bind_endpoint(peer.socket, self._host, self._ports)
            peer.port = endpoint[0]
            endpoints.append(endpoint)
        return endpoints

    def connect(self, peers: Mapping[int, tuple[str, Endpoint]]) -> None:
        """See `Mesh`."""
        for node, (host, endpoint) in peers.items():
            peer = self._open(node)
            peer.port = endpoint[0]
            connect(peer.socket, url(host, endpoint))

    def greet(self, session: bytes, node: int, names: Sequence[str], timeout: float) -> None:
        """See `Mesh`."""
        self.names = names
        deadline = time.monotonic() + timeout
        link = wire.encode(Link(session, node))
        # The end that connects sends first: only then does the bound end know that it has a peer.
        for other, peer in self._peers.items():
            if not peer.bound:
                self._meet(other, zmq.POLLOUT, deadline, names[other])
                self._send(other, link, deadline)
        for other, peer in self._peers.items():
            self._meet(other, zmq.POLLIN, deadline, names[max(node, other)])
            frame = peer.socket.recv(copy=False)
            theirs = wire.decode(frame.buffer)
            if theirs != Link(session, other):
                raise ProtocolError(f"a stranger spoke for {names[other]}: {theirs!r}")
            peer.connection = int(frame.get(zmq.SRCFD))
            if peer.bound:
                self._send(other, link, deadline)

    def exchange(
        self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview], timeout: float
    ) -> list[tuple[int, int]]:
        """See `Mesh`."""
        deadline = time.monotonic() + timeout
        leaving = [(node, self._send(node, frame, deadline)) for node, frame in sends.items()]
        if sends:
            yield_core()  # to libzmq's I/O thread, which might not run before this thread blocks
        deadline = time.monotonic() + timeout
        found = self._busy_poll(receives)
        late = [node for node in receives if node not in found]
        while late:
            try:
                found[late[0]] = self._peers[late[0]].socket.recv_into(receives[late[0]])
                del late[0]
            except zmq.Again:
                self.check()
                if time.monotonic() > deadline:
                    names = [self.names[i] for i in late if not readable(self._peers[i].socket)]
                    if names:
                        detail = f"sent nothing for {timeout:.0f} s"
                        raise LostError(detail, ", ".join(names)) from None
        for node, tracker in leaving:
            if tracker is not None:
                self._wait_sent(node, tracker, deadline)
        return list(found.items())

    def _busy_poll(self, frames: Mapping[int, memoryview]) -> dict[int, int]:
        """Busy-polls for a bounded time; returns the bytes received, by peer."""
        found: dict[int, int] = {}
        if not frames:
            return found
        if self._blocking:
            self._blocking -= 1
            return found
        polled = now = time.monotonic()
        end = now + BUSY_POLL
        while now < end and now - polled < CROWDED:
            for node, memory in frames.items():
                if node not in found and readable(socket := self._peers[node].socket):
                    found[node] = socket.recv_into(memory, flags=NOBLOCK)
            if len(found) == len(frames):
                self._next_blocking = BACKOFF[0]
                return found
            polled = time.monotonic()
            yield_core()
            now = time.monotonic()
        self._blocking = self._next_blocking
        self._next_blocking = min(2 * self._blocking, BACKOFF[1])
        return found

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
        # A PAIR accepts one peer only, so a stranger can neither read nor send on its connection.
        socket, monitor = open_socket(self._context, zmq.PAIR, wire.MAX_DATA, LOST)
        socket.reconnect_ivl = -1
        socket.rcvtimeo = NAP_MS
        self._peers[node] = _Peer(socket, monitor)
        return self._peers[node]

    def _meet(self, node: int, event: int, deadline: float, where: str) -> None:
        """Waits until a new peer can be sent to (POLLOUT), or has sent (POLLIN).

        Raises:
            LostError: a peer is gone, or this one cannot be met in time.
        """
        socket = self._peers[node].socket
        while not socket.poll(0, event):
            if not self._poll([(socket, event)], deadline) and time.monotonic() >= deadline:
                raise LostError(
                    f"no data connection came about; does a firewall close port "
                    f"{self._peers[node].port} of {where}? choose others there: worker "
                    f"--data-ports 9991-9999",
                    self.names[node],
                )

    def _send(self, node: int, frame: Raw, deadline: float) -> zmq.MessageTracker | None:
        socket, large = self._peers[node].socket, len(frame) > _LARGE
        while True:
            try:
                # A small frame is copied: its region may be overwritten before libzmq sends it.
                return socket.send(frame, NOBLOCK, copy=not large, track=large)
            except zmq.Again:
                pass
            if time.monotonic() > deadline or not self._poll([(socket, zmq.POLLOUT)], deadline):
                raise LostError("no room to send to it; is it reachable?", self.names[node])

    def _wait_sent(self, node: int, tracker: zmq.MessageTracker, deadline: float) -> None:
        """Waits until libzmq has released a frame's buffer: sent it, or lost the connection."""
        while True:
            with suppress(zmq.NotDone):
                tracker.wait(NAP_MS / 1000)
                return
            self.check()
            if time.monotonic() > deadline:
                raise LostError("it does not take what is sent", self.names[node])

    def _poll(self, watched: Sequence[Watched], deadline: float | None) -> bool:
        """Waits until a socket is ready or a connection has changed; False at the deadline.

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
                    if not self.names:
                        raise NodeError("a node was lost before it said who it is")
                    raise LostError(CLOSED, self.names[node])
        return bool(ready)

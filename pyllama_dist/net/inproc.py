"""The transport within one process: the same bytes, through queues. For tests and for teaching.

Every node runs in a thread of its own; a `Hub` is the network between them.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from pyllama_dist.errors import ProtocolError
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Link, Message
from pyllama_dist.net.transport import ROOT, Address, Channel, Endpoint, LostError, Mesh, Raw


class _Inbox:
    """Frames on their way to one reader, each with the name of its sender."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: deque[tuple[object, tuple[bytes, ...]]] = deque()
        self._gone: list[object] = []

    def put(self, sender: object, frames: tuple[bytes, ...]) -> None:
        with self._changed:
            self._frames.append((sender, frames))
            self._changed.notify_all()

    def leave(self, sender: object) -> None:
        with self._changed:
            self._gone.append(sender)
            self._changed.notify_all()

    def get(
        self, senders: set[object], deadline: float | None
    ) -> tuple[object, tuple[bytes, ...]] | None:
        """The next frames from one of these senders; None at the deadline.

        Raises:
            LookupError: a sender is gone and has left nothing unread.
        """
        with self._changed:
            while True:
                for i, (sender, frames) in enumerate(self._frames):
                    if sender in senders:
                        del self._frames[i]
                        return sender, frames
                if self._gone:
                    raise LookupError(self._gone[0])
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)


class _InprocChannel:
    """One end of a conversation."""

    def __init__(self, address: str, inbox: _Inbox, outbox: _Inbox) -> None:
        self.address, self._inbox, self._outbox = address, inbox, outbox

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """See `Channel`."""
        frames = (wire.encode(message),) if raw is None else (wire.encode(message), bytes(raw))
        self._outbox.put("peer", frames)

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """See `Channel`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            found = self._inbox.get({"peer"}, deadline)
        except LookupError:
            raise LostError("it closed the connection", self.address) from None
        if found is None:
            raise LostError(f"it said nothing for {timeout:.0f} s", self.address)
        frames = found[1]
        return wire.decode(frames[0]), frames[1] if len(frames) > 1 else b""

    def close(self, last: Message | None = None) -> None:
        """See `Channel`."""
        if last is not None:
            self.send(last)
        self._outbox.leave("peer")


class Hub:
    """A network within one process."""

    def __init__(self) -> None:
        self._ports = itertools.count(1)
        self._listeners: dict[int, InprocListener] = {}
        self.data: dict[
            int, tuple[InprocMesh, int]
        ] = {}  # port: the mesh that listens, and the node it expects

    def listen(self) -> "InprocListener":
        """The listener of a new worker."""
        listener = InprocListener(self, self.port())
        self._listeners[listener.port] = listener
        return listener

    def port(self) -> int:
        """A free port."""
        return next(self._ports)

    def connect(self, address: Address) -> Channel:
        """See `Dialer`."""
        ours, theirs = _Inbox(), _Inbox()
        self._listeners[address.port].knock(_InprocChannel(ROOT, theirs, ours))
        return _InprocChannel(str(address), ours, theirs)

    def mesh(self) -> Mesh:
        """See `Dialer`."""
        return InprocMesh(self)


class InprocListener:
    """See `Listener`."""

    def __init__(self, hub: Hub, port: int) -> None:
        self._hub, self.port = hub, port
        self.address = str(Address("inproc", port))
        self._callers: deque[Channel] = deque()
        self._knocked = threading.Semaphore(0)
        self._closed = False

    def knock(self, channel: Channel) -> None:
        """A root comes."""
        self._callers.append(channel)
        self._knocked.release()

    def accept(self) -> tuple[Channel, Message]:
        """See `Listener`.

        Raises:
            LostError: the listener was closed.
        """
        self._knocked.acquire()
        if self._closed:
            raise LostError("the listener is closed", self.address)
        channel = self._callers.popleft()
        return channel, channel.receive(None)[0]

    def mesh(self) -> Mesh:
        """See `Listener`."""
        return InprocMesh(self._hub)

    def close(self) -> None:
        """See `Listener`."""
        self._closed = True
        self._knocked.release()


class InprocMesh:
    """The data connections of one node. See `Mesh`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._inbox = _Inbox()
        self._peers: dict[int, InprocMesh] = {}
        self._node = -1
        self.names: Sequence[str] = ()

    def bind(self, nodes: Sequence[int]) -> list[Endpoint]:
        """See `Mesh`."""
        ports = [self._hub.port() for _ in nodes]
        for node, port in zip(nodes, ports, strict=True):
            self._hub.data[port] = (self, node)
        return [(port, "") for port in ports]

    def connect(self, peers: Mapping[int, tuple[str, Endpoint]]) -> None:
        """See `Mesh`."""
        for node, (_, (port, _)) in peers.items():
            other, me = self._hub.data.pop(port)
            self._peers[node], other._peers[me] = other, self

    def greet(self, session: bytes, node: int, names: Sequence[str], timeout: float) -> None:
        """See `Mesh`."""
        self._node, self.names = node, names
        deadline = time.monotonic() + timeout
        others = [i for i in range(len(names)) if i != node]
        while len(self._peers) < len(others):
            if time.monotonic() > deadline:
                raise LostError("not all nodes have connected", names[0])
            time.sleep(0.001)
        for peer in others:
            self._peers[peer]._inbox.put(node, (wire.encode(Link(session, node)),))
        for peer in others:
            frames = self._next({peer}, deadline, timeout)[1]
            if wire.decode(frames[0]) != Link(session, peer):
                raise ProtocolError(f"a stranger spoke for {names[peer]}")

    def exchange(
        self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview], timeout: float
    ) -> list[tuple[int, int]]:
        """See `Mesh`."""
        for node, frame in sends.items():
            self._peers[node]._inbox.put(self._node, (bytes(frame),))
        deadline = time.monotonic() + timeout
        pending, found = set(receives), []
        while pending:
            node, (data,) = self._next(pending, deadline, timeout)
            pending.discard(node)
            receives[node][: len(data)] = data[: len(receives[node])]
            found.append((node, len(data)))
        return found

    def wait(self, channel: Channel, timeout: float | None) -> tuple[Message, Raw]:
        """See `Mesh`. Peers are not watched: within a process none is lost unseen."""
        return channel.receive(timeout)

    def check(self) -> None:
        """See `Mesh`."""

    def close(self) -> None:
        """See `Mesh`."""
        for peer in self._peers.values():
            peer._inbox.leave(self._node)
        self._peers = {}

    def _next(
        self, nodes: set[int], deadline: float, timeout: float
    ) -> tuple[int, tuple[bytes, ...]]:
        try:
            found = self._inbox.get(set(nodes), deadline)
        except LookupError as gone:
            name = self.names[gone.args[0]]
            raise LostError("it closed the connection", name) from None
        if found is None:
            names = ", ".join(self.names[node] for node in sorted(nodes))
            raise LostError(f"sent nothing for {timeout:.0f} s", names)
        sender, frames = found
        if not isinstance(sender, int):
            raise TypeError(sender)
        return sender, frames

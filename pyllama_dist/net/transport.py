"""What a way of travelling must offer. Two do: `zeromq`, and `inproc` within one process."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyllama_dist.errors import NodeError, UsageError
from pyllama_dist.net.messages import Message

Raw = bytes | memoryview
# Where a node accepts a data connection: a TCP port, and the name of an abstract Unix socket or "".
Endpoint = tuple[int, str]

_ADDRESS = re.compile(
    r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<ipv6>[0-9A-Fa-f:.%a-z]+)\]):(?P<port>[0-9]{1,5})"
)

ROOT = "the root"  # its name: it has no address


@dataclass(frozen=True)
class Address:
    """Where a worker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """`host:port`, or `[host]:port` for IPv6.

        Raises:
            UsageError: it is neither.
        """
        if (found := _ADDRESS.fullmatch(text)) is None or not 0 < int(found["port"]) < 65536:
            raise UsageError(f"{text!r} is not an address: write host:port, as in 10.0.0.2:9990")
        return cls(found["name"] or found["ipv6"], int(found["port"]))


class LostError(NodeError):
    """A peer closed its connection, fell silent, or missed a deadline.

    Attributes:
        detail: what happened.
        culprit: the peer by name; several, joined by ", ".
        reporter: the node that met it, by name; empty: this one.
    """

    def __init__(self, detail: str, culprit: str, reporter: str = "") -> None:
        super().__init__(f"lost {culprit}: {detail}")
        self.detail, self.culprit, self.reporter = detail, culprit, reporter


class Channel(Protocol):
    """Control messages to and from one peer."""

    address: str

    def send(self, message: Message, raw: Raw | None = None) -> None:
        """Sends a message, with a raw frame if there is one.

        Raises:
            LostError: there is no room to send within the deadline of `HELLO`.
        """

    def receive(self, timeout: float | None) -> tuple[Message, Raw]:
        """The next message and its raw frame (empty if it has none).

        Args:
            timeout: seconds; None waits without end.

        Raises:
            LostError: nothing came in time, or the peer is gone.
            ProtocolError: what came is not a message.
        """

    def close(self, last: Message | None = None) -> None:
        """Ends the conversation, with a last message if the peer can take it at once."""


class Mesh(Protocol):
    """The data connections of one node to all others."""

    names: Sequence[str]  # addresses of all nodes, known once they have greeted each other

    def bind(self, nodes: Sequence[int]) -> list[Endpoint]:
        """Binds an endpoint for each of these nodes to connect to."""

    def connect(self, peers: Mapping[int, tuple[str, Endpoint]]) -> None:
        """Connects to these nodes, each at its host and its endpoint."""

    def greet(self, session: bytes, node: int, names: Sequence[str], timeout: float) -> None:
        """Tells all peers who this is and checks who they are.

        Args:
            session: what all nodes of a session know.
            node: this node.
            names: addresses of all nodes, for errors.
            timeout: seconds for all.
        """

    def exchange(
        self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview], timeout: float
    ) -> list[tuple[int, int]]:
        """Sends a frame to each of some nodes, then receives one from each of some, in any order.

        It may busy-poll for a short time before it blocks.

        Args:
            sends: for each node that is sent to, its frame; that memory may be written again when
                this returns.
            receives: for each node that sends, where its frame goes.
            timeout: seconds for sending, and again for receiving.

        Returns:
            The nodes that sent, each with the bytes that it sent, in the order in which they came.

        Raises:
            LostError: a peer (any peer, not only these) is gone, or some missed the deadline.
        """

    def wait(self, channel: Channel, timeout: float | None) -> tuple[Message, Raw]:
        """The next message of a channel, watching all peers meanwhile.

        Args:
            channel: to the root.
            timeout: seconds; None waits without end.

        Raises:
            LostError: a peer is gone, or the root said nothing in time.
        """

    def check(self) -> None:
        """Looks after the peers, without waiting.

        Raises:
            LostError: a peer is gone.
        """

    def close(self) -> None:
        """Closes all connections."""


class Listener(Protocol):
    """A worker's public socket."""

    address: str

    def accept(self) -> tuple[Channel, Message]:
        """Waits for the first message of a peer; until the channel is closed it is the only one."""

    def mesh(self) -> Mesh:
        """A mesh that is reachable at the same host."""

    def close(self) -> None:
        """Stops listening."""


class Dialer(Protocol):
    """How a root reaches workers."""

    def connect(self, address: Address) -> Channel:
        """A channel to a worker."""

    def mesh(self) -> Mesh:
        """A mesh for the root."""

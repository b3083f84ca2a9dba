"""The exchanges of a step. All nodes make them in the same order: first they send."""

from dataclasses import dataclass
from typing import Protocol

from pyllama_dist.errors import ProtocolError
from pyllama_dist.net.frames import HEAD, check_frame, write_head
from pyllama_dist.net.transport import Mesh
from pyllama_dist.program import SyncKind


class Slots(Protocol):
    """What an exchange needs to know of a pipe: the frame of each slot, as it lies in memory."""

    def frame(self, slot: int, rows: int, head: int) -> memoryview:
        """The first rows of a slot, with `head` bytes before them."""


@dataclass(frozen=True)
class Partners:
    """Whom a node sends to and hears from in an exchange."""

    own: int  # the slot that it sends
    to: tuple[int, ...]  # nodes
    sources: dict[int, int]  # node: the slot that it sends


def partners(kind: SyncKind, node: int, n_nodes: int) -> Partners:
    """One node's part in an exchange.

    Args:
        kind: who sends to whom.
        node: whose part.
        n_nodes: all nodes.
    """
    # Each node begins with the one after it, so that not all of them send to the same one.
    others = tuple((node + i) % n_nodes for i in range(1, n_nodes))
    match kind:
        case SyncKind.WITH_ROOT:
            return Partners(0, () if node else others, {0: 0} if node else {})
        case SyncKind.NODE_SLICES:
            return Partners(node, others, {i: i for i in others})
        case SyncKind.NODE_SLICES_EXCEPT_ROOT:
            return Partners(node, (0,) if node else (), {} if node else {i: i for i in others})


class Exchange:
    """One exchange of a program, in place, made ready once for all steps."""

    def __init__(
        self, mesh: Mesh, kind: SyncKind, pipe: Slots, *, node: int, n_nodes: int, sync: int
    ) -> None:
        """An exchange.

        Args:
            mesh: the connections to all other nodes.
            kind: who sends to whom.
            pipe: its slots.
            node: this node.
            n_nodes: all nodes.
            sync: place of the sync in the program.
        """
        self._mesh, self._pipe, self._node, self._sync = mesh, pipe, node, sync
        part = partners(kind, node, n_nodes)
        self._own, self._to, self._sources = part.own, part.to, part.sources
        self._rows = 0  # that the frames below hold
        self._sent = memoryview(b"")
        self._received: dict[int, memoryview] = {}

    def run(self, rows: int, step: int, timeout: float) -> int:
        """Sends and receives.

        Args:
            rows: rows that travel.
            step: number of the step.
            timeout: seconds to wait for the others.

        Returns:
            Bytes sent and received.

        Raises:
            LostError: a peer is gone or late.
            ProtocolError: a peer is at another step.
        """
        if rows == 0:
            return 0
        if rows != self._rows:
            self._cut(rows)
        if self._to:
            write_head(self._sent, step, self._sync)
        moved = len(self._to) * len(self._sent)
        for other, received in self._mesh.exchange(self._to, self._sent, self._received, timeout):
            try:
                check_frame(self._received[other], received, step, self._sync)
            except ProtocolError as error:
                ends = f"{self._mesh.names[self._node]} and {self._mesh.names[other]}"
                raise ProtocolError(f"the link of {ends}: {error}") from None
            moved += received
        return moved

    def _cut(self, rows: int) -> None:
        """Makes frames of so many rows; most steps have as many as the one before."""
        if self._to:
            self._sent = self._pipe.frame(self._own, rows, HEAD)
        self._received = {
            other: self._pipe.frame(slot, rows, HEAD) for other, slot in self._sources.items()
        }
        self._rows = rows

"""The exchanges of a step. All nodes make them in the same order: first they send."""

from typing import Protocol

from pyllama_dist.errors import ProtocolError
from pyllama_dist.net.frames import HEAD, check_head, write_head
from pyllama_dist.net.transport import Mesh
from pyllama_dist.program import SyncKind


class Slots(Protocol):
    """What an exchange needs to know of a pipe: the frame of each slot, as it lies in memory."""

    def frame(self, slot: int, rows: int, head: int) -> memoryview:
        """The first rows of a slot, with `head` bytes before them."""


def exchange(
    mesh: Mesh,
    kind: SyncKind,
    pipe: Slots,
    *,
    node: int,
    n_nodes: int,
    rows: int,
    step: int,
    sync: int,
    timeout: float,
) -> int:
    """One exchange of a pipe, in place.

    Args:
        mesh: the connections to all other nodes.
        kind: who sends to whom.
        pipe: its slots.
        node: this node.
        n_nodes: all nodes.
        rows: rows that travel.
        step: number of the step.
        sync: place of the sync in the program.
        timeout: seconds to wait for the others.

    Returns:
        Bytes sent and received.

    Raises:
        LostError: a peer is gone or late.
        ProtocolError: a peer is at another step.
    """
    if rows == 0:
        return 0
    others = [i for i in range(n_nodes) if i != node]
    match kind:
        case SyncKind.WITH_ROOT:
            own, to, sources = 0, others if node == 0 else [], {} if node == 0 else {0: 0}
        case SyncKind.NODE_SLICES:
            own, to, sources = node, others, {i: i for i in others}
        case SyncKind.NODE_SLICES_EXCEPT_ROOT:
            own, to = node, [] if node == 0 else [0]
            sources = {i: i for i in others} if node == 0 else {}
    moved = 0
    if to:
        frame = pipe.frame(own, rows, HEAD)
        write_head(frame, step, sync)
        for other in to:
            mesh.send(other, frame, timeout)
            moved += len(frame)
    if sources:
        frames = {other: pipe.frame(slot, rows, HEAD) for other, slot in sources.items()}
        for other, received in mesh.receive(frames, timeout):
            try:
                check_head(frames[other], received, step, sync)
            except ProtocolError as error:
                raise ProtocolError(f"node {other}: {error}") from None
            moved += received
    return moved

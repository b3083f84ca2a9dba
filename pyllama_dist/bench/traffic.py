"""What each node puts on the wire, worked out from its program.

Only the exchanges of steps count, with their heads of 16 bytes; the root's `step` messages and what
ZeroMQ and TCP add are not in it. Workers are not asked: bytes follow from pipes and syncs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyllama_dist.net.collectives import partners
from pyllama_dist.net.frames import HEAD
from pyllama_dist.program import Batch, Program


@dataclass(frozen=True)
class Traffic:
    """Bytes of one node."""

    sent: int = 0
    received: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.received + other.received)


def traffic(programs: Sequence[Program], batches: Iterable[Batch]) -> list[Traffic]:
    """What steps on these batches move.

    Args:
        programs: of some nodes.
        batches: one for each step.

    Returns:
        The bytes of each of these nodes.
    """
    steps = [(len(batch.seqs), len(batch.logits)) for batch in batches]
    return [sum((_of_step(p, *step) for step in steps), Traffic()) for p in programs]


def _of_step(program: Program, n_rows: int, n_logits: int) -> Traffic:
    pipes = {pipe.name: pipe for pipe in program.pipes}
    moved = Traffic()
    for sync in (sync for segment in program.segments for sync in segment.syncs):
        pipe = pipes[sync.pipe]
        rows = {"batch": n_rows, "logits": n_logits}[pipe.rows]
        if rows == 0:
            continue
        part = partners(sync.kind, program.node, program.n_nodes)
        frames = [HEAD + rows * pipe.float_type.row_bytes(width) for width in pipe.widths]
        moved += Traffic(
            sent=len(part.to) * frames[part.own] if part.to else 0,
            received=sum(frames[slot] for slot in part.sources.values()),
        )
    return moved

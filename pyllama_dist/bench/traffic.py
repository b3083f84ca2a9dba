"""What each node puts on the wire, worked out from its program and the schedules of its exchanges.

Only the exchanges of steps count, with their heads of 22 bytes; the root's `step` messages and what
ZeroMQ and TCP add are not in it. Workers are not asked: bytes follow from pipes and schedules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyllama_dist.net.collectives import AUTO, Round, make_schedule
from pyllama_dist.net.frames import HEAD
from pyllama_dist.program import REDUCED, Batch, Pipe, Program


@dataclass(frozen=True)
class Traffic:
    """Bytes of one node, and the messages that it sends."""

    sent: int = 0
    received: int = 0
    messages: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.sent + other.sent, self.received + other.received, self.messages + other.messages
        )


def traffic(
    programs: Sequence[Program], batches: Iterable[Batch], collective: str = AUTO
) -> list[Traffic]:
    """What steps on these batches move.

    Args:
        programs: of some nodes.
        batches: one for each step.
        collective: how sums travel.

    Returns:
        The traffic of each of these nodes.
    """
    steps = [(len(batch.seqs), len(batch.logits)) for batch in batches]
    return [sum((_of_step(p, collective, *step) for step in steps), Traffic()) for p in programs]


def _of_step(program: Program, collective: str, n_rows: int, n_logits: int) -> Traffic:
    pipes = {pipe.name: pipe for pipe in program.pipes}
    moved = Traffic()
    for sync in (sync for segment in program.segments for sync in segment.syncs):
        pipe = pipes[sync.pipe]
        rows = {"batch": n_rows, "logits": n_logits}[pipe.rows]
        if rows:
            for action in make_schedule(sync, pipe, collective, program, rows):
                if isinstance(action, Round):
                    moved += _of_round(action, pipe)
    return moved


def _of_round(action: Round, pipe: Pipe) -> Traffic:
    widths = dict(enumerate(pipe.widths)) | {REDUCED: pipe.widths[-1]}
    sent, received = (
        sum(
            HEAD + sum((p.last - p.first) * pipe.float_type.row_bytes(widths[p.region]) for p in m)
            for m in messages.values()
        )
        for messages in (action.sends, action.receives)
    )
    return Traffic(sent, received, len(action.sends))

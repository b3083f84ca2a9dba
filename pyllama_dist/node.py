"""A node: a program, the executor that runs it, and the connections to the other nodes."""

import time
from dataclasses import dataclass

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.executor import Executor
from pyllama_dist.net.collectives import AUTO, Exchange, make_schedule
from pyllama_dist.net.transport import LostError, Mesh
from pyllama_dist.program import AllReduce, Batch, Program, Rows, Sync


@dataclass
class Spent:
    """What steps have cost a node so far."""

    compute_seconds: float = 0.0
    sync_seconds: float = 0.0  # waiting for others included
    bytes_moved: int = 0

    def __sub__(self, before: "Spent") -> "Spent":
        return Spent(
            self.compute_seconds - before.compute_seconds,
            self.sync_seconds - before.sync_seconds,
            self.bytes_moved - before.bytes_moved,
        )


class Node:
    """Runs steps: segment, exchange, segment, exchange. Root and workers alike."""

    def __init__(
        self,
        program: Program,
        executor: Executor,
        mesh: Mesh | None,
        timeout: float,
        collective: str = AUTO,
    ) -> None:
        """A node.

        Args:
            program: its program.
            executor: made for that program.
            mesh: connections to all other nodes; None if there are none.
            timeout: seconds that each round of an exchange may take.
            collective: how sums travel, see `net.collectives`; the same for all nodes.
        """
        self.program, self.executor, self.mesh = program, executor, mesh
        self.timeout = timeout
        self.spent = Spent()
        self._collective = collective
        self._pipes = {pipe.name: pipe for pipe in program.pipes}
        kinds = dict.fromkeys(sync for segment in program.segments for sync in segment.syncs)
        self._exchanges = {kind: self._exchange(kind) for kind in kinds}

    def step(self, number: int, batch: Batch) -> None:
        """Runs the program on a batch; the batch must have been checked.

        Raises:
            LostError: a peer is gone or late; the message says in which segment.
            ProtocolError: a peer is at another step.
        """
        rows: dict[Rows, int] = {"batch": len(batch.seqs), "logits": len(batch.logits)}
        spent, sync = self.spent, 0
        for kind, exchange in self._exchanges.items():
            if isinstance(kind, AllReduce):
                ready = exchange.reads_reduced(rows[self._pipes[kind.pipe].rows])
                self.executor.memory.reduced[kind.pipe] = ready
        try:
            self.executor.begin(batch)
            for i, segment in enumerate(self.program.segments):
                started = time.perf_counter()
                self.executor.run(i)
                computed = time.perf_counter()
                spent.compute_seconds += computed - started
                if not segment.syncs:
                    continue
                try:
                    for kind in segment.syncs:
                        spent.bytes_moved += self._exchanges[kind].run(
                            rows[self._pipes[kind.pipe].rows], number, sync, self.timeout
                        )
                        sync += 1
                except LostError as lost:
                    where = f"step {number}, after {segment.name}"
                    raise LostError(f"{lost.detail} ({where})", lost.culprit) from None
                except ProtocolError as error:
                    raise ProtocolError(f"{error} (after {segment.name})") from None
                spent.sync_seconds += time.perf_counter() - computed
        finally:
            self.executor.end()

    def _exchange(self, kind: Sync | AllReduce) -> Exchange:
        """What carries out all exchanges of a kind."""
        if self.mesh is None:
            raise NodeError("a program for several nodes, and no connections")
        node, pipe = self.program.node, self._pipes[kind.pipe]
        return Exchange(
            self.mesh,
            self.executor.memory.pipes[kind.pipe],
            lambda rows: make_schedule(kind, pipe, self._collective, self.program, rows),
            lambda first, last: self._reduce(kind, first, last),
            node=node,
        )

    def _reduce(self, kind: Sync | AllReduce, first: int, last: int) -> None:
        """Rows of a sum, in the midst of an exchange; the time counts as its."""
        if isinstance(kind, AllReduce):
            self.executor.reduce(kind, first, last)

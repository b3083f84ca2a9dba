"""A node: a program, the executor that runs it, and the connections to the other nodes."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.executor import Executor
from pyllama_dist.net.collectives import Exchange
from pyllama_dist.net.transport import LostError, Mesh
from pyllama_dist.program import Batch, Program, Rows


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
        self, program: Program, executor: Executor, mesh: Mesh | None, timeout: float
    ) -> None:
        """A node.

        Args:
            program: its program.
            executor: made for that program.
            mesh: connections to all other nodes; None if there are none.
            timeout: seconds that an exchange may take.
        """
        self.program, self.executor, self.mesh = program, executor, mesh
        self.timeout = timeout
        self.spent = Spent()
        self._segments = [
            (segment.name, exchanges)
            for segment, exchanges in zip(program.segments, self._exchanges(), strict=True)
        ]

    def step(self, number: int, batch: Batch) -> None:
        """Runs the program on a batch; the batch must have been checked.

        Raises:
            LostError: a peer is gone or late; the message says in which segment.
            ProtocolError: a peer is at another step.
        """
        rows: dict[Rows, int] = {"batch": len(batch.seqs), "logits": len(batch.logits)}
        spent = self.spent
        try:
            self.executor.begin(batch)
            for i, (name, exchanges) in enumerate(self._segments):
                started = time.perf_counter()
                self.executor.run(i)
                computed = time.perf_counter()
                spent.compute_seconds += computed - started
                if not exchanges:
                    continue
                try:
                    for kind, exchange in exchanges:
                        spent.bytes_moved += exchange.run(rows[kind], number, self.timeout)
                except LostError as lost:
                    where = f"step {number}, after {name}"
                    raise LostError(f"{lost.detail} ({where})", lost.culprit) from None
                except ProtocolError as error:
                    raise ProtocolError(f"{error} (after {name})") from None
                spent.sync_seconds += time.perf_counter() - computed
        finally:
            self.executor.end()

    def _exchanges(self) -> Iterator[list[tuple[Rows, Exchange]]]:
        """The exchanges after each segment, and of which rows they are."""
        kinds = {pipe.name: pipe.rows for pipe in self.program.pipes}
        places = itertools.count()
        for segment in self.program.segments:
            exchanges = []
            for sync in segment.syncs:
                if self.mesh is None:
                    raise NodeError("a program for several nodes, and no connections")
                exchange = Exchange(
                    self.mesh,
                    sync.kind,
                    self.executor.memory.pipes[sync.pipe],
                    node=self.program.node,
                    n_nodes=self.program.n_nodes,
                    sync=next(places),
                )
                exchanges.append((kinds[sync.pipe], exchange))
            yield exchanges

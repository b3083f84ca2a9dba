"""A node: a program, the executor that runs it, and the connections to the other nodes."""

import time
from dataclasses import dataclass

from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.executor import Executor
from pyllama_dist.net.collectives import exchange
from pyllama_dist.net.transport import LostError, Mesh
from pyllama_dist.program import Batch, Program


@dataclass
class Spent:
    """What steps have cost this node so far."""

    compute_seconds: float = 0.0
    sync_seconds: float = 0.0  # waiting for others included
    bytes_moved: int = 0


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
        self._rows = {pipe.name: pipe.rows for pipe in program.pipes}

    def step(self, number: int, batch: Batch) -> None:
        """Runs the program on a batch; the batch must have been checked.

        Raises:
            LostError: a peer is gone or late; the message says in which segment.
            ProtocolError: a peer is at another step.
        """
        try:
            self.executor.begin(batch)
            place = 0
            for i, segment in enumerate(self.program.segments):
                started = time.perf_counter()
                self.executor.run(i)
                computed = time.perf_counter()
                self.spent.compute_seconds += computed - started
                for sync in segment.syncs:
                    if self.mesh is None:
                        raise NodeError("a program for several nodes, and no connections")
                    rows = batch.slots if self._rows[sync.pipe] == "batch" else batch.logits
                    try:
                        self.spent.bytes_moved += exchange(
                            self.mesh,
                            sync.kind,
                            self.executor.memory.pipes[sync.pipe],
                            node=self.program.node,
                            n_nodes=self.program.n_nodes,
                            rows=len(rows),
                            step=number,
                            sync=place,
                            timeout=self.timeout,
                        )
                    except LostError as lost:
                        where = f"step {number}, after {segment.name}"
                        raise LostError(f"{lost.detail} ({where})", lost.culprit) from None
                    except ProtocolError as error:
                        raise ProtocolError(f"{error} (after {segment.name})") from None
                    place += 1
                self.spent.sync_seconds += time.perf_counter() - computed
        finally:
            self.executor.end()

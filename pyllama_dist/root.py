"""The root: it leads each step, and embeds the tokens. How it comes to be is in `cluster/`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pyllama_dist.closing import Closing
from pyllama_dist.cores import kept_to
from pyllama_dist.errors import ProtocolError
from pyllama_dist.executor.memory import own_blocks
from pyllama_dist.net.messages import AskUsage, Phase, Step, Usage
from pyllama_dist.net.transport import ROOT
from pyllama_dist.node import Node
from pyllama_dist.program import Batch
from pyllama_dist.validate import check_batch
from pyllama_dist.workers import Workers

F32 = npt.NDArray[np.float32]

_TALK_SECONDS = 15.0


class Root(Closing):
    """Node 0, and the workers that step with it."""

    def __init__(
        self, node: Node, workers: Workers, embedding: F32, cpu: int | None = None
    ) -> None:
        """A root whose nodes are all loaded. At its end it closes workers and executor.

        Args:
            node: node 0, with its weights.
            workers: all others, with theirs.
            embedding: the table of tokens, [vocab, dim] float32.
            cpu: the CPU that steps of this node keep to; None: any.
        """
        self.node = node
        self._workers, self._embedding, self._cpu = workers, embedding, cpu
        self._number, self._has_blocks = 0, False
        program, pipes = node.program, node.executor.memory.pipes
        self._x = pipes["x"].f32(0, program.max_rows)
        self._slices = [pipes["logits"].f32(i, program.max_logits) for i in range(program.n_nodes)]
        self._logits = self._slices[0]
        if program.n_nodes > 1:
            vocab = sum(part.shape[1] for part in self._slices)
            self._logits = np.empty((program.max_logits, vocab), np.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """What the nodes are called in messages, in their order."""
        return (ROOT, *(channel.address for channel in self._workers.channels))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return len(self._embedding)

    def step(self, tokens: Sequence[int], batch: Batch) -> F32:
        """Runs all nodes on a batch.

        Args:
            tokens: one for each row of the batch, within the vocabulary.
            batch: their sequences and positions, and the rows whose logits are wanted; and what
                becomes of blocks. If the first one gives out none, each sequence has its own.

        Returns:
            [len(batch.logits), vocab] float32; the next step overwrites them.

        Raises:
            ProtocolError: tokens and batch do not fit each other, the program or the vocabulary.
            NodeError: a worker was lost; with address, phase and what to do.
        """
        if len(tokens) != len(batch.seqs):
            raise ProtocolError(f"{len(tokens)} tokens for a batch of {len(batch.seqs)} rows")
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ProtocolError(f"a token id beyond the vocabulary of {self.vocab_size}")
        if not self._has_blocks and not batch.table:
            batch = replace(batch, table=own_blocks(self.node.program))
        check_batch(self.node.program, batch, self.node.executor.memory.table)
        self._has_blocks = True
        self._workers.phase = Phase.STEP
        self._number = (self._number + 1) % (1 << 32)
        self._x[: len(tokens)] = self._embedding[np.asarray(tokens)]
        with self._workers.blaming():
            if self._workers.mesh is not None:
                self._workers.mesh.check()  # a worker that left and came back knows nothing of us
            self._workers.tell(Step(self._number, batch))
            with kept_to(self._cpu):
                self.node.step(self._number, batch)
        logits = self._logits[: len(batch.logits)]
        if len(self._slices) > 1:
            np.concatenate([part[: len(logits)] for part in self._slices], axis=1, out=logits)
        return logits

    def check(self) -> None:
        """Looks after the workers, without asking them.

        Raises:
            NodeError: a worker was lost; with address, phase and what to do.
        """
        with self._workers.blaming():
            if self._workers.mesh is not None:
                self._workers.mesh.check()

    def usage(self) -> list[Usage]:
        """What steps have cost each worker so far, and the memory it has taken.

        Raises:
            NodeError: a worker was lost; with address, phase and what to do.
        """
        with self._workers.blaming():
            self._workers.begin(self._workers.phase, _TALK_SECONDS)
            self._workers.tell(AskUsage())
            return self._workers.expect_all(Usage)

    def close(self, error: BaseException | None = None) -> None:
        """Says bye, or why not, and frees everything."""
        self._workers.close(error)
        self.node.executor.close()

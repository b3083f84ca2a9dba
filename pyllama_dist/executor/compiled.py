"""The fast executor: a program becomes a table of ops, which compiled threads work through."""

import threading
from queue import SimpleQueue

import numpy as np

from pyllama_dist.closing import Closing
from pyllama_dist.executor.arena import arena
from pyllama_dist.executor.fusion import fuse
from pyllama_dist.executor.lowering import Lowering, Row, address
from pyllama_dist.executor.memory import Memory, scratch_bytes, shared_bytes
from pyllama_dist.executor.reduction import ROWS, Reduction, ops_of_segment
from pyllama_dist.program import AllReduce, Batch, Program, all_reduces
from pyllama_kernels import oploop, optable, team
from pyllama_kernels.entries import ENTRIES
from pyllama_kernels.optable import OP
from pyllama_kernels.pages import count_cells

_JOIN_SECONDS = 5.0


class CompiledExecutor(Closing):
    """Runs a program with a team of threads. See `Executor`.

    The calling thread leads. The others enter compiled code when a step begins, and stay there,
    waiting between segments, until it ends, and for a moment more; then they sleep.
    """

    def __init__(self, program: Program, n_threads: int) -> None:
        self.memory = Memory(program)
        self._n_threads = n_threads
        self._lowering = Lowering(program, self.memory)  # keeps what rows point to
        rows, self._starts = _lower(program, self._lowering)
        parts, scratch = shared_bytes(program), scratch_bytes(program)
        reduced = all_reduces(program)
        table, self._parts, self._scratch = arena(
            [(len(rows) + ROWS * len(reduced), OP.itemsize), (parts,), (n_threads, scratch)]
        )
        self._table = table.reshape(-1).view(OP)
        for entry, row in zip(self._table, rows, strict=False):
            for field, value in row.fields.items():
                entry[field] = value
            entry["entry"], entry["cut"] = ENTRIES[row.entry].address, row.cut
        self._reductions = {
            exchange: Reduction(self.memory, exchange, self._table, len(rows) + ROWS * i)
            for i, exchange in enumerate(reduced)
        }
        self._state = team.new_state(n_threads)
        self._step = np.zeros(optable.STEP_WORDS, np.int64)
        self._step[optable.SEQS] = address(self.memory.seqs)
        self._step[optable.POSITIONS] = address(self.memory.positions)
        self._step[optable.LOGITS] = address(self.memory.logits)
        self._step[optable.TABLE] = address(self.memory.table)
        self._step[optable.N_SEQS] = program.n_seqs
        self._step[optable.SEQ_BLOCKS] = self.memory.table.shape[1]
        self._step[optable.CELLS] = count_cells(program.seq_len, program.max_rows)
        self._step[optable.PARTS] = address(self._parts)
        self._step[optable.SCRATCH] = address(self._scratch)
        self._step[optable.SCRATCH_BYTES] = scratch
        self._stepping = False
        # Not semaphores: those are Python code, which ^C can leave locked.
        self._enter: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(n_threads - 1)]
        self._threads = [
            threading.Thread(target=self._follow, args=(i,), name=f"kernel-{i}", daemon=True)
            for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, batch: Batch) -> None:
        """Takes the rows that the segments will work on, and calls the team."""
        self.memory.set_batch(batch)
        self._step[optable.N_ROWS] = self.memory.n_rows
        self._step[optable.N_LOGITS] = self.memory.n_logits
        self._step[optable.N_PAIRS] = self.memory.n_pairs
        for exchange, reduction in self._reductions.items():
            reduction.read(self.memory.reduced[exchange.pipe])
        self._stepping = True
        oploop.begin_step(self._state)
        for thread, enter in enumerate(self._enter, start=1):
            if not team.is_inside(self._state, thread):
                enter.put(True)

    def run(self, segment: int) -> None:
        """Runs the ops of one segment."""
        first, last = self._starts[segment], self._starts[segment + 1]
        oploop.run(self._table, first, last, self._step, self._state, 0, self._n_threads)

    def reduce(self, exchange: AllReduce, first: int, last: int) -> None:
        """Makes rows of a sum, in the pipe's region for it."""
        start, stop = self._reductions[exchange].at(first)
        self._step[optable.N_REDUCED] = last - first
        oploop.run(self._table, start, stop, self._step, self._state, 0, self._n_threads)

    def end(self) -> None:
        """Ends the step: the team may leave."""
        if self._stepping:
            oploop.end_step(self._state)
            self._stepping = False

    def close(self, error: BaseException | None = None) -> None:
        """Ends the threads."""
        if self._stepping:
            oploop.end_step(self._state)
        for enter in self._enter:
            enter.put(False)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)  # they are daemons: a process can end without them
        self._threads, self._enter, self._stepping = [], [], False

    def _follow(self, thread: int) -> None:
        enter = self._enter[thread - 1]
        # Who comes too late for a step finds it over, and leaves at once.
        while enter.get():
            oploop.run(self._table, 0, 0, self._step, self._state, thread, self._n_threads)


def _lower(program: Program, lowering: Lowering) -> tuple[list[Row], list[int]]:
    """The program as rows of the table, and where each segment starts (one more than segments)."""
    rows: list[Row] = []
    starts = [0]
    for segment in range(len(program.segments)):
        ops = ops_of_segment(program, segment)
        rows += fuse([row for op in ops for row in op.lower(lowering)])
        starts.append(len(rows))
    return rows, starts

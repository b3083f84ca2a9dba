"""The interpreter: op after op, with the reference implementations. The one to step through."""

from pyllama_dist.closing import Closing
from pyllama_dist.executor.memory import Memory
from pyllama_dist.executor.reduction import ops_of_segment, reduce_rows
from pyllama_dist.program import AllReduce, Batch, Program


class Interpreter(Closing):
    """Runs a program op after op. See `Executor`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.memory = Memory(program)

    def begin(self, batch: Batch) -> None:
        """Takes the rows that the segments will work on."""
        self.memory.set_batch(batch)

    def run(self, segment: int) -> None:
        """Runs the ops of one segment."""
        for op in ops_of_segment(self.program, segment):
            op.run(self.memory)

    def reduce(self, exchange: AllReduce, first: int, last: int) -> None:
        """Makes rows of a sum, in the pipe's region for it."""
        reduce_rows(self.memory, exchange, first, last)

    def end(self) -> None:
        """Ends the step."""

    def close(self, error: BaseException | None = None) -> None:
        """Nothing is open."""

"""Runs tests as llama-bench defines them, and takes the time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pyllama_dist.errors import UsageError
from pyllama_dist.node import Spent
from pyllama_dist.program import Batch, ExpertMatmul, Matmul, Op, Program
from pyllama_dist.root import Root


@dataclass(frozen=True)
class Test:
    """A prompt of N tokens read in batches (pp), or N tokens made one after the other (tg)."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0  # positions that the cache holds before

    @property
    def name(self) -> str:
        """As llama-bench writes it.

        >>> Test("pp", 512).name, Test("tg", 128, depth=4096).name
        ('pp512', 'tg128 @ d4096')
        """
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        """Positions of the context that the test needs."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class Run:
    """What one run of a test has cost; all but `seconds` is the root's own account."""

    seconds: float
    compute_seconds: float
    sync_seconds: float  # waiting for others included
    bytes_moved: int  # sent and received


@dataclass(frozen=True)
class Result:
    """What the runs of a test have cost."""

    test: Test
    runs: Sequence[Run]
    bandwidth: Sequence[float]  # bytes per second, read from memory before, and after each run
    spent: Sequence[Spent]  # by each node in all runs, the root first


class Bench:
    """A root, and how far its cache is filled.

    Tokens are random. The tokens of a tg test are the most likely ones, so taking them is part of
    the time; of a pp test the logits of the last token are computed, and not looked at.
    """

    def __init__(self, root: Root, vocab_size: int) -> None:
        self._root, self._vocab_size = root, vocab_size
        self._program = root.node.program
        self._random = np.random.default_rng(0)
        self._filled = 0  # positions whose keys and values come from some token

    def run(self, test: Test) -> Run:
        """Runs a test once.

        Raises:
            UsageError: the context is too short for it.
            NodeError: a worker was lost.
        """
        check_fits(test, self._program.seq_len)
        if test.depth > self._filled:
            self._read(self._filled, test.depth)
        return self._timed(test)

    def warm_up(self, test: Test) -> None:
        """What llama-bench does before it takes the time: the whole prompt, or one token."""
        self.run(test if test.kind == "pp" else replace(test, tokens=1))

    def spent(self) -> list[Spent]:
        """What steps have cost each node so far, the root first."""
        usage = self._root.usage()
        workers = [Spent(u.compute_seconds, u.sync_seconds, u.bytes_moved) for u in usage]
        return [replace(self._root.node.spent), *workers]

    def peak_bytes(self) -> list[int]:
        """Memory that each worker has taken at most."""
        return [usage.peak_bytes for usage in self._root.usage()]

    def _timed(self, test: Test) -> Run:
        before = replace(self._root.node.spent)
        started = time.perf_counter()
        if test.kind == "pp":
            self._read(test.depth, test.positions)
        else:
            self._write(test.depth, test.positions)
        seconds = time.perf_counter() - started
        cost = self._root.node.spent - before
        return Run(seconds, cost.compute_seconds, cost.sync_seconds, cost.bytes_moved)

    def _read(self, start: int, stop: int) -> None:
        """Positions as a prompt: in batches, with the logits of the last token."""
        for batch in _prompt(start, stop, self._program.max_rows):
            tokens = self._random.integers(0, self._vocab_size, len(batch.seqs)).tolist()
            self._root.step(tokens, batch)
        self._filled = max(self._filled, stop)

    def _write(self, start: int, stop: int) -> None:
        """Positions as an answer: one step for each, the most likely token next."""
        token = int(self._random.integers(self._vocab_size))
        for batch in _answer(start, stop):
            logits = self._root.step([token], batch)
            token = int(logits[0].argmax())
        self._filled = max(self._filled, stop)


def batches(test: Test, max_rows: int) -> Iterator[Batch]:
    """The batches of a test's steps.

    Args:
        test: what is run.
        max_rows: of a batch.
    """
    if test.kind == "pp":
        return _prompt(test.depth, test.positions, max_rows)
    return _answer(test.depth, test.positions)


def _prompt(start: int, stop: int, max_rows: int) -> Iterator[Batch]:
    for first in range(start, stop, max_rows):
        last = min(first + max_rows, stop)
        wanted = (last - first - 1,) if last == stop else ()
        yield Batch((0,) * (last - first), tuple(range(first, last)), wanted)


def _answer(start: int, stop: int) -> Iterator[Batch]:
    for position in range(start, stop):
        yield Batch((0,), (position,), (0,))


def measure(
    bench: Bench,
    tests: Sequence[Test],
    repetitions: int,
    bandwidth: Callable[[], float],
    starting: Callable[[Test, int], None] = lambda test, run: None,
) -> list[Result]:
    """Runs tests one after the other, each after a warm-up.

    Args:
        bench: a root with a context long enough for all of them.
        tests: what to run.
        repetitions: runs of each test.
        bandwidth: bytes per second that can be read from memory, asked for before the first run
            and after each: it may change from one second to the next.
        starting: told the test and the number of its run before each; the warm-up is run 0.
    """
    found = []
    for test in tests:
        starting(test, 0)
        bench.warm_up(test)
        before, runs, read = bench.spent(), [], [bandwidth()]
        for run in range(1, repetitions + 1):
            starting(test, run)
            runs.append(bench.run(test))
            read.append(bandwidth())
        spent = [after - start for after, start in zip(bench.spent(), before, strict=True)]
        found.append(Result(test, runs, read, spent))
    return found


def plan_tests(prompts: Sequence[int], answers: Sequence[int], depths: Sequence[int]) -> list[Test]:
    """All tests that lists of sizes ask for; a size of 0 asks for none."""
    tests = []
    for depth in depths:
        tests += [Test("pp", tokens, depth) for tokens in prompts if tokens]
        tests += [Test("tg", tokens, depth) for tokens in answers if tokens]
    return tests


def check_fits(test: Test, seq_len: int) -> None:
    """Refuses a test that needs more than `seq_len` positions.

    Raises:
        UsageError: it does.
    """
    if test.positions > seq_len:
        raise UsageError(
            f"{test.name} needs {test.positions} positions, the context has {seq_len}; choose "
            f"smaller sizes, or a higher --max-seq-len if the model allows it"
        )


def matrix_bytes(program: Program) -> int:
    """Bytes of the matrices that one node reads for each token: of experts, those that are chosen.

    Neither norms and biases nor the cache are counted, nor the embedding, of which a token needs
    one row.
    """

    def size(op: Op) -> int:
        match op:
            case Matmul():
                return op.weight.nbytes
            case ExpertMatmul():
                return op.weight.each[0].nbytes * program.n_experts
        return 0

    return sum(size(op) for segment in program.segments for op in segment.ops)

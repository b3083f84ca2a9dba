"""Runs and times tests as llama-bench defines them."""

import itertools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pyllama_dist.engine.blocks import BlockPool
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sampler import F32
from pyllama_dist.engine.scheduler import Scheduler
from pyllama_dist.engine.sequence import Request, Sequence
from pyllama_dist.errors import UsageError
from pyllama_dist.node import Spent
from pyllama_dist.ops import ExpertMatmul, Matmul
from pyllama_dist.program import Batch, Op, Program
from pyllama_kernels.pages import KV_BLOCK, seq_blocks


@dataclass(frozen=True)
class Test:
    """A prompt of N tokens read in batches (pp), or N tokens made one after the other (tg)."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0  # positions in the cache before the test
    users: int = 1  # concurrent sequences, each with a text of its own

    @property
    def name(self) -> str:
        """As llama-bench writes it.

        >>> Test("pp", 512).name, Test("tg", 128, depth=4096).name
        ('pp512', 'tg128 @ d4096')
        >>> Test("tg", 128, users=8).name
        'tg128 x 8'
        """
        users = f" x {self.users}" if self.users > 1 else ""
        return f"{self.kind}{self.tokens}{users}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        """Positions of the context that the test needs."""
        return self.depth + self.tokens

    @property
    def all_tokens(self) -> int:
        """Tokens of all users."""
        return self.users * self.tokens


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
    runs: Tokens[Run]
    bandwidth: Tokens[float]  # bytes per second, read from memory before, and after each run
    spent: Tokens[Spent]  # by each node in all runs, the root first


class Bench:
    """A client of an engine, which stands for all users of a test.

    Tokens are random. The tokens of a tg test are the most likely ones, so taking them is part of
    the time; of a pp test one token is taken.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._root = engine, engine.root
        self._random = np.random.default_rng(0)
        self._texts: dict[int, list[int]] = {}  # of each user, as deep as it was needed

    def run(self, test: Test) -> Run:
        """Runs a test once.

        Raises:
            UsageError: the context is too short for it, or the cache for all users.
            NodeError: a worker was lost.
        """
        check_fits(test, self._engine.seq_len)
        # What the cache did not hold is there after the first run, whose time does not count.
        for _ in range(2):
            run, cached = self._timed(test)
            if cached == test.users * test.depth:
                return run
        raise UsageError(f"the KV cache is too small for {test.name}; raise --kv-blocks")

    def warm_up(self, test: Test) -> None:
        """What llama-bench does before it takes the time: the whole prompt, or one token."""
        self.run(test if test.kind == "pp" else replace(test, tokens=1))

    def spent(self) -> list[Spent]:
        """What steps have cost each node so far, the root first."""
        usage = self._engine.between_steps(self._root.usage)
        workers = [Spent(u.compute_seconds, u.sync_seconds, u.bytes_moved) for u in usage]
        return [replace(self._root.node.spent), *workers]

    def peak_bytes(self) -> list[int]:
        """Memory that each worker has taken at most."""
        return [usage.peak_bytes for usage in self._engine.between_steps(self._root.usage)]

    def _timed(self, test: Test) -> tuple[Run, int]:
        """A run, and how many positions of it the cache held."""
        prompts = [
            [*self._text(user, test.depth), *self._tokens(_prompt_tokens(test))]
            for user in range(test.users)
        ]
        most = 1 if test.kind == "pp" else test.tokens
        before = replace(self._root.node.spent)
        started = time.perf_counter()
        streams = self._engine.submit_all(
            [Request(prompt, _most_likely, max_tokens=most) for prompt in prompts]
        )
        for stream in streams:
            for _ in stream:
                pass
        seconds = time.perf_counter() - started
        cost = self._root.node.spent - before
        run = Run(seconds, cost.compute_seconds, cost.sync_seconds, cost.bytes_moved)
        return run, sum(stream.timings.cached_tokens for stream in streams)

    def _text(self, user: int, depth: int) -> list[int]:
        text = self._texts.setdefault(user, [])
        text += self._tokens(max(0, depth - len(text)))
        return text[:depth]

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self._random.integers(0, self._root.vocab_size, count)]


def _most_likely(logits: F32) -> int:
    return int(logits.argmax())


def _prompt_tokens(test: Test) -> int:
    """Tokens of a prompt after the depth: a step is needed for the first token of an answer."""
    return test.tokens if test.kind == "pp" else 1


def batches(test: Test, program: Program) -> Iterator[Batch]:
    """The batches of a test's steps, as the scheduler forms them."""
    most = 1 if test.kind == "pp" else test.tokens
    pool = BlockPool(blocks_of(test), KV_BLOCK)
    scheduler = Scheduler(
        pool,
        n_seqs=program.n_seqs,
        max_rows=program.max_rows,
        max_logits=program.max_logits,
    )
    for tokens, max_tokens in ((test.depth, 1), (test.depth + _prompt_tokens(test), most)):
        for user in range(test.users if tokens else 0):
            # Texts differ from their beginning, and a text from what an answer adds.
            prompt = [-1 - user] * test.depth + [user] * (tokens - test.depth)
            request = Request(prompt, _most_likely, max_tokens=max_tokens)
            scheduler.add(Sequence.of(request, user))
        while (step := scheduler.plan()) is not None:
            if tokens > test.depth:
                yield step.batch
            scheduler.settle()
            for sequence in step.logits:
                sequence.tokens.append(sequence.number)
                if len(sequence.tokens) == tokens + max_tokens:
                    scheduler.end(sequence)


def blocks_of(test: Test) -> int:
    """Blocks of the KV cache that a test needs: for each user its positions, and a copy."""
    return test.users * (seq_blocks(test.positions) + 1)


def measure(
    bench: Bench,
    tests: Tokens[Test],
    repetitions: int,
    bandwidth: Callable[[], float],
    starting: Callable[[Test, int], None] = lambda test, run: None,
) -> list[Result]:
    """Runs tests one after the other, each after a warm-up.

    Args:
        bench: an engine with a context long enough for all of them.
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


def plan_tests(
    prompts: Tokens[int], answers: Tokens[int], depths: Tokens[int], users: Tokens[int] = (1,)
) -> list[Test]:
    """All tests that lists of sizes ask for; a size of 0 asks for none."""
    tests = []
    for depth, count in itertools.product(depths, users):
        tests += [Test("pp", tokens, depth, count) for tokens in prompts if tokens and count]
        tests += [Test("tg", tokens, depth, count) for tokens in answers if tokens and count]
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
                return op.weight.each[0].nbytes * program.n_active_experts
        return 0

    return sum(size(op) for segment in program.segments for op in segment.ops)

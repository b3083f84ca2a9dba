"""The engine: one thread that owns the root and serves all who want tokens of it."""

import itertools
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from pyllama_dist import interrupt
from pyllama_dist.closing import Closing
from pyllama_dist.engine.blocks import BlockPool
from pyllama_dist.engine.budget import StepBudget
from pyllama_dist.engine.sampler import F32
from pyllama_dist.engine.scheduler import Scheduler, Step
from pyllama_dist.engine.sequence import Finish, Request, Sequence
from pyllama_dist.engine.stream import Stream
from pyllama_dist.errors import PyllamaError, UsageError
from pyllama_dist.node import Spent
from pyllama_dist.root import Root
from pyllama_kernels.pages import KV_BLOCK

STEP_SECONDS = 0.25  # of a step in which others decode: longer pauses are seen in an answer
_END_SECONDS = 0.5  # for a step, before it is interrupted

_T = TypeVar("_T")


@dataclass(frozen=True)
class Load:
    """How much an engine has to do."""

    running: int  # sequences
    waiting: int
    kv_used: float  # share of the blocks of the KV cache that sequences hold


class Engine(Closing):
    """Runs the sequences of many clients on one root; to be used as a context.

    From its construction until it is closed, its thread alone uses the root. All methods may be
    called from any thread.
    """

    def __init__(
        self,
        root: Root,
        block_size: int = KV_BLOCK,
        *,
        parallel: int | None = None,
        step_seconds: float = STEP_SECONDS,
        after_step: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        """Starts the thread.

        Args:
            root: ready for steps.
            block_size: positions of a block of the KV cache.
            parallel: sequences that run at once; None: as many as the program has room for.
            step_seconds: that a step should take at most while answers come and prompts are read.
            after_step: called by the thread when streams may have got something, with the rows and
                seconds of the step; without rows where there was none.
        """
        self.root, program = root, root.node.program
        self.seq_len = min(program.seq_len, program.n_blocks * block_size)  # of one sequence
        self._scheduler = Scheduler(
            BlockPool(program.n_blocks, block_size),
            n_seqs=min(program.n_seqs, parallel or program.n_seqs),
            max_rows=program.max_rows,
            max_logits=program.max_logits,
        )
        self._budget, self._after_step = StepBudget(step_seconds, program.max_rows), after_step
        self._numbers = itertools.count()
        self._inbox: SimpleQueue[Callable[[], None] | Future[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()  # of the next two; and nothing is submitted after an error
        self._streams: dict[Sequence, Stream] = {}
        self._error: BaseException | None = None
        self._spent: dict[Sequence, Spent] = {}  # by the root, before a sequence's first step
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """How much there is to do; to be read from any thread."""
        if self._error is not None:  # what ran is still in the scheduler
            return Load(0, 0, 0.0)
        scheduler = self._scheduler
        used = scheduler.pool.n_blocks - scheduler.pool.available
        return Load(len(scheduler.running), len(scheduler.waiting), used / scheduler.pool.n_blocks)

    def submit(self, request: Request) -> Stream:
        """Begins a generation.

        Raises:
            UsageError: the prompt is empty, does not fit the context, or has ids beyond the
                vocabulary.
            PyllamaError: the engine has failed before.
        """
        (stream,) = self.submit_all([request])
        return stream

    def submit_all(self, requests: Tokens[Request]) -> list[Stream]:
        """Begins generations in the same step, as far as there is room; raises as `submit`."""
        for request in requests:
            self._check(request)
        sequences = [Sequence.of(request, next(self._numbers)) for request in requests]
        streams = {sequence: Stream(sequence, self._cancel) for sequence in sequences}

        def add() -> None:
            for sequence in sequences:
                self._scheduler.add(sequence)

        with self._lock:
            self._refuse_if_over()
            self._streams |= streams
            self._inbox.put(add)
        return list(streams.values())

    def logits(self, tokens: Tokens[int]) -> F32:
        """The logits of every position of a text, computed afresh.

        Args:
            tokens: at least one, at most the context.

        Returns:
            [len(tokens), vocab] float32.

        Raises:
            UsageError: there are none or too many, or they are beyond the vocabulary.
        """
        if not 1 <= len(tokens) <= self.seq_len:
            raise UsageError(f"{len(tokens)} tokens for a context of {self.seq_len}")
        with self.submit(Request(tokens, lambda row: 0, prompt_logits=True)) as stream:
            for _ in stream:
                pass
        return np.array(stream.prompt_logits)

    def between_steps(self, function: Callable[[], _T]) -> _T:
        """What a function of the root returns, called by the engine's thread between two steps."""
        return self.call_between_steps(function).result()

    def call_between_steps(self, function: Callable[[], _T]) -> Future[_T]:
        """The same, without waiting for it."""
        future: Future[_T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except PyllamaError as error:
                future.set_exception(error)

        with self._lock:
            self._refuse_if_over()
            self._inbox.put(call)
            self._inbox.put(future)
        return future

    def close(self, error: BaseException | None = None) -> None:
        """Ends the thread and all generations after the running step; within it, if interrupted."""
        at_once = isinstance(error, KeyboardInterrupt | SystemExit)
        self._inbox.put(None)
        if at_once:
            self._thread.join(_END_SECONDS)
        if at_once:
            interrupt.thread(self._thread)  # it runs Python code while it waits for nodes
        self._thread.join()

    def _check(self, request: Request) -> None:
        prompt, vocab = request.prompt, self.root.vocab_size
        if not prompt:
            raise UsageError("the prompt is empty; write something")
        # Alone, the token after the last position needs no room.
        if len(prompt) >= self.seq_len + (request.prompt_logits or request.max_tokens == 1):
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context {self.seq_len}; shorten it, or "
                f"raise --max-seq-len if the model allows more"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            wrong = next(token for token in prompt if not 0 <= token < vocab)
            raise UsageError(f"{wrong} is no token id from 0 to {vocab - 1}")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise UsageError(f"{request.max_tokens} tokens to generate; ask for one at least")

    def _refuse_if_over(self) -> None:
        if self._error is not None:
            raise self._error

    def _cancel(self, sequence: Sequence) -> None:
        """Only puts a note into the inbox: signal handlers may call it."""
        self._inbox.put(lambda: self._end(sequence, "interrupted"))

    def _run(self) -> None:
        """The thread: take what came, schedule, step, sample, hand out."""
        error: BaseException | None = None
        try:
            while self._take():
                decoding = len(self._scheduler.running)
                step = self._scheduler.plan(self._budget.rows(decoding))
                rows, seconds = 0, 0.0
                if step is not None:
                    self._begin(step)
                    started, rows = time.perf_counter(), len(step.tokens)
                    logits = self.root.step(step.tokens, step.batch)
                    seconds = time.perf_counter() - started
                    self._budget.observe(rows, seconds)
                    self._scheduler.settle()
                    self._hand_out(step, logits)
                self._after_step(rows, seconds)
        except BaseException as raised:
            error = raised
        with self._lock:
            self._error = error or RuntimeError("the engine is closed")
        for stream in self._streams.values():
            stream.put(error or "interrupted")
        self._after_step(0, 0.0)
        while not self._inbox.empty():
            note = self._inbox.get()
            if isinstance(note, Future) and not note.done():
                note.set_exception(self._error)

    def _take(self) -> bool:
        """Does what was asked for since; waits if there is nothing else. False: the end."""
        idle = not (self._scheduler.running or self._scheduler.waiting)
        while idle or not self._inbox.empty():
            note = self._inbox.get()
            if note is None:
                return False
            if not isinstance(note, Future):
                note()
                idle = False
        return True

    def _begin(self, step: Step) -> None:
        for sequence, _ in step.rows:
            if sequence not in self._spent:
                sequence.started = time.perf_counter()
                sequence.timings.waiting_seconds = sequence.started - sequence.arrived
                self._spent[sequence] = replace(self.root.node.spent)

    def _hand_out(self, step: Step, logits: F32) -> None:
        for sequence, row in zip(step.logits, logits, strict=True):
            if sequence.request.prompt_logits:
                self._streams[sequence].put(row.copy())
                continue
            try:
                self._sample(sequence, row)
            except PyllamaError as error:
                self._end(sequence, error)
        for sequence, _ in step.rows:
            if sequence.request.prompt_logits and not sequence.remaining:
                self._end(sequence, "length")

    def _sample(self, sequence: Sequence, logits: F32) -> None:
        """The next token of a sequence, from [vocab] float32."""
        request, timings = sequence.request, sequence.timings
        token = request.sampler(logits)
        now = time.perf_counter()
        timings.spent = self.root.node.spent - self._spent[sequence]
        if not sequence.decoding:
            sequence.decoding = now
            timings.prefill_seconds = now - sequence.started
        timings.decode_seconds = now - sequence.decoding
        if token in request.stop:
            self._end(sequence, "stop")
            return
        timings.generated_tokens += 1
        sequence.tokens.append(token)
        put = self._streams[sequence].put
        if request.logprobs is None:
            put(token)
        else:
            put(request.logprobs(logits, token))
        # The token after the last position is still given out.
        if timings.generated_tokens == request.max_tokens or len(sequence.tokens) > self.seq_len:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, why: Finish | PyllamaError) -> None:
        stream = self._streams.pop(sequence, None)
        if stream is None:  # it ended before it was cancelled
            return
        self._scheduler.end(sequence)
        self._spent.pop(sequence, None)
        stream.put(why)

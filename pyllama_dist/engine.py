"""Generation: one iterator of tokens, whoever asks for them."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import UsageError
from pyllama_dist.node import Spent
from pyllama_dist.program import Batch
from pyllama_dist.root import Root

F32 = npt.NDArray[np.float32]
Finish = Literal["stop", "length", "interrupted"]


@dataclass
class Timings:
    """What a generation has cost so far."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the cache
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0  # steps and choices of generated tokens; not what the user does
    spent: Spent = field(default_factory=Spent)  # by the root; on a stop token too


class Generation:
    """Tokens as they come, without the one that ends them; then `finish_reason` says why."""

    def __init__(self, tokens: Iterator[int], timings: Timings) -> None:
        self._tokens = tokens
        self.timings = timings
        self.finish_reason: Finish = "interrupted"

    def __iter__(self) -> Iterator[int]:
        return self._tokens


class Engine:
    """A root and what its caches hold: the conversation so far."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self._program = root.node.program
        self._cached: list[int] = []  # tokens whose keys and values sequence 0 holds

    @property
    def seq_len(self) -> int:
        """Positions of the context."""
        return self._program.seq_len

    def generate(
        self,
        prompt: Sequence[int],
        choose: Callable[[F32], int],
        stop: Collection[int],
        max_tokens: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Continues a prompt. What its beginning shares with the last one is not computed again.

        Args:
            prompt: token ids, at least one.
            choose: the next token from [vocab] float32 logits, which the next step overwrites.
            stop: tokens that end the answer.
            max_tokens: the most tokens to generate, at least 1; None leaves it to the context.
            interrupted: asked between steps; a true answer ends the generation.

        Raises:
            UsageError: the prompt is empty or does not fit the context.
        """
        if not prompt:
            raise UsageError("the prompt is empty; write something")
        if len(prompt) >= self.seq_len:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context {self.seq_len}; shorten it, or "
                f"raise --max-seq-len if the model allows more"
            )
        # The last token is always computed: its logits are what is needed.
        shared = _common_prefix(self._cached, prompt[:-1])
        timings = Timings(prompt_tokens=len(prompt), cached_tokens=shared)

        def tokens() -> Iterator[int]:
            started, before = time.perf_counter(), replace(self.root.node.spent)
            logits = self._prefill(prompt, shared, interrupted)
            timings.prefill_seconds = time.perf_counter() - started
            started += timings.prefill_seconds
            timings.spent = self.root.node.spent - before
            while logits is not None:
                token = choose(logits)
                if token in stop:
                    generation.finish_reason = "stop"
                    return
                timings.generated_tokens += 1
                timings.decode_seconds += time.perf_counter() - started
                yield token
                full = len(self._cached) >= self.seq_len
                if full or timings.generated_tokens == max_tokens:
                    generation.finish_reason = "length"
                    return
                if interrupted():
                    return
                started = time.perf_counter()
                logits = self._run([token])
                timings.spent = self.root.node.spent - before

        generation = Generation(tokens(), timings)
        return generation

    def logits(self, tokens: Sequence[int]) -> F32:
        """The logits of every position of a text, computed afresh.

        Args:
            tokens: at least one, at most the context.

        Returns:
            [len(tokens), vocab] float32.

        Raises:
            UsageError: there are none or too many.
        """
        if not 1 <= len(tokens) <= self.seq_len:
            raise UsageError(f"{len(tokens)} tokens for a context of {self.seq_len}")
        self._cached = []
        size = min(self._program.max_rows, self._program.max_logits)
        found = []
        for start in range(0, len(tokens), size):
            some = tokens[start : start + size]
            found.append(self._step(some, range(len(some))).copy())
        return np.concatenate(found)

    def _prefill(
        self, prompt: Sequence[int], shared: int, interrupted: Callable[[], bool]
    ) -> F32 | None:
        """Reads the prompt in batches; logits of its last token, None if interrupted before."""
        del self._cached[shared:]
        rest, size = prompt[shared:], self._program.max_rows
        for start in range(0, len(rest) - size, size):
            self._step(rest[start : start + size], ())
            if interrupted():
                return None
        last = (len(rest) - 1) // size * size
        return self._run(rest[last:])

    def _run(self, tokens: Sequence[int]) -> F32:
        """One step; the logits of its last token."""
        logits: F32 = self._step(tokens, (len(tokens) - 1,))[0]
        return logits

    def _step(self, tokens: Sequence[int], wanted: Sequence[int]) -> F32:
        start = len(self._cached)
        positions = tuple(range(start, start + len(tokens)))
        logits = self.root.step(tokens, Batch((0,) * len(tokens), positions, tuple(wanted)))
        self._cached += tokens
        return logits


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with.

    >>> _common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))

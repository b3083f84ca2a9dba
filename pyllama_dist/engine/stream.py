"""What a client holds of a generation: tokens as they come, from any thread."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue

from pyllama_dist.closing import Closing
from pyllama_dist.engine.sampler import F32, TokenLogprobs
from pyllama_dist.engine.sequence import Finish, Sequence, Timings


class Stream(Closing):
    """Tokens without the one that ends them; then `finish_reason` says why they ended.

    Whoever does not read it to its end cancels it, or leaves its context.

    Attributes:
        timings: what it has cost so far.
        ended: whether the last token was read.
        finish_reason: valid after the last token.
        logprobs: of each token that was read, if they were asked for.
        prompt_logits: [vocab] float32 of each token of the prompt, if they were asked for.
    """

    def __init__(self, sequence: Sequence, cancel: Callable[[Sequence], None]) -> None:
        """A stream that the engine fills through `put`; `cancel` tells it to stop."""
        self.timings: Timings = sequence.timings
        self.finish_reason: Finish = "interrupted"
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logits: list[F32] = []
        self._sequence, self._cancel = sequence, cancel
        self._queue: SimpleQueue[int | TokenLogprobs | F32 | Finish | BaseException] = SimpleQueue()
        self.put = self._queue.put
        self.ended = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        """The next token; waits for it.

        Raises:
            PyllamaError: the engine or this generation failed.
        """
        while not self.ended:
            token = self._read()
            if token is not None:
                return token
        raise StopIteration

    def ready(self) -> Iterator[int]:
        """The tokens that are there; does not wait. Raises as `__next__`."""
        while not self.ended and not self._queue.empty():
            token = self._read()
            if token is not None:
                yield token

    def _read(self) -> int | None:
        """Takes what came next, waiting for it: a token, or something else."""
        match self._queue.get():
            case int() as token:
                return token
            case TokenLogprobs() as logprobs:
                self.logprobs.append(logprobs)
                return logprobs.token
            case str() as finish:
                self.ended, self.finish_reason = True, finish
            case BaseException() as error:
                self.ended = True
                raise error
            case logits:
                self.prompt_logits.append(logits)
        return None

    def cancel(self) -> None:
        """Ends the generation after the step that is running; tokens until then still come."""
        self._cancel(self._sequence)

    def close(self, error: BaseException | None = None) -> None:
        """Cancels what was not read to its end."""
        if not self.ended:
            self.cancel()

"""Chooses the next token from logits."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.executor import kernels
from pyllama_kernels import reference, sampling
from pyllama_kernels.cpu import REFERENCE

_COLDEST = 1e38  # as float32 a number still, and so is its inverse


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are distributed-llama's."""

    temperature: float = 0.8  # 0: always the most likely token
    topp: float = 0.9  # of the most likely tokens, those that together reach this probability
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 <= self.topp <= 1):
            raise UsageError(
                f"temperature {self.temperature} and top-p {self.topp} cannot be: a temperature "
                f"is 0 or more, top-p from 0 to 1"
            )


class Sampler:
    """Draws tokens; the same seed draws the same tokens from the same logits."""

    def __init__(self, how: Sampling, vocab_size: int) -> None:
        """A sampler.

        Args:
            how: how to choose.
            vocab_size: tokens that the tokenizer knows; rows of the head beyond them are padding.
        """
        self._how, self._vocab_size = how, vocab_size
        self._random = np.random.default_rng(how.seed)
        self._sample = reference.sample if kernels() == REFERENCE else sampling.sample
        vectors = -(-vocab_size // sampling.VECTOR)
        self._odds = np.empty(vectors * sampling.VECTOR, np.float32)
        self._tokens = np.empty(vocab_size, np.int32)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token.

        Args:
            logits: [vocab] float32.

        Raises:
            FileError: none of them is the highest, since they are no numbers.
        """
        known = logits[: self._vocab_size]
        best = int(known.argmax())
        if not math.isfinite(known[best]):
            raise FileError(
                f"the model's output for token {best} is {known[best]}; its weights are damaged: "
                f"convert the checkpoint again"
            )
        if self._how.temperature == 0:
            return best
        coldness = min(_COLDEST, max(1 / _COLDEST, 1 / self._how.temperature))
        coin, topp = self._random.random(), self._how.topp
        memory = self._odds, self._tokens
        return int(self._sample(known, known[best], coldness, topp, coin, *memory))

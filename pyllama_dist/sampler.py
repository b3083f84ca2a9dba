"""Chooses the next token from logits."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import UsageError


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

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        """A sampler.

        Args:
            sampling: how to choose.
            vocab_size: tokens that the tokenizer knows; rows of the head beyond them are padding.
        """
        self._sampling, self._vocab_size = sampling, vocab_size
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token.

        Args:
            logits: [vocab] float32.
        """
        known = logits[: self._vocab_size]
        temperature, topp = self._sampling.temperature, self._sampling.topp
        if temperature == 0:
            return int(known.argmax())
        scaled = (known - known.max()).astype(np.float64) / temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        if 0 < topp < 1:
            before = np.cumsum(probabilities[order]) - probabilities[order]
            order = order[before < topp]
        reach = np.cumsum(probabilities[order])
        drawn = self._random.random() * reach[-1]
        return int(order[min(np.searchsorted(reach, drawn, side="right"), len(order) - 1)])

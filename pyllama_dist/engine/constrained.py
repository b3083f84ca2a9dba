"""Chooses tokens under a guide: a grammar, or whatever else knows which may come next."""

from typing import Protocol

import numpy as np

from pyllama_dist.engine.sampler import F32, U32, Sampler

_ALL = np.empty(0, np.uint32)


class Guide(Protocol):
    """Knows which tokens may come next in one generation."""

    def mask(self) -> U32 | None:
        """As `Sampler.mask`: [ceil(vocab / 32)] uint32; None: all tokens may come."""
        ...

    def accept(self, token: int) -> None:
        """Tells the token that was chosen."""
        ...


class ConstrainedSampler:
    """A sampler whose guide says before each choice which tokens it may choose from."""

    def __init__(self, sampler: Sampler, guide: Guide) -> None:
        """Takes over the sampler's mask; `guide` stands where the sampler's next token comes."""
        self._sampler, self._guide = sampler, guide

    def __call__(self, logits: F32) -> int:
        """The next token.

        Args:
            logits: [vocab] float32.

        Raises:
            FileError: as `Sampler`.
            UsageError: no token may be chosen, or the guide fails.
        """
        mask = self._guide.mask()
        self._sampler.mask = _ALL if mask is None else mask
        token = self._sampler(logits)
        self._guide.accept(token)
        return token

"""Chooses the next token of one sequence from its logits."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.executor import kernels
from pyllama_kernels import reference, sampling
from pyllama_kernels.cpu import REFERENCE

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]

_LARGEST = 1e38  # inverse temperature: as float32 a number still, and so is its inverse
_NO_MASK = np.empty(0, np.uint32)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are distributed-llama's.

    What is applied, in this order: penalties, bias, mask; temperature; top-k, top-p, min-p.
    """

    temperature: float = 0.8  # 0: always the most likely token
    topp: float = 0.9  # of the most likely tokens, those that together reach this probability
    seed: int | None = None
    top_k: int = 0  # so many of the most likely tokens; 0: all
    min_p: float = 0.0  # tokens at least this likely, as a share of the most likely one
    repetition_penalty: float = 1.0  # of tokens of the prompt and of the answer
    presence_penalty: float = 0.0  # of tokens of the answer
    frequency_penalty: float = 0.0  # of those, times their number
    bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of tokens

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 <= self.topp <= 1):
            raise UsageError(
                f"temperature {self.temperature} and top-p {self.topp} cannot be: a temperature "
                f"is 0 or more, top-p from 0 to 1"
            )
        if not (self.top_k >= 0 and 0 <= self.min_p <= 1):
            raise UsageError(
                f"top-k {self.top_k} and min-p {self.min_p} cannot be: top-k is 0 or more, min-p "
                f"from 0 to 1"
            )
        added = (self.presence_penalty, self.frequency_penalty, *self.bias.values())
        if not (0 < self.repetition_penalty < math.inf and all(map(math.isfinite, added))):
            raise UsageError(
                f"repetition penalty {self.repetition_penalty}, presence penalty "
                f"{self.presence_penalty}, frequency penalty {self.frequency_penalty} and bias "
                f"cannot be: the first is more than 0, and all are finite"
            )

    @property
    def penalizes(self) -> bool:
        """Whether the tokens of the text matter."""
        neutral = (1.0, 0.0, 0.0)
        return neutral != (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's own opinion of a token: before penalties, bias, mask and temperature."""

    token: int
    logprob: float  # natural logarithm of its probability
    top: Sequence[tuple[int, float]]  # the most likely tokens and theirs, the likeliest first


class Sampler:
    """Draws the tokens of one sequence; the same seed draws the same tokens from the same logits.

    Attributes:
        mask: bit i % 32 of word i // 32 says whether token i may be drawn, uint32; empty: all may.
    """

    def __init__(self, how: Sampling, vocab_size: int) -> None:
        """A sampler.

        Args:
            how: how to choose.
            vocab_size: tokens that the tokenizer knows; rows of the head beyond them are padding.

        Raises:
            UsageError: a token that is biased is beyond the vocabulary.
        """
        wrong = [token for token in how.bias if not 0 <= token < vocab_size]
        if wrong:
            raise UsageError(f"bias: {wrong[0]} is no token id from 0 to {vocab_size - 1}")
        self.mask: U32 = _NO_MASK
        self._how, self._vocab_size = how, vocab_size
        self._random = np.random.default_rng(how.seed)
        kernel = reference if kernels() == REFERENCE else sampling
        self._sample, self._adjust = kernel.sample, kernel.adjust
        vectors = -(-vocab_size // sampling.VECTOR)
        self._weights = np.empty(vectors * sampling.VECTOR, np.float32)
        self._tokens = np.empty(vocab_size, np.int32)
        self._adjusted = np.empty(vocab_size, np.float32)
        self._biased = np.array(list(how.bias), np.int32)
        self._bias = np.array(list(how.bias.values()), np.float32)
        self._counts: dict[int, int] = {}  # of the text's tokens: how often each was generated

    def begin(self, prompt: Sequence[int]) -> None:
        """A new text, whose tokens count for penalties."""
        self._counts = dict.fromkeys(prompt, 0)

    def __call__(self, logits: F32) -> int:
        """The next token.

        Args:
            logits: [vocab] float32.

        Raises:
            FileError: none of them is the highest, since they are no numbers.
            UsageError: the mask allows no token.
        """
        how, known = self._how, logits[: self._vocab_size]
        best = int(known.argmax())
        if not math.isfinite(known[best]):
            raise FileError(
                f"the model's output for token {best} is {known[best]}; its weights are damaged: "
                f"convert the checkpoint again"
            )
        if how.penalizes or how.bias or self.mask.size:
            known = self._changed(known)
            best = int(known.argmax())
            if known[best] == -math.inf:
                raise UsageError("the mask allows no token; allow one at least")
        token = best
        if how.temperature > 0:
            inverse = min(_LARGEST, max(1 / _LARGEST, 1 / how.temperature))
            left = how.top_k, how.topp, how.min_p
            uniform, memory = self._random.random(), (self._weights, self._tokens)
            token = int(self._sample(known, known[best], inverse, *left, uniform, *memory))
        if how.penalizes:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def logprobs(self, count: int) -> Callable[[F32, int], TokenLogprobs]:
        """A function of logits, [vocab] float32, and a token: with so many of the likeliest."""

        def find(logits: F32, token: int) -> TokenLogprobs:
            known = logits[: self._vocab_size].astype(np.float64)
            known -= known.max()
            known -= np.log(np.exp(known).sum())
            most = np.argpartition(-known, count)[:count] if count < known.size else known.argsort()
            top = sorted(((int(i), float(known[i])) for i in most), key=lambda pair: -pair[1])
            return TokenLogprobs(token, float(known[token]), top)

        return find

    def _changed(self, logits: F32) -> F32:
        seen = np.fromiter(self._counts.keys(), np.int32, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.int32, len(self._counts))
        how = self._how
        penalties = how.repetition_penalty, how.presence_penalty, how.frequency_penalty
        bias, out = (self._biased, self._bias), self._adjusted
        self._adjust(logits, seen, counts, *penalties, *bias, self.mask, out)
        return out

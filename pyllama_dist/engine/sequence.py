"""A sequence: what was asked for, the tokens so far, and its part of the KV cache."""

import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from pyllama_dist.engine.blocks import Chain
from pyllama_dist.engine.sampler import F32, TokenLogprobs
from pyllama_dist.node import Spent

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    prompt: Tokens[int]
    sampler: Callable[[F32], int]  # of [vocab] float32, which the next step overwrites
    stop: Collection[int] = ()  # tokens that end the answer
    max_tokens: int | None = None  # at least 1; None: as many as the context has room for
    logprobs: Callable[[F32, int], TokenLogprobs] | None = None  # of such logits and a token
    prompt_logits: bool = False  # of every token of the prompt, computed afresh; no answer
    group: str = ""  # whose it is: groups take turns to start
    salt: str = ""  # cached beginnings are shared with requests of the same salt only


class State(StrEnum):
    """Where a sequence is."""

    WAITING = "waiting"  # for a row of the block table, and for blocks
    PREFILL = "prefill"  # of its tokens, more than the last one are to be computed
    DECODE = "decode"
    DONE = "done"


@dataclass
class Timings:
    """What a generation has cost so far."""

    prompt_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the cache
    computed_tokens: int = 0  # rows of steps; after a preemption those again
    generated_tokens: int = 0
    preemptions: int = 0
    waiting_seconds: float = 0.0  # before its first step
    prefill_seconds: float = 0.0  # from then on, until the first token was sampled
    decode_seconds: float = 0.0  # steps and choices of further tokens; not what the user does
    spent: Spent = field(default_factory=Spent)  # by the root in steps; on a stop token too


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    request: Request
    number: int  # in the order of arrival
    tokens: list[int]
    timings: Timings
    state: State = State.WAITING
    chain: Chain = field(default_factory=Chain)  # what is computed, the planned step included
    row: int = -1  # of the block table, while it runs
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0  # its first step
    decoding: float = 0.0  # its first token was sampled

    @classmethod
    def of(cls, request: Request, number: int) -> "Sequence":
        """A sequence that has just arrived."""
        return cls(request, number, list(request.prompt), Timings(len(request.prompt)))

    @property
    def remaining(self) -> int:
        """Tokens to be computed before the next one can be sampled."""
        return len(self.tokens) - self.chain.length

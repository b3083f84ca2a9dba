"""Has all that is compiled at the beginning ready: from the cache, or compiled now."""

from typing import Any

import numpy as np
from numba import from_dtype, int64, types

from pyllama_kernels import oploop, optable, products, sampling, team, units

_OP = from_dtype(optable.OP)
_TABLE, _WORDS = types.Array(_OP, 1, "C"), types.Array(int64, 1, "C")


def compile_attention() -> None:
    """A large part of the op loop, for a process of its own: the cache brings them together."""
    _compile(units.run_attention, _OP, _WORDS, int64, int64, int64)


def compile_rest() -> None:
    """All the large parts but attention, likewise."""
    _compile(products.multiply_together, _TABLE, int64, int64, _WORDS, *[int64] * 4)
    _compile(units.run_rows, _OP, _WORDS, int64, int64)
    _compile(units.run_experts, _OP, _WORDS, int64, int64)
    _sample()


def warm_up() -> None:
    """Calls the op loop and the sampling of tokens, as they will be called."""
    table, step = np.zeros(1, optable.OP), np.zeros(optable.STEP_WORDS, np.int64)
    state = team.new_state(1)
    oploop.begin_step(state)
    team.is_inside(state, 0)
    oploop.run(table, 0, 0, step, state, 0, 1)
    oploop.end_step(state)
    _sample()


def _sample() -> None:
    logits = np.zeros(sampling.VECTOR, np.float32)
    tokens = np.zeros(logits.size, np.int32)
    mask = np.zeros(1, np.uint32)
    sampling.adjust(logits, tokens, tokens, 1.0, 0.0, 0.0, tokens, logits, mask, logits.copy())
    sampling.sample(logits, np.float32(0), 1.0, 0, 1.0, 0.0, 0.0, logits, tokens)


def _compile(kernel: Any, *arguments: Any) -> None:
    kernel.compile(arguments)

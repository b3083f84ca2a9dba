"""Has all that is compiled at the beginning ready: from the cache, or compiled now."""

import numpy as np

from pyllama_kernels import entries, oploop, optable, sampling, team
from pyllama_kernels.entry import ENTRIES

_LARGE = (entries.attend.name, entries.select.name)  # take as long to compile as all others


def compile_attention() -> None:
    """The large entries, for a process of its own: the cache brings them together."""
    for name in _LARGE:
        _ = ENTRIES[name].address


def compile_rest() -> None:
    """All other entries, likewise, and what calls them."""
    for name in ENTRIES.keys() - set(_LARGE):
        _ = ENTRIES[name].address
    warm_up()


def warm_up() -> None:
    """Calls the op loop and the sampling of tokens, as they will be called."""
    table, step = np.zeros(1, optable.OP), np.zeros(optable.STEP_WORDS, np.int64)
    state = team.new_state(1)
    oploop.begin_step(state)
    team.is_inside(state, 0)
    oploop.run(table, 0, 0, step, state, 0, 1)
    oploop.end_step(state)
    logits = np.zeros(sampling.VECTOR, np.float32)
    tokens = np.zeros(logits.size, np.int32)
    mask = np.zeros(1, np.uint32)
    sampling.adjust(logits, tokens, tokens, 1.0, 0.0, 0.0, tokens, logits, mask, logits.copy())
    sampling.sample(logits, np.float32(0), 1.0, 0, 1.0, 0.0, 0.0, logits, tokens)

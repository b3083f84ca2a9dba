"""Threads that stay inside compiled code: the barrier between ops, and waiting that yields.

A team shares one int64 array, `state`. Its words lie on cache lines of their own.
"""

from typing import Any

import numpy as np

from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    atomic_add,
    atomic_load,
    atomic_store,
    pause,
    sched_yield,
    usleep,
)

_LINE = 8  # int64 words in a cache line of 64 bytes
ARRIVED = 0 * _LINE  # threads that have reached the barrier
ROUND = 1 * _LINE  # barriers passed so far
COMMAND = 2 * _LINE  # commands given so far to the threads that follow
FIRST = 3 * _LINE  # the latest command: run the ops from FIRST to LAST
LAST = FIRST + 1  # LAST < FIRST: leave

_SPINS = 2000  # some 50 to 100 microseconds: longer than any op of a small model
_YIELDS = 50  # then give the core away
_NAP = 50  # then sleep, microseconds at a time: whoever is waited for may need this core


def new_state() -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shared words of a team, at rest."""
    return np.zeros(4 * _LINE, np.int64)


@kernel
def wait_while(state: Any, word: int, value: int) -> int:
    """Waits until `state[word]` is no longer `value`; returns what it is then.

    Spins for a bounded time only: on a machine with more threads than cores the thread that is
    waited for needs the core that the waiting one occupies.
    """
    tries = 0
    while True:
        now = atomic_load(state, word)
        if now != value:
            return now
        tries += 1
        if tries < _SPINS:
            pause()
        elif tries < _SPINS + _YIELDS:
            sched_yield()
        else:
            usleep(_NAP)


@kernel
def barrier(state: Any, n_threads: int) -> None:
    """Waits until all threads of the team have come here; what each wrote, all can read."""
    if n_threads == 1:
        return
    this_round = atomic_load(state, ROUND)
    if atomic_add(state, ARRIVED, 1) == n_threads - 1:
        atomic_store(state, ARRIVED, 0)
        atomic_store(state, ROUND, this_round + 1)
    else:
        wait_while(state, ROUND, this_round)

"""Threads that share the work of one op after the other without leaving compiled code.

The op that is being worked on is *open*: it is cut into parts, and who has nothing to do takes the
next one. Whoever finishes the last part opens the next op, or does it alone if it has one part. So
nobody waits for a thread that the system has put aside, unless it holds a part; the others do its
share.

A team shares one int64 array, `state`. Its words lie on cache lines of their own. The main word is
the ticket: number of the open op, its parts, and parts taken so far. It is read and counted up in
one atomic step, so a thread that was away for long cannot take a part that does not exist any more.
"""

from typing import Any

import numpy as np

from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    atomic_add,
    atomic_load,
    atomic_store,
    pause,
    prefetch,
    sched_yield,
    usleep,
)

_LINE = 8  # int64 words in a cache line of 64 bytes
TICKET = 0 * _LINE
DONE = 1 * _LINE  # parts of the open op that are done
COMMAND = 2 * _LINE  # commands given so far to the threads that follow
LAST = 3 * _LINE  # the op after the last one of the latest command
LEAVING = 4 * _LINE  # 1: threads that find nothing to do leave

_BITS = 20  # of a ticket for the parts, and for the parts taken
_MASK = (1 << _BITS) - 1

_SPINS = 2000  # some 50 to 100 microseconds: longer than any part of a small model's op
_AHEAD, _LINES, _LINE_BYTES = 4096, 8, 64  # lines that are brought near, some with each spin
_YIELDS = 50  # then give the core away
_NAP = 50  # then sleep, microseconds at a time: whoever is waited for may need this core


def new_state() -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shared words of a team, at rest."""
    return np.zeros(5 * _LINE, np.int64)


@kernel
def open_op(state: Any, op: int, parts: int) -> None:
    """Opens an op; with no parts, none is open."""
    atomic_store(state, DONE, 0)
    atomic_store(state, TICKET, (op << (2 * _BITS)) | (parts << _BITS))


@kernel
def take_part(state: Any) -> tuple[int, int, int]:
    """Takes a part: the op, its parts, the part. There are none left if part >= parts."""
    ticket = atomic_add(state, TICKET, 1)
    return ticket >> (2 * _BITS), (ticket >> _BITS) & _MASK, ticket & _MASK


@kernel
def is_last(state: Any, parts: int) -> bool:
    """Called when a part is done: whether all of them are."""
    return atomic_add(state, DONE, 1) == parts - 1


@kernel
def wait_for_next(state: Any, op: int, ahead: int) -> None:
    """Waits until the op is no longer open, and brings near what will be read from `ahead`."""
    tries = 0
    while atomic_load(state, TICKET) >> (2 * _BITS) == op:
        first = _LINES * tries
        if first < _AHEAD and ahead:
            for line in range(first, first + _LINES):
                prefetch(ahead + _LINE_BYTES * line)
        tries = _rest(tries)


@kernel
def wait_for_command(state: Any, command: int) -> None:
    """Waits until a later command is given."""
    tries = 0
    while atomic_load(state, COMMAND) == command:
        tries = _rest(tries)


@kernel
def _rest(tries: int) -> int:
    """One turn of waiting: a spin for a bounded time, because on a machine with more threads than
    cores the thread that is waited for needs the core that the waiting one occupies.
    """
    if tries < _SPINS:
        pause()
    elif tries < _SPINS + _YIELDS:
        sched_yield()
    else:
        usleep(_NAP)
    return tries + 1

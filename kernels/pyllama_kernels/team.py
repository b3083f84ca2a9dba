"""Threads that share the work of one op after the other without leaving compiled code.

The op that is being worked on is *open*: it is cut into parts, and who has nothing to do takes the
next one. Whoever finishes the last part opens the next op, or does it alone if it has one part. So
nobody waits for a thread that the system has put aside, unless it holds a part; the others do its
share.

A team shares one int64 array, `state`. Words that are read often lie on cache lines of their
own. The main word is the ticket: number of the open op, its parts, and parts taken so far. It is
read and counted up in one atomic step, so a thread that was away for long cannot take a part that
does not exist any more.
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
STEPPING = 4 * _LINE  # 1: within a step, where threads that find nothing to do stay
_INSIDE = 5 * _LINE  # and one word for each thread that follows. 1: it will see a command

_BITS = 20  # of a ticket for the parts, and for the parts taken
_MASK = (1 << _BITS) - 1

_SPINS = 2000  # some 50 to 100 microseconds: longer than any part of a small model's op
_AHEAD, _LINES, _LINE_BYTES = 4096, 8, 64  # lines that are brought near, some with each spin
_YIELDS = 50  # then give the core away
_LINGERS = 12000  # spins between two steps: some 300 microseconds, in which a token is chosen
_NAP = 50  # then sleep, microseconds at a time: whoever is waited for may need this core


def new_state(n_threads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shared words of a team, at rest."""
    return np.zeros(_INSIDE + n_threads, np.int64)


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
def enter(state: Any, thread: int) -> None:
    """A thread that follows comes."""
    atomic_add(state, _INSIDE + thread, 1)


@kernel
def is_inside(state: Any, thread: int) -> bool:
    """Whether a thread that follows is there, and stays until the step is over."""
    return atomic_add(state, _INSIDE + thread, 0) > 0


@kernel
def wait_for_command(state: Any, command: int, thread: int) -> bool:
    """Waits until a later command is given; False if no step is going on and none begins soon."""
    tries = lingers = 0
    while atomic_load(state, COMMAND) == command:
        if atomic_load(state, STEPPING):
            tries = _rest(tries)
        elif lingers < _LINGERS:
            # No yields: beside another program each would last a whole time slice.
            pause()
            lingers += 1
        elif may_leave(state, thread):
            return False
    return True


@kernel
def may_leave(state: Any, thread: int) -> bool:
    """Whether no step is going on; the thread is then no longer inside.

    Who begins a step says so before it looks who is inside, who leaves does so before it looks
    whether a step has begun: one of them sees the other.
    """
    atomic_add(state, _INSIDE + thread, -1)
    if atomic_add(state, STEPPING, 0) == 0:
        return True
    atomic_add(state, _INSIDE + thread, 1)
    return False


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

"""A pool of threads that works through the ops of a step without leaving compiled code.

The current op is *open*: it is cut into ranges, one for each thread, and each range into parts, the
work items. A thread takes the parts of its own range in their order, which is a sequential read of
memory; then it takes parts that are left in the ranges of others (work stealing). The thread that
finishes the last part opens the next op, or runs it alone if it has one part. There is no barrier:
a preempted thread delays the others only while it holds a part.

A team shares one int64 array, `state`. Words that are read often lie on cache lines of their own.
Each range has a ticket: number of the open op, its ranges, parts of a range, and parts taken of
this one so far. One atomic fetch-and-add reads and increments it, so a thread that was preempted
for long cannot take a part of an op that is over.
"""

from typing import Any

import numpy as np

from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    LINE,
    atomic_add,
    atomic_load,
    atomic_store,
    pause,
    prefetch,
    sched_yield,
    usleep,
)

_LINE = LINE // 8  # int64 words in a cache line
DONE = 0 * _LINE  # parts of the open op that are done
COMMAND = 1 * _LINE  # commands given so far to the threads that follow
LAST = 2 * _LINE  # the op after the last one of the latest command
STEPPING = 3 * _LINE  # 1: within a step, where threads that find nothing to do stay
# From here on a line for each thread: the ticket of its range, and 1 if it will see a command.
_TICKET, _INSIDE = 4 * _LINE, 4 * _LINE + 1

_BITS = 15  # of a ticket for the ranges, for the parts of each, and for the parts taken of this one
_MASK = (1 << _BITS) - 1

_SPINS = 2000  # some 50 to 100 microseconds: longer than any part of a small model's op
_AHEAD, _LINES = 4096, 8  # bytes that are brought near, some lines with each spin
_YIELDS = 50  # then yield the core
_LINGERS = 12000  # spins between two steps: some 300 microseconds, in which a token is chosen
_NAP = 50  # then sleep, microseconds at a time: a thread that still works may need this core


def new_state(n_threads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The shared words of a team with no op open."""
    return np.zeros(_TICKET + _LINE * n_threads, np.int64)


@kernel
def open_op(state: Any, op: int, ranges: int, parts: int, n_threads: int) -> None:
    """Opens an op that is cut into ranges of so many parts each; with none, no op is open."""
    atomic_store(state, DONE, 0)
    ticket = (((op << _BITS) | ranges) << _BITS | parts) << _BITS
    # The first range comes last. Before, nobody can finish the op and open another one, of which
    # this loop would then overwrite a ticket.
    for thread in range(n_threads - 1, -1, -1):
        taken = 0 if thread < ranges else parts
        atomic_store(state, _TICKET + _LINE * thread, ticket | taken)


@kernel
def take_part(state: Any, where: int) -> tuple[int, int, int, int]:
    """Takes a part of a range: the op, its ranges, the parts of each, the part.

    There are none left if part >= parts.
    """
    return _read(atomic_add(state, _TICKET + _LINE * where, 1))


@kernel
def find_range(state: Any, thread: int, n_threads: int) -> int:
    """A range of which there are parts left, the thread's own first; or its own."""
    for turn in range(n_threads):
        where = (thread + turn) % n_threads
        _, _, parts, part = _read(atomic_load(state, _TICKET + _LINE * where))
        if part < parts:
            return where
    return thread


@kernel
def _read(ticket: int) -> tuple[int, int, int, int]:
    op, ranges = ticket >> (3 * _BITS), ticket >> (2 * _BITS) & _MASK
    return op, ranges, ticket >> _BITS & _MASK, ticket & _MASK


@kernel
def are_last(state: Any, done: int, parts: int) -> bool:
    """Called when some parts are done: whether all of them are."""
    return atomic_add(state, DONE, done) == parts - done


@kernel
def wait_for_next(state: Any, thread: int, op: int, ahead: int) -> None:
    """Waits until the op is no longer open; prefetches the weights at address `ahead` meanwhile.

    A command may end with the number of this op, of which none is then open: no ranges say so.
    """
    tries = 0
    while True:
        current, ranges, _, _ = _read(atomic_load(state, _TICKET + _LINE * thread))
        if current != op or ranges == 0:
            return
        first = _LINES * LINE * tries
        if first < _AHEAD and ahead:
            for line in range(first, first + _LINES * LINE, LINE):
                prefetch(ahead + line)
        tries = _rest(tries)


@kernel
def enter(state: Any, thread: int) -> None:
    """Counts a follower thread as inside the compiled loop."""
    atomic_add(state, _INSIDE + _LINE * thread, 1)


@kernel
def is_inside(state: Any, thread: int) -> bool:
    """Whether a follower thread is inside the compiled loop, where it stays until the step ends."""
    return atomic_add(state, _INSIDE + _LINE * thread, 0) > 0


@kernel
def wait_for_command(state: Any, command: int, thread: int) -> bool:
    """Waits for the next command; False if no step is running and none begins in time."""
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
    atomic_add(state, _INSIDE + _LINE * thread, -1)
    if atomic_add(state, STEPPING, 0) == 0:
        return True
    atomic_add(state, _INSIDE + _LINE * thread, 1)
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

"""The compiled op loop: a team of threads works through a table of ops.

A row of the table is one op: its entry, the addresses of its memory and its sizes. An op is cut by
its outputs (rows of a matrix, heads, blocks) into ranges and parts, so that no result depends on
the number of threads or on who does which part: see `team`.
"""

from typing import Any

from pyllama_kernels.entry import call
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import BLOCK, GROUP_BYTES
from pyllama_kernels.lowlevel import atomic_add, atomic_load, atomic_store
from pyllama_kernels.optable import N_ROWS, POSITIONS, Cut, i64, split
from pyllama_kernels.pages import CHUNK
from pyllama_kernels.products import Q40, count_units
from pyllama_kernels.team import (
    COMMAND,
    LAST,
    STEPPING,
    are_last,
    enter,
    find_range,
    open_op,
    take_part,
    wait_for_command,
    wait_for_next,
)

_FAR = 16  # ops between two matrices, at most
_PARTS = 4  # parts of a range of what takes long: a thread that is slow gets fewer
_PRODUCTS = 1 << 17  # in a part of a matrix product, at least
_SCORES = 1 << 19  # products for scores in a part of attention, at least
_WORTH_SHARING = 1 << 16  # products for scores of a short context, and what goes with them
_AS_POSITIONS = 64  # what goes with them takes as long as so many positions
_NUMBERS = 1 << 12  # in a part of anything else, at least


@kernel
def count_fused(op: Any, step: Any, n_threads: int) -> int:
    """How many ops are fused with this one, itself included: see `OP`."""
    if n_threads == 1:
        return 1
    if op.units:
        # For longer contexts attention is cut by itself, into chunks of positions too.
        one_row = step[N_ROWS] == 1
        seen = i64(step[POSITIONS], 1)[0] + _AS_POSITIONS if one_row else 0
        if not one_row or seen > CHUNK or seen * op.heads * op.n < _WORTH_SHARING:
            return 1
    return op.fused


@kernel
def count_parts(table: Any, i: int, step: Any, n_threads: int) -> tuple[int, int]:
    """How op i is cut, with those that are fused with it: into ranges, and parts of each.

    Enough for all threads, none too small to be worth it.
    """
    op = table[i]
    rows = step[op.rows]
    if n_threads == 1 or rows == 0 or op.cut == Cut.ONE:
        return min(rows, 1), 1
    if op.units and count_fused(op, step, n_threads) > 1:
        return min(n_threads, op.units), 1
    if op.cut == Cut.PRODUCTS:
        outputs = 0
        for row in range(i, i + op.fused):
            outputs += table[row].m
        # In a batch some experts have more rows than others: more parts make up for it.
        parts = 4 * _PARTS if op.plan and step[N_ROWS] > 1 else _PARTS
        return cut_twice(parts, rows * op.n * outputs // _PRODUCTS, n_threads)
    if op.cut == Cut.ATTENTION:
        seen = i64(step[POSITIONS], rows).sum()
        return cut_twice(_PARTS, seen * op.cost // _SCORES, n_threads)
    if op.cut == Cut.SELECTION:
        return cut_twice(_PARTS, rows, n_threads)
    ranges = min(n_threads, 1 + rows * op.cost // _NUMBERS)
    return min(rows, ranges) if op.cut == Cut.ROWS else ranges, 1


@kernel
def cut_twice(parts: int, most: int, n_threads: int) -> tuple[int, int]:
    """The number of ranges, one for each thread, and of parts of each: at most `most` in all."""
    ranges = max(1, min(n_threads, most))
    return ranges, max(1, min(parts, most // ranges))


@kernel
def cut(op: Any, step: Any, part: int, parts: int, n_threads: int) -> tuple[int, int, int, int]:
    """What a part of the ops that are fused with an op is made of.

    Its first unit, the one after its last, all units; and the ops that are run for each unit, one
    after the other. Products have one unit for each part: they are cut in `multiply_fused`.
    """
    fused = 1 if op.cut == Cut.PRODUCTS else count_fused(op, step, n_threads)
    if fused == 1 or op.units == 0:
        return part, part + 1, parts, fused
    first, last = split(op.units, part, parts)
    return first, last, op.units, fused


@kernel
def guided_split(total: int, part: int, parts: int) -> tuple[int, int]:
    """As `split`, but parts shrink towards the end, so that all threads end at about the same time.

    After `i` of `n` parts, (1 - i / n)^3 of the total is left. Shrinking parts are the idea of
    guided self-scheduling: Polychronopoulos and Kuck, Guided Self-Scheduling, 1987.
    """
    left, after = parts - part, parts - part - 1
    return total - total * left**3 // parts**3, total - total * after**3 // parts**3


@kernel
def multiply_fused(
    table: Any, first: int, last: int, step: Any, where: int, ranges: int, part: int, parts: int
) -> None:
    """One part of range `where` of products of the same input, ops `first` to `last` of the table.

    They are cut as if they were one, so a thread may go from the end of one matrix to the beginning
    of the next. What a range reads lies in a row, but for one jump from matrix to matrix.
    """
    total = 0
    for i in range(first, last):
        total += count_units(table[i])
    start, stop = split(total, where, ranges)
    a, z = guided_split(stop - start, part, parts)
    a, z = start + a, start + z
    for i in range(first, last):
        op, units = table[i], count_units(table[i])
        if a < units and z > 0:
            call(op.entry, op, step, max(a, 0), min(z, units), 0)
        a, z = a - units, z - units


@kernel
def run_unit(
    table: Any, i: int, step: Any, part: int, parts: int, each: int, thread: int, n_threads: int
) -> None:
    """One part of op i, by one thread; of products, of all that are fused with it.

    `each` is the parts of a range; `part` and `parts` count those of all ranges.
    """
    op = table[i]
    if op.cut == Cut.PRODUCTS:
        last, ranges = i + count_fused(op, step, n_threads), parts // each
        multiply_fused(table, i, last, step, part // each, ranges, part % each, each)
    else:
        call(op.entry, op, step, part, parts, thread)


@kernel
def find_next(table: Any, i: int, step: Any, state: Any, n_threads: int) -> tuple[int, int, int]:
    """Op i of the table or, if it has nothing to do, the next one that has; and how it is cut.

    That is with all ops that are fused with it. At the end of the command there are 0 ranges.
    """
    last = atomic_load(state, LAST)
    while i < last:
        ranges, each = count_parts(table, i, step, n_threads)
        if ranges > 0:
            return i, ranges, each
        i += count_fused(table[i], step, n_threads)
    return i, 0, 0


@kernel
def next_weights(table: Any, i: int, step: Any, state: Any, thread: int, n_threads: int) -> int:
    """Where a thread will go on to read, or 0: its range of the next matrices from op i on."""
    last = min(atomic_load(state, LAST), i + _FAR)
    while i < last:
        op = table[i]
        if op.cut == Cut.PRODUCTS and op.kind == Q40 and op.plan == 0:
            units = 0
            for j in range(i, i + count_fused(op, step, n_threads)):
                units += count_units(table[j])
            first = split(units, thread, n_threads)[0]
            return op.w + first * (op.n // BLOCK) * GROUP_BYTES
        i += 1
    return 0


@kernel
def run(
    table: Any, first: int, last: int, step: Any, state: Any, thread: int, n_threads: int
) -> None:
    """Runs ops of the table with the whole team.

    Thread 0 leads: it gives the command and returns when all is done. The others follow: they help
    with one command after the other, and return when a step is over and none begins soon.

    Args:
        table: [n] OP.
        first: the first op, for the thread that leads.
        last: the op after the last one, likewise.
        step: int64, see `N_ROWS`.
        state: the words of the team.
        thread: this thread.
        n_threads: in the team.
    """
    if thread == 0:
        atomic_store(state, LAST, last)
        i, ranges, each = find_next(table, first, step, state, n_threads)
        open_op(state, i, ranges, each, n_threads)
        atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)
    else:
        enter(state, thread)
    while True:
        command = atomic_load(state, COMMAND)
        while True:
            where = find_range(state, thread, n_threads)
            i, ranges, each, part = take_part(state, where)
            if ranges == 0:
                break
            if part >= each:
                if where == thread:
                    after = i + count_fused(table[i], step, n_threads)
                    ahead = next_weights(table, after, step, state, thread, n_threads)
                    wait_for_next(state, thread, i, ahead)
                continue
            while ranges > 0:
                parts, done = ranges * each, 0
                while part < each:
                    unit, stop, units, count = cut(
                        table[i], step, where * each + part, parts, n_threads
                    )
                    while unit < stop:
                        for j in range(i, i + count):
                            run_unit(table, j, step, unit, units, each, thread, n_threads)
                        unit += 1
                    done += 1
                    part = take_part(state, where)[3] if parts > 1 else each
                if parts > 1 and not are_last(state, done, parts):
                    break
                # What has one part is done at once: to open it would only move its data about.
                i += count_fused(table[i], step, n_threads)
                i, ranges, each = find_next(table, i, step, state, n_threads)
                where = part = 0
                if ranges * each != 1:
                    open_op(state, i, ranges, each, n_threads)
                    break
        if thread == 0 or not wait_for_command(state, command, thread):
            return


@kernel
def begin_step(state: Any) -> None:
    """Keeps follower threads inside the compiled loop from now on."""
    atomic_store(state, STEPPING, 1)
    atomic_add(
        state, STEPPING, 0
    )  # a full fence: a store may still be in the store buffer; see `may_leave`


@kernel
def end_step(state: Any) -> None:
    """Lets follower threads leave the compiled loop from now on."""
    atomic_store(state, STEPPING, 0)

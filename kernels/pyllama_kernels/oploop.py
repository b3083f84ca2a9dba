"""The compiled op loop: a table of ops, and the threads that work through it together.

A row of the table is one op: its code, the addresses of its memory and its sizes. An op is cut by
its outputs (rows of a matrix, heads, blocks) into ranges and parts, so that no result depends on
the number of threads or on who does which part: see `team`.
"""

from typing import Any

from pyllama_kernels.jit import kernel, kernel_within
from pyllama_kernels.layout import BLOCK, GROUP_BYTES
from pyllama_kernels.lowlevel import atomic_add, atomic_load, atomic_store
from pyllama_kernels.optable import N_ROWS, POSITIONS, Code, i64, share
from pyllama_kernels.pages import CHUNK
from pyllama_kernels.products import count_units, is_product, multiply_together
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
from pyllama_kernels.units import run_attention, run_experts, run_rows

_FAR = 16  # ops between two matrices, at most
_SHARES = 4  # parts of a range of what takes long: a thread that is slow gets fewer
_PRODUCTS = 1 << 17  # in a part of a matrix product, at least
_SCORES = 1 << 19  # products for scores in a part of attention, at least
_WORTH_SHARING = 1 << 16  # products for scores of a short context, and what goes with them
_AS_POSITIONS = 64  # what goes with them takes as long as so many positions
_NUMBERS = 1 << 12  # in a part of anything else, at least


@kernel
def count_together(op: Any, step: Any, n_threads: int) -> int:
    """How many ops are opened with this one: see `OP`."""
    if n_threads == 1:
        return 1
    if op.units:
        # For longer contexts attention is cut by itself, into chunks of positions too.
        one_row = step[N_ROWS] == 1
        seen = i64(step[POSITIONS], 1)[0] + _AS_POSITIONS if one_row else 0
        if not one_row or seen > CHUNK or seen * op.heads * op.n < _WORTH_SHARING:
            return 1
    return op.together


@kernel
def count_parts(table: Any, i: int, step: Any, n_threads: int) -> tuple[int, int]:
    """How op i is cut, with those that are opened with it: into ranges, and parts of each.

    Enough for all threads, none too small to be worth it.
    """
    op = table[i]
    rows = step[op.rows]
    if n_threads == 1 or rows == 0:
        return min(rows, 1), 1
    code, n = op.code, op.n
    if op.units and count_together(op, step, n_threads) > 1:
        return min(n_threads, op.units), 1
    if is_product(op):
        outputs = 0
        for row in range(i, i + op.together):
            outputs += table[row].m
        # In a batch some experts have more rows than others: more parts make up for it.
        shares = 4 * _SHARES if op.plan and step[N_ROWS] > 1 else _SHARES
        return cut_twice(shares, rows * n * outputs // _PRODUCTS, n_threads)
    if code == Code.ROUTE:
        return min(rows, n_threads, 1 + rows * n * op.active // _NUMBERS), 1
    if code == Code.MAKE_PLAN:
        return 1, 1
    if code == Code.COMBINE:
        return min(n_threads, 1 + rows * n * op.active // _NUMBERS), 1
    if code == Code.ATTEND:
        seen = i64(step[POSITIONS], rows).sum()
        return cut_twice(_SHARES, seen * op.heads * n // _SCORES, n_threads)
    if code == Code.SELECT:
        return cut_twice(_SHARES, rows, n_threads)
    gathers = code == Code.GATHER or code == Code.DISPATCH
    if code == Code.RMS_NORM or code == Code.LAYER_NORM or gathers:
        return min(rows, n_threads), 1
    heads = op.heads if op.heads else 1
    return min(n_threads, 1 + rows * heads * n // _NUMBERS), 1


@kernel
def cut_twice(shares: int, most: int, n_threads: int) -> tuple[int, int]:
    """A range for each thread, and so many parts of it; in all no more than `most`, or one."""
    ranges = max(1, min(n_threads, most))
    return ranges, max(1, min(shares, most // ranges))


@kernel
def cut(op: Any, step: Any, part: int, parts: int, n_threads: int) -> tuple[int, int, int, int]:
    """What a part of the ops that are opened with an op is made of.

    Its first unit, the one after its last, all units; and the ops that are run for each unit, one
    after the other. Products have one unit for each part: they are cut within `multiply_together`.
    """
    if is_product(op):
        return part, part + 1, parts, 1
    together = count_together(op, step, n_threads)
    if together == 1 or op.units == 0:
        return part, part + 1, parts, together
    first, last = share(op.units, part, parts)
    return first, last, op.units, together


@kernel_within
def run_unit(
    table: Any, i: int, step: Any, part: int, parts: int, each: int, thread: int, n_threads: int
) -> None:
    """One part of op i, by one thread; of products, of all that are opened with it.

    `each` is the parts of a range; `part` and `parts` count those of all ranges.
    """
    op = table[i]
    if op.code < Code.MATMUL_F32:
        run_rows(op, step, part, parts)
    elif op.code < Code.ROPE:
        last, ranges = i + count_together(op, step, n_threads), parts // each
        multiply_together(table, i, last, step, part // each, ranges, part % each, each)
    elif op.code < Code.ROUTE:
        run_attention(op, step, part, parts, thread)
    else:
        run_experts(op, step, part, parts)


@kernel
def find_next(table: Any, i: int, step: Any, state: Any, n_threads: int) -> tuple[int, int, int]:
    """Op i of the table or, if it has nothing to do, the next one that has; and how it is cut.

    That is with all ops that are opened with it. At the end of the command there are 0 ranges.
    """
    last = atomic_load(state, LAST)
    while i < last:
        ranges, each = count_parts(table, i, step, n_threads)
        if ranges > 0:
            return i, ranges, each
        i += count_together(table[i], step, n_threads)
    return i, 0, 0


@kernel
def next_weights(table: Any, i: int, step: Any, state: Any, thread: int, n_threads: int) -> int:
    """Where a thread will go on to read, or 0: its range of the next matrices from op i on."""
    last = min(atomic_load(state, LAST), i + _FAR)
    while i < last:
        op = table[i]
        if op.code == Code.MATMUL_Q40:
            units = count_units(table, i, i + count_together(op, step, n_threads))
            first = share(units, thread, n_threads)[0]
            return op.w + first * (op.n // BLOCK) * GROUP_BYTES
        i += 1
    return 0


@kernel
def run(
    table: Any, first: int, last: int, step: Any, state: Any, thread: int, n_threads: int
) -> None:
    """Runs ops of the table with the whole team.

    Thread 0 leads: it gives the command and returns when all is done. The others follow: they help
    with one command after the other, and return when a step is over and none begins soon. One
    function for both: each further one would hold a copy of all kernels, and take seconds to
    compile.

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
                    after = i + count_together(table[i], step, n_threads)
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
                i += count_together(table[i], step, n_threads)
                i, ranges, each = find_next(table, i, step, state, n_threads)
                where = part = 0
                if ranges * each != 1:
                    open_op(state, i, ranges, each, n_threads)
                    break
        if thread == 0 or not wait_for_command(state, command, thread):
            return


@kernel
def begin_step(state: Any) -> None:
    """Threads that follow are to stay from now on."""
    atomic_store(state, STEPPING, 1)
    atomic_add(state, STEPPING, 0)  # a store alone could still be on its way: see `may_leave`


@kernel
def end_step(state: Any) -> None:
    """Threads that follow may leave from now on."""
    atomic_store(state, STEPPING, 0)

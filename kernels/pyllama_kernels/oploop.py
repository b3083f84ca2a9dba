"""The compiled op loop: a table of ops, and the threads that work through it together.

A row of the table is one op: its code, the addresses of its memory and its sizes. An op is cut into
parts by its outputs (rows of a matrix, heads, blocks), so that no result depends on the number of
threads or on who does which part: see `team`.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray

from pyllama_kernels import cpu, ops
from pyllama_kernels.attention import attend, count_chunks, join
from pyllama_kernels.cache import store_keys, store_values
from pyllama_kernels.experts import combine, make_plan, quantize_experts, route
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import (
    BLOCK,
    GROUP,
    GROUP_BYTES,
    ROW_BYTES,
    activation_bytes,
    packed_rows,
    tile_rows,
)
from pyllama_kernels.lowlevel import (
    atomic_load,
    atomic_store,
    float32_pointer,
    int64_pointer,
    uint8_pointer,
)
from pyllama_kernels.plans import EXPERTS, HEAD, LISTED, PAIRS, ROOM, lists, plan_words
from pyllama_kernels.selection import select
from pyllama_kernels.team import (
    COMMAND,
    LAST,
    LEAVING,
    is_last,
    open_op,
    take_part,
    wait_for_command,
    wait_for_next,
)

matmul_q40 = cpu.load(cpu.choose().name).matmul_q40


class Code(IntEnum):
    """What an op does: the kernel of the same name."""

    RMS_NORM = 0
    QUANTIZE = 1
    PACK_Q80 = 2
    MATMUL_F32 = 3
    MATMUL_Q40 = 4
    MATMUL_Q80 = 5
    ROPE = 6
    STORE_KEYS = 7
    STORE_VALUES = 8
    ATTEND = 9
    JOIN = 10
    SILU_MUL = 11
    MERGE_F32 = 12
    MERGE_Q80 = 13
    ADD = 14
    GATHER = 15
    LAYER_NORM = 16
    CONCAT = 17
    SELECT = 18
    ROUTE = 19
    MAKE_PLAN = 20
    DISPATCH = 21  # gathers the rows of a plan
    QUANTIZE_EXPERTS = 22
    EXPERTS_F32 = 23  # for each expert, the kernel that `MATMUL_F32` is for a batch
    EXPERTS_Q40 = 24
    EXPERTS_Q80 = 25
    COMBINE = 26


# Addresses are of the first byte; `n` and `m` are values in a row of the input and of the output.
OP = np.dtype(
    [
        ("code", np.int64),
        ("rows", np.int64),  # which word of a step counts the rows that are written
        ("a", np.int64),  # first input
        ("b", np.int64),  # second input: up, value cache, sin
        ("c", np.int64),  # third input: bias, key cache, cos
        ("w", np.int64),  # weight; for experts: the addresses of their weights
        ("out", np.int64),
        ("n", np.int64),
        ("m", np.int64),
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("seq_len", np.int64),
        ("n_slots", np.int64),
        ("kind", np.int64),  # of a cache, see `cache`
        ("pages", np.int64),
        ("page_bytes", np.int64),
        ("first", np.int64),
        ("group", np.int64),
        ("parts", np.int64),
        ("stride", np.int64),  # bytes between the parts of a pipe
        ("epsilon", np.float64),
        ("scale", np.float64),  # of scores, or of experts' weights
        ("plan", np.int64),  # see `plans`
        ("active", np.int64),  # experts chosen for each row
        ("active_groups", np.int64),
        ("normalize", np.int64),
        ("together", np.int64),  # ops from this one on that several threads work on at once
    ],
    align=True,
)

# The words of `step`, an int64 array: counts of rows (of the batch, with logits, of experts), the
# addresses of the rows' facts, and of memory for attention: the chunks' results, and scratch of so
# many bytes for each thread.
N_ROWS, N_LOGITS, N_PAIRS, SLOTS, POSITIONS, LOGITS, PARTS, SCRATCH, SCRATCH_BYTES = range(9)
STEP_WORDS = 9

_FAR = 16  # ops between two matrices, at most
_SHARES = 4  # parts for each thread of what takes long: a thread that is slow gets fewer
_PRODUCTS = 1 << 17  # in a part of a matrix product, at least
_NUMBERS = 1 << 12  # in a part of anything else, at least


@kernel
def f32(address: int, *shape: int) -> Any:
    """Float32 memory as an array of the given shape."""
    return carray(float32_pointer(address), shape)


@kernel
def u8(address: int, *shape: int) -> Any:
    """Uint8 memory as an array of the given shape."""
    return carray(uint8_pointer(address), shape)


@kernel
def i64(address: int, n: int) -> Any:
    """Int64 memory as an array of n."""
    return carray(int64_pointer(address), (n,))


@kernel
def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """A part of `total` things: start and stop."""
    return total * part // parts, total * (part + 1) // parts


@kernel
def falling_share(total: int, part: int, parts: int) -> tuple[int, int]:
    """As `share`, but the last parts are the smallest, so that all threads end at about a time."""
    start, stop = parts - part, parts - part - 1  # counted from the end, where parts grow by 2
    return (
        total - total * start * start // (parts * parts),
        total - total * stop * stop // (parts * parts),
    )


@kernel
def count_parts(op: Any, step: Any, n_threads: int) -> int:
    """Into how many parts an op is cut: enough for all threads, none too small to be worth it."""
    rows = step[op.rows]
    if n_threads == 1 or rows == 0:
        return min(rows, 1)
    code, n = op.code, op.n
    if code == Code.MATMUL_Q40 or code == Code.MATMUL_F32 or code == Code.MATMUL_Q80:
        return min(_SHARES * n_threads, 1 + rows * n * op.m // _PRODUCTS)
    if code == Code.EXPERTS_Q40 or code == Code.EXPERTS_F32 or code == Code.EXPERTS_Q80:
        # In a batch some experts have more rows than others: more parts make up for it.
        shares = _SHARES if step[N_ROWS] == 1 else 4 * _SHARES
        return min(shares * n_threads, 1 + rows * n * op.m // _PRODUCTS)
    if code == Code.ROUTE:
        return min(rows, n_threads, 1 + rows * n * op.active // _NUMBERS)
    if code == Code.MAKE_PLAN:
        return 1
    if code == Code.COMBINE:
        return min(n_threads, 1 + rows * n * op.active // _NUMBERS)
    if code == Code.ATTEND:
        seen = rows * i64(step[POSITIONS], rows).max()
        return min(_SHARES * n_threads, 1 + seen * op.heads * n // _PRODUCTS)
    if code == Code.SELECT:
        return rows
    gathers = code == Code.GATHER or code == Code.DISPATCH
    if code == Code.RMS_NORM or code == Code.LAYER_NORM or gathers:
        return min(rows, n_threads)
    heads = op.heads if op.heads else 1
    return min(n_threads, 1 + rows * heads * n // _NUMBERS)


@kernel
def count_together(op: Any, n_threads: int) -> int:
    """How many ops are opened with this one: products of the same input, for several threads."""
    return op.together if n_threads > 1 else 1


@kernel
def count_parts_together(table: Any, i: int, step: Any, n_threads: int) -> int:
    """The parts of all ops that are opened with op i."""
    parts = 0
    for row in range(i, i + count_together(table[i], n_threads)):
        parts += count_parts(table[row], step, n_threads)
    return parts


@kernel
def run_part(table: Any, i: int, step: Any, part: int, thread: int, n_threads: int) -> None:
    """One part of the ops that are opened with op i, by one thread."""
    parts = count_parts(table[i], step, n_threads)
    while part >= parts:
        part -= parts
        i += 1
        parts = count_parts(table[i], step, n_threads)
    op = table[i]
    rows = step[op.rows]
    code, n, m = op.code, op.n, op.m

    if code == Code.RMS_NORM:
        a, z = share(rows, part, parts)
        x, out = f32(op.a, rows * op.heads, n), f32(op.out, rows * op.heads, n)
        a, z = a * op.heads, z * op.heads
        ops.rms_norm(x[a:z], f32(op.w, n), op.epsilon, out[a:z])

    elif code == Code.LAYER_NORM:
        a, z = share(rows, part, parts)
        x, out = f32(op.a, rows, n), f32(op.out, rows, n)
        ops.layer_norm(x[a:z], f32(op.w, n), f32(op.c, n), op.epsilon, out[a:z])

    elif code == Code.QUANTIZE:
        blocks = rows * (n // BLOCK)
        a, z = share(op.heads * blocks, part, parts)
        while a < z:
            head = a // blocks
            stop = min(z, (head + 1) * blocks)
            x = f32(op.a, rows, op.heads, n)[:, head]
            out = op.out + head * activation_bytes(rows, n)
            ops.quantize(x, a - head * blocks, stop - head * blocks, activations(out, rows, n))
            a = stop

    elif code == Code.PACK_Q80:
        blocks = rows * (n // BLOCK)
        a, z = share(blocks, part, parts)
        ops.pack_q80(f32(op.a, blocks, BLOCK)[a:z], u8(op.out, blocks, 34)[a:z])

    elif code == Code.QUANTIZE_EXPERTS:
        plan = plan_at(op.plan)
        a, z = share(plan[PAIRS] * (n // BLOCK), part, parts)
        quantize_experts(f32(op.a, rows, n), plan, a, z, u8(op.out, 1))

    elif code == Code.MATMUL_F32 or code == Code.EXPERTS_F32:
        height = m // op.heads
        a, z = falling_share(count_matrices(op) * height, part, parts)
        while a < z:
            i, first = a // height, a % height
            last = min(height, first + z - a)
            source, count, weight, target = matrix(op, rows, i, height * n * 4)
            x, w = f32(source, count, op.heads, n)[:, 0], f32(weight, height, n)[first:last]
            start = bias(op, i * height + first, i * height + last)
            ops.matmul_f32(x, w, start, f32(target, count, m)[:, first:last])
            a += last - first

    elif code == Code.MATMUL_Q40 or code == Code.EXPERTS_Q40:
        height, blocks = m // op.heads, n // BLOCK
        groups = packed_rows(height) // GROUP
        a, z = falling_share(count_matrices(op) * groups, part, parts)
        while a < z:
            i, group = a // groups, a % groups
            stop = min(groups, group + z - a)
            source, count, weight, target = matrix(op, rows, i, groups * blocks * GROUP_BYTES)
            x = activations(source, count, n)
            w = u8(weight, groups, blocks, GROUP_BYTES)[group:stop]
            first, last = group * GROUP, min(height, stop * GROUP)
            start = bias(op, i * height + first, i * height + last)
            matmul_q40(x, count, w, start, f32(target, count, m)[:, first:last])
            a += stop - group

    elif code == Code.MATMUL_Q80 or code == Code.EXPERTS_Q80:
        height, blocks = m // op.heads, n // BLOCK
        a, z = falling_share(count_matrices(op) * height, part, parts)
        while a < z:
            i, first = a // height, a % height
            last = min(height, first + z - a)
            source, count, weight, target = matrix(op, rows, i, height * blocks * 34)
            x, w = activations(source, count, n), u8(weight, height, blocks, 34)[first:last]
            start = bias(op, i * height + first, i * height + last)
            ops.matmul_q80(x, count, w, start, f32(target, count, m)[:, first:last])
            a += last - first

    elif code == Code.ROUTE:
        a, z = share(rows, part, parts)
        route(
            f32(op.a, rows, n)[a:z],
            f32(op.c, n if op.c else 0),
            op.kind != 0,
            op.active,
            op.group,
            op.active_groups,
            op.normalize != 0,
            op.scale,
            f32(op.out, rows, n)[a:z],
        )

    elif code == Code.MAKE_PLAN:
        make_plan(f32(op.out, rows, n), op.active, plan_at(op.plan))

    elif code == Code.COMBINE:
        a, z = share(n, part, parts)
        plan = plan_at(op.plan)
        x, weights = f32(op.a, step[N_PAIRS], n), f32(op.b, rows, plan[EXPERTS])
        combine(x[:, a:z], weights, plan, op.active, f32(op.out, rows, n)[:, a:z])

    elif code == Code.ROPE:
        a, z = share(op.heads, part, parts)
        cos, sin = f32(op.c, op.seq_len, m), f32(op.b, op.seq_len, m)
        x = f32(op.out, rows, op.heads, n)
        ops.rope(i64(step[POSITIONS], rows), cos, sin, op.kind != 0, x[:, a:z])

    elif code == Code.CONCAT:
        a, z = share(rows, part, parts)
        first, second = f32(op.a, rows, op.heads, n), f32(op.b, rows, op.heads, m - n)
        ops.concat(first[a:z], second[a:z], f32(op.out, rows, op.heads, m)[a:z])

    elif code == Code.STORE_KEYS or code == Code.STORE_VALUES:
        a, z = share(op.heads, part, parts)
        slots, positions = i64(step[SLOTS], rows), i64(step[POSITIONS], rows)
        cache = u8(op.out, op.n_slots, op.heads, op.pages, op.page_bytes)[:, a:z]
        x = f32(op.a, rows, op.heads, n)[:, a:z]
        if code == Code.STORE_KEYS:
            store_keys(x, slots, positions, op.kind, cache)
        else:
            store_values(x, slots, positions, op.kind, cache)

    elif code == Code.ATTEND:
        slots, positions = i64(step[SLOTS], rows), i64(step[POSITIONS], rows)
        keys = u8(op.c, op.n_slots, op.kv_heads, op.pages, op.page_bytes)
        values = u8(op.b, op.n_slots, op.kv_heads, op.pages, op.page_bytes)
        attend(
            f32(op.a, rows, op.heads, n),
            keys,
            values,
            op.kind,
            slots,
            positions,
            op.first,
            op.group,
            op.scale,
            f32(op.w, rows if op.w else 0, op.seq_len),
            f32(step[PARTS], rows, op.heads, count_chunks(positions), m + 2),
            f32(op.out, rows, op.heads, m),
            step[SCRATCH] + thread * step[SCRATCH_BYTES],
            part,
            parts,
        )

    elif code == Code.JOIN:
        chunks = count_chunks(i64(step[POSITIONS], rows))
        if chunks > 1:
            a, z = share(op.heads, part, parts)
            found = f32(step[PARTS], rows, op.heads, chunks, m + 2)
            join(found, a, z, f32(op.out, rows, op.heads, m))

    elif code == Code.SELECT:
        a, z = share(rows, part, parts)
        select(
            f32(op.a, rows, op.heads, n),
            f32(op.b, rows, op.heads),
            u8(op.c, op.n_slots, 1, op.pages, op.page_bytes),
            op.kind,
            i64(step[SLOTS], rows),
            i64(step[POSITIONS], rows),
            op.group,
            op.scale,
            f32(op.out, rows, op.seq_len),
            step[SCRATCH] + thread * step[SCRATCH_BYTES],
            a,
            z,
        )

    elif code == Code.SILU_MUL:
        a, z = share(rows * n, part, parts)
        gate, up, y = f32(op.a, rows * n), f32(op.b, rows * n), f32(op.out, rows * n)
        ops.silu_mul(gate[a:z], up[a:z], y[a:z])

    elif code == Code.MERGE_F32:
        a, z = share(rows * n, part, parts)
        slots_ = f32(op.a, op.parts, op.stride // 4)
        ops.merge_f32(slots_[:, a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.MERGE_Q80:
        blocks = rows * (n // 32)
        a, z = share(blocks, part, parts)
        packed = u8(op.a, op.parts, op.stride // 34, 34)
        ops.merge_q80(packed[:, a:z], f32(op.out, blocks, 32)[a:z])

    elif code == Code.ADD:
        a, z = share(rows * n, part, parts)
        ops.add(f32(op.a, rows * n)[a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.GATHER or code == Code.DISPATCH:
        index = i64(step[LOGITS], rows) if code == Code.GATHER else rows_of_pairs(op)
        a, z = share(index.size, part, parts)
        x, out = f32(op.a, step[N_ROWS], n), f32(op.out, rows, n)
        ops.gather(x, index[a:z], out[a:z])


@kernel
def activations(address: int, rows: int, n: int) -> Any:
    """The tiles of a batch, uint8: see `layout`."""
    t = tile_rows(rows)
    return u8(address, (rows + t - 1) // t * t * (n // BLOCK) * ROW_BYTES)


@kernel
def plan_at(address: int) -> Any:
    """A plan, int64."""
    head = i64(address, HEAD)
    return i64(address, plan_words(head[EXPERTS], head[ROOM]))


@kernel
def rows_of_pairs(op: Any) -> Any:
    """The row of each pair of an op's plan."""
    plan = plan_at(op.plan)
    return lists(plan)[3][: plan[PAIRS]]


@kernel
def count_matrices(op: Any) -> int:
    """How many matrices an op multiplies with: one for each head, or expert that has rows."""
    return plan_at(op.plan)[LISTED] if op.plan else op.heads


@kernel
def matrix(op: Any, rows: int, i: int, nbytes: int) -> tuple[int, int, int, int]:
    """Matrix i of an op, of so many bytes: its input, rows of that, weight, output; addresses."""
    n, m = op.n, op.m
    if op.plan:
        plan = plan_at(op.plan)
        experts, firsts, tiles = lists(plan)[:3]
        pair = firsts[i]
        before = tiles[i] * (n // BLOCK) * ROW_BYTES
        if op.code == Code.EXPERTS_F32:
            before = pair * n * 4
        weight = i64(op.w, plan[EXPERTS])[experts[i]]
        return op.a + before, firsts[i + 1] - pair, weight, op.out + pair * m * 4
    before = n * 4 if op.code == Code.MATMUL_F32 else activation_bytes(rows, n)
    return op.a + i * before, rows, op.w + i * nbytes, op.out + i * (m // op.heads) * 4


@kernel
def bias(op: Any, a: int, z: int) -> Any:
    """Values a to z of a matrix's bias; none if it has no bias."""
    return f32(op.c, z)[a:] if op.c else f32(op.w, 0)


@kernel
def find_next(table: Any, i: int, step: Any, state: Any, n_threads: int) -> tuple[int, int]:
    """Op i of the table or, if it has nothing to do, the next one that has; and its parts.

    They are the parts of all ops that are opened with it. At the end of the command there are 0.
    """
    last, parts = atomic_load(state, LAST), 0
    while i < last:
        parts = count_parts_together(table, i, step, n_threads)
        if parts > 0:
            break
        i += count_together(table[i], n_threads)
    return i, parts


@kernel
def next_weights(table: Any, i: int, state: Any, thread: int, n_threads: int) -> int:
    """Where a thread will probably go on to read, or 0: a part of the next matrix from op i on.

    Who finishes an op is the first to take a part of the next; who waits comes after.
    """
    last = min(atomic_load(state, LAST), i + _FAR)
    while i < last:
        op = table[i]
        if op.code == Code.MATMUL_Q40:
            parts = _SHARES * n_threads
            groups = packed_rows(op.m) // GROUP
            return op.w + groups * max(1, thread) // parts * (op.n // BLOCK) * GROUP_BYTES
        i += 1
    return 0


@kernel
def run(
    table: Any, first: int, last: int, step: Any, state: Any, thread: int, n_threads: int
) -> None:
    """Runs ops of the table with the whole team.

    Thread 0 leads: it gives the command and returns when all is done. The others follow: they help
    with one command after the other, and return when a step is over. One function for both: each
    further one would hold a copy of all kernels, and take seconds to compile.

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
        i, parts = find_next(table, first, step, state, n_threads)
        open_op(state, i, parts)
        atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)
    while True:
        command = atomic_load(state, COMMAND)
        while True:
            i, parts, part = take_part(state)
            if parts == 0:
                break
            if part >= parts:
                after = i + count_together(table[i], n_threads)
                wait_for_next(state, i, next_weights(table, after, state, thread, n_threads))
                continue
            while parts > 0:
                run_part(table, i, step, part, thread, n_threads)
                if parts > 1 and not is_last(state, parts):
                    break
                # What has one part is done at once: to open it would only move its data about.
                i += count_together(table[i], n_threads)
                i, parts = find_next(table, i, step, state, n_threads)
                part = 0
                if parts != 1:
                    open_op(state, i, parts)
                    break
        if thread == 0 or atomic_load(state, LEAVING):
            return
        wait_for_command(state, command)


@kernel
def call(state: Any) -> None:
    """A step begins: threads that follow are to stay."""
    atomic_store(state, LEAVING, 0)


@kernel
def dismiss(state: Any) -> None:
    """The step is over: threads that follow leave. A late one may miss it and stay for the next."""
    atomic_store(state, LEAVING, 1)
    atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)

"""The compiled op loop: a table of ops, and the threads that work through it together.

A row of the table is one op: its code, the addresses of its memory and its sizes. All threads run
the same ops at the same time, each on its own part, with a barrier after each op. Splitting is by
outputs (rows of a matrix, heads, blocks), so that no result depends on the number of threads.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray

from pyllama_kernels import cpu, ops
from pyllama_kernels.attention import attend, count_chunks, join
from pyllama_kernels.cache import store_keys, store_values
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import BLOCK, GROUP, GROUP_BYTES, ROW_BYTES, packed_rows, tile_rows
from pyllama_kernels.lowlevel import (
    atomic_load,
    atomic_store,
    float32_pointer,
    int8_pointer,
    int64_pointer,
    uint8_pointer,
)
from pyllama_kernels.team import COMMAND, FIRST, LAST, barrier, wait_while

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


# Addresses are of the first byte; `n` and `m` are values in a row of the input and of the output.
OP = np.dtype(
    [
        ("code", np.int64),
        ("barrier", np.int64),  # 1: what comes next needs what the whole team did up to here
        ("logits", np.int64),  # 0: a row for each row of the batch; 1: for each row with logits
        ("a", np.int64),  # first input
        ("b", np.int64),  # second input: up, value cache, sin
        ("c", np.int64),  # third input: bias, key cache, cos
        ("w", np.int64),  # weight
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
    ],
    align=True,
)

# The words of `step`, an int64 array: counts, the addresses of the rows' facts, and of memory for
# attention: the chunks' results, and scratch of so many bytes for each thread.
N_ROWS, N_LOGITS, SLOTS, POSITIONS, LOGITS, PARTS, SCRATCH, SCRATCH_BYTES = range(8)
STEP_WORDS = 8


@kernel
def f32(address: int, *shape: int) -> Any:
    """Float32 memory as an array of the given shape."""
    return carray(float32_pointer(address), shape)


@kernel
def i8(address: int, *shape: int) -> Any:
    """Int8 memory as an array of the given shape."""
    return carray(int8_pointer(address), shape)


@kernel
def u8(address: int, *shape: int) -> Any:
    """Uint8 memory as an array of the given shape."""
    return carray(uint8_pointer(address), shape)


@kernel
def i64(address: int, n: int) -> Any:
    """Int64 memory as an array of n."""
    return carray(int64_pointer(address), (n,))


@kernel
def share(total: int, thread: int, n_threads: int) -> tuple[int, int]:
    """The part of `total` things that a thread does: start and stop."""
    return total * thread // n_threads, total * (thread + 1) // n_threads


@kernel
def run_op(op: Any, step: Any, thread: int, n_threads: int) -> None:
    """One thread's part of one op."""
    rows = step[N_LOGITS] if op.logits else step[N_ROWS]
    if rows == 0:
        return
    code, n, m = op.code, op.n, op.m

    if code == Code.RMS_NORM:
        a, z = share(rows, thread, n_threads)
        x, out = f32(op.a, rows, n), f32(op.out, rows, n)
        ops.rms_norm(x[a:z], f32(op.w, n), op.epsilon, out[a:z])

    elif code == Code.QUANTIZE:
        a, z = share(rows * (n // BLOCK), thread, n_threads)
        ops.quantize(f32(op.a, rows, n), a, z, activations(op.out, rows, n))

    elif code == Code.PACK_Q80:
        blocks = rows * (n // BLOCK)
        a, z = share(blocks, thread, n_threads)
        ops.pack_q80(f32(op.a, blocks, BLOCK)[a:z], u8(op.out, blocks, 34)[a:z])

    elif code == Code.MATMUL_F32:
        a, z = share(m, thread, n_threads)
        x, w, out = f32(op.a, rows, n), f32(op.w, m, n), f32(op.out, rows, m)
        ops.matmul_f32(x, w[a:z], bias(op, a, z), out[:, a:z])

    elif code == Code.MATMUL_Q40:
        groups = packed_rows(m) // GROUP
        a, z = share(groups, thread, n_threads)
        w = u8(op.w, groups, n // BLOCK, GROUP_BYTES)[a:z]
        a, z = a * GROUP, min(m, z * GROUP)
        out = f32(op.out, rows, m)[:, a:z]
        matmul_q40(activations(op.a, rows, n), rows, w, bias(op, a, z), out)

    elif code == Code.MATMUL_Q80:
        a, z = share(m, thread, n_threads)
        w, out = u8(op.w, m, n // BLOCK, 34), f32(op.out, rows, m)
        ops.matmul_q80(activations(op.a, rows, n), rows, w[a:z], bias(op, a, z), out[:, a:z])

    elif code == Code.ROPE:
        a, z = share(op.heads, thread, n_threads)
        cos, sin = f32(op.c, op.seq_len, m), f32(op.b, op.seq_len, m)
        x = f32(op.out, rows, op.heads, n)
        ops.rope(i64(step[POSITIONS], rows), cos, sin, x[:, a:z])

    elif code == Code.STORE_KEYS or code == Code.STORE_VALUES:
        a, z = share(op.heads, thread, n_threads)
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
            f32(step[PARTS], rows, op.heads, count_chunks(positions), n + 2),
            f32(op.out, rows, op.heads, n),
            step[SCRATCH] + thread * step[SCRATCH_BYTES],
            thread,
            n_threads,
        )

    elif code == Code.JOIN:
        chunks = count_chunks(i64(step[POSITIONS], rows))
        if chunks > 1:
            a, z = share(op.heads, thread, n_threads)
            parts = f32(step[PARTS], rows, op.heads, chunks, n + 2)
            join(parts, a, z, f32(op.out, rows, op.heads, n))

    elif code == Code.SILU_MUL:
        a, z = share(rows * n, thread, n_threads)
        gate, up, y = f32(op.a, rows * n), f32(op.b, rows * n), f32(op.out, rows * n)
        ops.silu_mul(gate[a:z], up[a:z], y[a:z])

    elif code == Code.MERGE_F32:
        a, z = share(rows * n, thread, n_threads)
        parts = f32(op.a, op.parts, op.stride // 4)
        ops.merge_f32(parts[:, a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.MERGE_Q80:
        blocks = rows * (n // 32)
        a, z = share(blocks, thread, n_threads)
        parts_ = u8(op.a, op.parts, op.stride // 34, 34)
        ops.merge_q80(parts_[:, a:z], f32(op.out, blocks, 32)[a:z])

    elif code == Code.ADD:
        a, z = share(rows * n, thread, n_threads)
        ops.add(f32(op.a, rows * n)[a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.GATHER:
        a, z = share(rows, thread, n_threads)
        x, out = f32(op.a, step[N_ROWS], n), f32(op.out, rows, n)
        ops.gather(x, i64(step[LOGITS], rows)[a:z], out[a:z])


@kernel
def activations(address: int, rows: int, n: int) -> Any:
    """The tiles of a batch, uint8: see `layout`."""
    t = tile_rows(rows)
    return u8(address, (rows + t - 1) // t * t * (n // BLOCK) * ROW_BYTES)


@kernel
def bias(op: Any, a: int, z: int) -> Any:
    """Values a to z of a matrix's bias; none if it has no bias."""
    return f32(op.c, z)[a:] if op.c else f32(op.w, 0)


@kernel
def run_ops(
    table: Any, first: int, last: int, step: Any, state: Any, thread: int, n_threads: int
) -> None:
    """One thread's part of the ops from `first` to before `last`.

    Args:
        table: [n] OP.
        first: the first op.
        last: the op after the last one.
        step: int64, see `N_ROWS`.
        state: the words of the team.
        thread: 0 for the thread that leads.
        n_threads: in the team.
    """
    for i in range(first, last):
        run_op(table[i], step, thread, n_threads)
        if table[i].barrier:
            barrier(state, n_threads)


@kernel
def lead(table: Any, first: int, last: int, step: Any, state: Any, n_threads: int) -> None:
    """Runs the ops from `first` to before `last` with the whole team; arguments as in `run_ops`."""
    if first == last:
        return  # without a barrier the next command would overwrite this one while it is read
    if n_threads > 1:
        atomic_store(state, FIRST, first)
        atomic_store(state, LAST, last)
        atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)
    run_ops(table, first, last, step, state, 0, n_threads)


@kernel
def dismiss(state: Any) -> None:
    """Tells the threads that follow to leave."""
    atomic_store(state, FIRST, 0)
    atomic_store(state, LAST, -1)
    atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)


@kernel
def follow(table: Any, step: Any, state: Any, command: int, thread: int, n_threads: int) -> None:
    """Runs what the leading thread commands until it says to leave.

    Arguments as in `run_ops`; `command` is the number of the last command already carried out.
    """
    while True:
        command = wait_while(state, COMMAND, command)
        first, last = atomic_load(state, FIRST), atomic_load(state, LAST)
        if last < first:
            return
        run_ops(table, first, last, step, state, thread, n_threads)

"""The compiled op loop: a table of ops, and the threads that work through it together.

A row of the table is one op: its code, the addresses of its memory and its sizes. All threads run
the same ops at the same time, each on its own part, with a barrier after each op. Splitting is by
outputs (rows of a matrix, heads, blocks), so that no result depends on the number of threads.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray

from pyllama_kernels import portable as kernels
from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    atomic_load,
    atomic_store,
    float32_pointer,
    int8_pointer,
    int64_pointer,
    uint8_pointer,
)
from pyllama_kernels.team import COMMAND, FIRST, LAST, barrier, wait_while


class Code(IntEnum):
    """What an op does: the kernel of the same name."""

    RMS_NORM = 0
    QUANTIZE = 1
    PACK_Q80 = 2
    MATMUL_F32 = 3
    MATMUL_Q40 = 4
    MATMUL_Q80 = 5
    ROPE = 6
    STORE = 7
    ATTENTION = 8
    SILU_MUL = 9
    MERGE_F32 = 10
    MERGE_Q80 = 11
    ADD = 12
    GATHER = 13


# Addresses are of the first byte; `n` and `m` are values in a row of the input and of the output.
OP = np.dtype(
    [
        ("code", np.int64),
        ("logits", np.int64),  # 0: a row for each row of the batch; 1: for each row with logits
        ("a", np.int64),  # first input
        ("b", np.int64),  # second input: scales, up, value cache, sin
        ("c", np.int64),  # third input: bias, key cache, cos
        ("w", np.int64),  # weight
        ("out", np.int64),
        ("out2", np.int64),  # second output: scales
        ("n", np.int64),
        ("m", np.int64),
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("seq_len", np.int64),
        ("n_slots", np.int64),
        ("first", np.int64),
        ("group", np.int64),
        ("parts", np.int64),
        ("stride", np.int64),  # bytes between the parts of a pipe
        ("epsilon", np.float64),
    ],
    align=True,
)

# The words of `step`, an int64 array: counts, then the addresses of the rows' facts.
N_ROWS, N_LOGITS, SLOTS, POSITIONS, LOGITS = range(5)


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
        kernels.rms_norm(x[a:z], f32(op.w, n), op.epsilon, out[a:z])

    elif code == Code.QUANTIZE:
        blocks = rows * (n // 32)
        a, z = share(blocks, thread, n_threads)
        x, values, scales = f32(op.a, blocks, 32), i8(op.out, blocks, 32), f32(op.out2, blocks)
        kernels.quantize(x[a:z], values[a:z], scales[a:z])

    elif code == Code.PACK_Q80:
        blocks = rows * (n // 32)
        a, z = share(blocks, thread, n_threads)
        kernels.pack_q80(f32(op.a, blocks, 32)[a:z], u8(op.out, blocks, 34)[a:z])

    elif code == Code.MATMUL_F32:
        a, z = share(m, thread, n_threads)
        x, w, out = f32(op.a, rows, n), f32(op.w, m, n), f32(op.out, rows, m)
        kernels.matmul_f32(x, w[a:z], bias(op, a, z), out[:, a:z])

    elif code == Code.MATMUL_Q40:
        a, z = share(m, thread, n_threads)
        values, scales = i8(op.a, rows, n), f32(op.b, rows, n // 32)
        w, out = u8(op.w, m, n // 32, 18), f32(op.out, rows, m)
        kernels.matmul_q40(values, scales, w[a:z], bias(op, a, z), out[:, a:z])

    elif code == Code.MATMUL_Q80:
        a, z = share(m, thread, n_threads)
        values, scales = i8(op.a, rows, n), f32(op.b, rows, n // 32)
        w, out = u8(op.w, m, n // 32, 34), f32(op.out, rows, m)
        kernels.matmul_q80(values, scales, w[a:z], bias(op, a, z), out[:, a:z])

    elif code == Code.ROPE:
        a, z = share(op.heads, thread, n_threads)
        cos, sin = f32(op.c, op.seq_len, m), f32(op.b, op.seq_len, m)
        x = f32(op.out, rows, op.heads, n)
        kernels.rope(i64(step[POSITIONS], rows), cos, sin, x[:, a:z])

    elif code == Code.STORE:
        a, z = share(op.heads, thread, n_threads)
        slots, positions = i64(step[SLOTS], rows), i64(step[POSITIONS], rows)
        cache = f32(op.out, op.n_slots, op.heads, op.seq_len, n)
        kernels.store(f32(op.a, rows, op.heads, n)[:, a:z], slots, positions, cache[:, a:z])

    elif code == Code.ATTENTION:
        a, z = share(op.heads, thread, n_threads)
        slots, positions = i64(step[SLOTS], rows), i64(step[POSITIONS], rows)
        query, out = f32(op.a, rows, op.heads, n), f32(op.out, rows, op.heads, n)
        keys = f32(op.c, op.n_slots, op.kv_heads, op.seq_len, n)
        values_ = f32(op.b, op.n_slots, op.kv_heads, op.seq_len, n)
        first = op.first + a
        kernels.attention(
            query[:, a:z], keys, values_, slots, positions, first, op.group, out[:, a:z]
        )

    elif code == Code.SILU_MUL:
        a, z = share(rows * n, thread, n_threads)
        gate, up, y = f32(op.a, rows * n), f32(op.b, rows * n), f32(op.out, rows * n)
        kernels.silu_mul(gate[a:z], up[a:z], y[a:z])

    elif code == Code.MERGE_F32:
        a, z = share(rows * n, thread, n_threads)
        parts = f32(op.a, op.parts, op.stride // 4)
        kernels.merge_f32(parts[:, a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.MERGE_Q80:
        blocks = rows * (n // 32)
        a, z = share(blocks, thread, n_threads)
        parts_ = u8(op.a, op.parts, op.stride // 34, 34)
        kernels.merge_q80(parts_[:, a:z], f32(op.out, blocks, 32)[a:z])

    elif code == Code.ADD:
        a, z = share(rows * n, thread, n_threads)
        kernels.add(f32(op.a, rows * n)[a:z], f32(op.out, rows * n)[a:z])

    elif code == Code.GATHER:
        a, z = share(rows, thread, n_threads)
        x, out = f32(op.a, step[N_ROWS], n), f32(op.out, rows, n)
        kernels.gather(x, i64(step[LOGITS], rows)[a:z], out[a:z])


@kernel
def bias(op: Any, a: int, z: int) -> Any:
    """Values a to z of a matrix's bias; none if it has no bias."""
    return f32(op.c, z)[a:] if op.c else f32(op.w, 0)


@kernel
def run_ops(
    ops: Any, first: int, last: int, step: Any, state: Any, thread: int, n_threads: int
) -> None:
    """One thread's part of the ops from `first` to before `last`.

    Args:
        ops: [n] OP.
        first: the first op.
        last: the op after the last one.
        step: int64, see `N_ROWS`.
        state: the words of the team.
        thread: 0 for the thread that leads.
        n_threads: in the team.
    """
    for i in range(first, last):
        run_op(ops[i], step, thread, n_threads)
        barrier(state, n_threads)


@kernel
def lead(ops: Any, first: int, last: int, step: Any, state: Any, n_threads: int) -> None:
    """Runs the ops from `first` to before `last` with the whole team; arguments as in `run_ops`."""
    if first == last:
        return  # without a barrier the next command would overwrite this one while it is read
    if n_threads > 1:
        atomic_store(state, FIRST, first)
        atomic_store(state, LAST, last)
        atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)
    run_ops(ops, first, last, step, state, 0, n_threads)


@kernel
def dismiss(state: Any) -> None:
    """Tells the threads that follow to leave."""
    atomic_store(state, FIRST, 0)
    atomic_store(state, LAST, -1)
    atomic_store(state, COMMAND, atomic_load(state, COMMAND) + 1)


@kernel
def follow(ops: Any, step: Any, state: Any, command: int, thread: int, n_threads: int) -> None:
    """Runs what the leading thread commands until it says to leave.

    Arguments as in `run_ops`; `command` is the number of the last command already carried out.
    """
    while True:
        command = wait_while(state, COMMAND, command)
        first, last = atomic_load(state, FIRST), atomic_load(state, LAST)
        if last < first:
            return
        run_ops(ops, first, last, step, state, thread, n_threads)

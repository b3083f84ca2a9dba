"""Ops that multiply with matrices: those of a layer, of its heads, or of experts.

A product is cut into *units*: rows of outputs or, in Q40, groups of rows.
"""

from typing import Any

from pyllama_kernels import cpu, ops
from pyllama_kernels.entry import entry
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import (
    BLOCK,
    GROUP,
    GROUP_BYTES,
    ROW_BYTES,
    activation_bytes,
    packed_rows,
)
from pyllama_kernels.lowlevel import LINE, prefetch
from pyllama_kernels.optable import f32, i64, plan_at, u8
from pyllama_kernels.plans import EXPERTS, LISTED, lists

# Float types of weights: distributed-llama's numbers.
F32, Q40, Q80 = 0, 2, 3

matmul_q40 = cpu.compiled().matmul_q40


@kernel
def count_units(op: Any) -> int:
    """What a product can be cut into: rows of outputs, of Q40 groups of rows."""
    height = op.m // op.heads
    if op.kind == Q40:
        height = packed_rows(height) // GROUP
    return count_matrices(op) * height


@entry
def multiply(op: Any, step: Any, a: int, z: int, thread: int) -> None:
    """Units a to z of a product."""
    rows, n, m = step[op.rows], op.n, op.m
    height, blocks = m // op.heads, n // BLOCK

    if op.kind == F32:
        while a < z:
            i, first = a // height, a % height
            last = min(height, first + z - a)
            source, count, weight, target = matrix(op, rows, i, height * n * 4)
            x, w = f32(source, count, op.heads, n)[:, 0], f32(weight, height, n)[first:last]
            start = bias(op, i * height + first, i * height + last)
            ops.matmul_f32(x, w, start, f32(target, count, m)[:, first:last])
            a += last - first

    elif op.kind == Q40:
        groups = packed_rows(height) // GROUP
        while a < z:
            i, group = a // groups, a % groups
            stop = min(groups, group + z - a)
            source, count, weight, target = matrix(op, rows, i, groups * blocks * GROUP_BYTES)
            if count == 1:
                # What another thread has just made is far away: all at once, not line by line.
                for line in range(0, blocks * ROW_BYTES, LINE):
                    prefetch(source + line)
            x = activations(source, count, n)
            w = u8(weight, groups, blocks, GROUP_BYTES)[group:stop]
            first, last = group * GROUP, min(height, stop * GROUP)
            start = bias(op, i * height + first, i * height + last)
            matmul_q40(x, count, w, start, f32(target, count, m)[:, first:last])
            a += stop - group

    else:
        while a < z:
            i, first = a // height, a % height
            last = min(height, first + z - a)
            source, count, weight, target = matrix(op, rows, i, height * blocks * 34)
            x, w = activations(source, count, n), u8(weight, height, blocks, 34)[first:last]
            start = bias(op, i * height + first, i * height + last)
            ops.matmul_q80(x, count, w, start, f32(target, count, m)[:, first:last])
            a += last - first


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
        if op.kind == F32:
            before = pair * n * 4
        weight = i64(op.w, plan[EXPERTS])[experts[i]]
        return op.a + before, firsts[i + 1] - pair, weight, op.out + pair * m * 4
    before = n * 4 if op.kind == F32 else activation_bytes(rows, n)
    return op.a + i * before, rows, op.w + i * nbytes, op.out + i * (m // op.heads) * 4


@kernel
def bias(op: Any, a: int, z: int) -> Any:
    """Values a to z of a matrix's bias; none if it has no bias."""
    return f32(op.c, z)[a:] if op.c else f32(op.w, 0)


@kernel
def activations(address: int, rows: int, n: int) -> Any:
    """The tiles of a batch, uint8: see `layout`."""
    return u8(address, activation_bytes(rows, n))

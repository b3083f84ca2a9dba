"""Ops that multiply with matrices: those of a layer, of its heads, or of experts.

Products of the same input are cut together, into *units*: rows of outputs or, in Q40, groups of
rows. So a thread may go from the end of one matrix to the beginning of the next.
"""

from typing import Any

from pyllama_kernels import cpu, ops
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
from pyllama_kernels.optable import Code, f32, i64, plan_at, share, u8
from pyllama_kernels.plans import EXPERTS, LISTED, lists

matmul_q40 = cpu.load(cpu.choose().name).matmul_q40


@kernel
def is_product(op: Any) -> bool:
    """Whether an op multiplies with matrices, of a layer or of experts."""
    return Code.MATMUL_F32 <= op.code <= Code.EXPERTS_Q80


@kernel
def count_units(table: Any, first: int, last: int) -> int:
    """What products, ops `first` to `last`, can be cut into: rows of outputs, of Q40 groups."""
    units = 0
    for i in range(first, last):
        op = table[i]
        height = op.m // op.heads
        if op.code == Code.MATMUL_Q40 or op.code == Code.EXPERTS_Q40:
            height = packed_rows(height) // GROUP
        units += count_matrices(op) * height
    return units


@kernel
def falling_share(total: int, part: int, parts: int) -> tuple[int, int]:
    """As `share`, but the last parts are the smallest, so that all threads end at about a time."""
    left, after = parts - part, parts - part - 1
    return total - total * left**3 // parts**3, total - total * after**3 // parts**3


@kernel
def multiply_together(
    table: Any, first: int, last: int, step: Any, where: int, ranges: int, part: int, parts: int
) -> None:
    """One part of range `where` of products of the same input, ops `first` to `last` of the table.

    What a range reads lies in a row, but for one jump from matrix to matrix.
    """
    start, stop = share(count_units(table, first, last), where, ranges)
    a, z = falling_share(stop - start, part, parts)
    a, z = start + a, start + z
    for i in range(first, last):
        op, units = table[i], count_units(table, i, i + 1)
        if a < units and z > 0:
            multiply(op, step[op.rows], max(a, 0), min(z, units))
        a, z = a - units, z - units


@kernel
def multiply(op: Any, rows: int, a: int, z: int) -> None:
    """Units a to z of a product."""
    code, n, m = op.code, op.n, op.m
    height, blocks = m // op.heads, n // BLOCK

    if code == Code.MATMUL_F32 or code == Code.EXPERTS_F32:
        while a < z:
            i, first = a // height, a % height
            last = min(height, first + z - a)
            source, count, weight, target = matrix(op, rows, i, height * n * 4)
            x, w = f32(source, count, op.heads, n)[:, 0], f32(weight, height, n)[first:last]
            start = bias(op, i * height + first, i * height + last)
            ops.matmul_f32(x, w, start, f32(target, count, m)[:, first:last])
            a += last - first

    elif code == Code.MATMUL_Q40 or code == Code.EXPERTS_Q40:
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
def activations(address: int, rows: int, n: int) -> Any:
    """The tiles of a batch, uint8: see `layout`."""
    return u8(address, activation_bytes(rows, n))

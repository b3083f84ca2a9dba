"""One part of each op, by one thread: a row of the table becomes arrays, and a kernel is called.

The entry of matrix products is in `products`.
"""

# ruff: noqa: D103 - an entry does what the kernel of its name does

from typing import Any

from pyllama_kernels import attention, cache, experts, ops, selection
from pyllama_kernels.blocks import BLOCK
from pyllama_kernels.entry import ENTRIES as ENTRIES
from pyllama_kernels.entry import entry
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import activation_bytes
from pyllama_kernels.optable import (
    CELLS,
    LOGITS,
    N_PAIRS,
    N_ROWS,
    PARTS,
    POSITIONS,
    SCRATCH,
    SCRATCH_BYTES,
    SEQS,
    f32,
    i64,
    plan_at,
    split,
    table_of,
    u8,
)
from pyllama_kernels.pages import BLOCK_PAGES
from pyllama_kernels.plans import EXPERTS, PAIRS, lists
from pyllama_kernels.products import activations


@entry
def rms_norm(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows * op.heads, part, parts)
    x, out = f32(op.a, rows * op.heads, n), f32(op.out, rows * op.heads, n)
    ops.rms_norm(x[a:z], f32(op.w, n), op.epsilon, out[a:z])


@entry
def layer_norm(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows, part, parts)
    x, out = f32(op.a, rows, n), f32(op.out, rows, n)
    ops.layer_norm(x[a:z], f32(op.w, n), f32(op.c, n), op.epsilon, out[a:z])


@entry
def quantize(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    blocks = rows * (n // BLOCK)
    a, z = split(op.heads * blocks, part, parts)
    while a < z:
        head = a // blocks
        stop = min(z, (head + 1) * blocks)
        x = f32(op.a, rows, op.heads, n)[:, head]
        out = op.out + head * activation_bytes(rows, n)
        ops.quantize(x, a - head * blocks, stop - head * blocks, activations(out, rows, n))
        a = stop


@entry
def pack_q80(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    blocks = rows * (n // BLOCK)
    a, z = split(blocks, part, parts)
    ops.pack_q80(f32(op.a, blocks, BLOCK)[a:z], u8(op.out, blocks, 34)[a:z])


@entry
def silu_mul(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    # In whole blocks, as the op that rounds the result is cut.
    a, z = split((rows * n + BLOCK - 1) // BLOCK, part, parts)
    a, z = BLOCK * a, min(BLOCK * z, rows * n)
    gate, up, y = f32(op.a, rows * n), f32(op.b, rows * n), f32(op.out, rows * n)
    ops.silu_mul(gate[a:z], up[a:z], y[a:z])


@entry
def merge_f32(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows * n, part, parts)
    regions = f32(op.a, op.parts, op.stride // 4)
    ops.merge_f32(regions[:, a:z], f32(op.out, rows * n)[a:z])


@entry
def merge_q80(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    blocks = rows * (n // 32)
    a, z = split(blocks, part, parts)
    packed = u8(op.a, op.parts, op.stride // 34, 34)
    ops.merge_q80(packed[:, a:z], f32(op.out, blocks, 32)[a:z])


@entry
def add(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows * n, part, parts)
    ops.add(f32(op.a, rows * n)[a:z], f32(op.out, rows * n)[a:z])


@entry
def gather(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    index = i64(step[LOGITS], rows)
    a, z = split(index.size, part, parts)
    x, out = f32(op.a, step[N_ROWS], n), f32(op.out, rows, n)
    ops.gather(x, index[a:z], out[a:z])


@entry
def dispatch(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    index = rows_of_pairs(op)
    a, z = split(index.size, part, parts)
    x, out = f32(op.a, step[N_ROWS], n), f32(op.out, rows, n)
    ops.gather(x, index[a:z], out[a:z])


@entry
def rope(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n, m = step[op.rows], op.n, op.m
    a, z = split(op.heads, part, parts)
    cos, sin = f32(op.c, op.seq_len, m), f32(op.b, op.seq_len, m)
    x = f32(op.out, rows, op.heads, n)
    ops.rope(i64(step[POSITIONS], rows), cos, sin, op.kind != 0, x[:, a:z])


@entry
def concat(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n, m = step[op.rows], op.n, op.m
    a, z = split(rows, part, parts)
    first, second = f32(op.a, rows, op.heads, n), f32(op.b, rows, op.heads, m - n)
    ops.concat(first[a:z], second[a:z], f32(op.out, rows, op.heads, m)[a:z])


@entry
def store_keys(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(op.heads, part, parts)
    seqs, positions = i64(step[SEQS], rows), i64(step[POSITIONS], rows)
    kept = u8(op.out, op.n_blocks, op.heads, BLOCK_PAGES, op.page_bytes)[:, a:z]
    x = f32(op.a, rows, op.heads, n)[:, a:z]
    cache.store_keys(x, seqs, positions, table_of(step), op.kind, kept)


@entry
def store_values(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(op.heads, part, parts)
    seqs, positions = i64(step[SEQS], rows), i64(step[POSITIONS], rows)
    kept = u8(op.out, op.n_blocks, op.heads, BLOCK_PAGES, op.page_bytes)[:, a:z]
    x = f32(op.a, rows, op.heads, n)[:, a:z]
    cache.store_values(x, seqs, positions, table_of(step), op.kind, kept)


@entry
def attend(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n, m = step[op.rows], op.n, op.m
    attention.attend(
        f32(op.a, rows, op.heads, n),
        u8(op.c, op.n_blocks, op.kv_heads, BLOCK_PAGES, op.page_bytes),
        u8(op.b, op.n_blocks, op.kv_heads, BLOCK_PAGES, op.page_bytes),
        op.kind,
        i64(step[SEQS], rows),
        i64(step[POSITIONS], rows),
        table_of(step),
        op.first,
        op.group,
        op.scale,
        f32(op.w, rows if op.w else 0, op.seq_len),
        f32(step[PARTS], step[CELLS], op.heads, m + 2),
        f32(op.out, rows, op.heads, m),
        step[SCRATCH] + thread * step[SCRATCH_BYTES],
        part,
        parts,
    )


@entry
def join(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, m = step[op.rows], op.m
    a, z = split(op.heads, part, parts)
    attention.join(
        f32(step[PARTS], step[CELLS], op.heads, m + 2),
        i64(step[SEQS], rows),
        i64(step[POSITIONS], rows),
        op.group,
        a,
        z,
        step[SCRATCH] + thread * step[SCRATCH_BYTES],
        f32(op.out, rows, op.heads, m),
    )


@entry
def select(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows, part, parts)
    selection.select(
        f32(op.a, rows, op.heads, n),
        f32(op.b, rows, op.heads),
        u8(op.c, op.n_blocks, 1, BLOCK_PAGES, op.page_bytes),
        op.kind,
        i64(step[SEQS], rows),
        i64(step[POSITIONS], rows),
        table_of(step),
        op.group,
        op.scale,
        f32(op.out, rows, op.seq_len),
        step[SCRATCH] + thread * step[SCRATCH_BYTES],
        a,
        z,
    )


@entry
def quantize_experts(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    plan = plan_at(op.plan)
    a, z = split(plan[PAIRS] * (n // BLOCK), part, parts)
    experts.quantize_experts(f32(op.a, rows, n), plan, a, z, u8(op.out, 1))


@entry
def route(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(rows, part, parts)
    experts.route(
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


@entry
def make_plan(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    experts.make_plan(f32(op.out, rows, n), op.active, plan_at(op.plan))


@entry
def combine(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    rows, n = step[op.rows], op.n
    a, z = split(n, part, parts)
    plan = plan_at(op.plan)
    x, weights = f32(op.a, step[N_PAIRS], n), f32(op.b, rows, plan[EXPERTS])
    experts.combine(x[:, a:z], weights, plan, op.active, f32(op.out, rows, n)[:, a:z])


@kernel
def rows_of_pairs(op: Any) -> Any:
    """The row of each pair of an op's plan."""
    plan = plan_at(op.plan)
    return lists(plan)[3][: plan[PAIRS]]

"""One part of an op, by one thread: a row of the table becomes arrays, and a kernel is called.

One function for each family of ops. They are compiled by processes beside each other: see
`warm_up`. The family of products is in `products`.
"""

from typing import Any

from pyllama_kernels import ops
from pyllama_kernels.attention import attend, join
from pyllama_kernels.blocks import BLOCK
from pyllama_kernels.cache import store_keys, store_values
from pyllama_kernels.experts import combine, make_plan, quantize_experts, route
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
    Code,
    f32,
    i64,
    plan_at,
    share,
    table_of,
    u8,
)
from pyllama_kernels.pages import BLOCK_PAGES
from pyllama_kernels.plans import EXPERTS, PAIRS, lists
from pyllama_kernels.products import activations
from pyllama_kernels.selection import select


@kernel
def run_rows(op: Any, step: Any, part: int, parts: int) -> None:
    """One part of an op on the rows of a batch: norms, rounding, activations, sums."""
    rows = step[op.rows]
    code, n = op.code, op.n

    if code == Code.RMS_NORM:
        a, z = share(rows * op.heads, part, parts)
        x, out = f32(op.a, rows * op.heads, n), f32(op.out, rows * op.heads, n)
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

    elif code == Code.SILU_MUL:
        # In whole blocks, as the op that rounds the result is cut.
        a, z = share((rows * n + BLOCK - 1) // BLOCK, part, parts)
        a, z = BLOCK * a, min(BLOCK * z, rows * n)
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
def run_attention(op: Any, step: Any, part: int, parts: int, thread: int) -> None:
    """One part of an op of attention, from rope to the sum of values."""
    rows = step[op.rows]
    code, n, m = op.code, op.n, op.m

    if code == Code.ROPE:
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
        seqs, positions = i64(step[SEQS], rows), i64(step[POSITIONS], rows)
        cache = u8(op.out, op.n_blocks, op.heads, BLOCK_PAGES, op.page_bytes)[:, a:z]
        x = f32(op.a, rows, op.heads, n)[:, a:z]
        if code == Code.STORE_KEYS:
            store_keys(x, seqs, positions, table_of(step), op.kind, cache)
        else:
            store_values(x, seqs, positions, table_of(step), op.kind, cache)

    elif code == Code.ATTEND:
        keys = u8(op.c, op.n_blocks, op.kv_heads, BLOCK_PAGES, op.page_bytes)
        values = u8(op.b, op.n_blocks, op.kv_heads, BLOCK_PAGES, op.page_bytes)
        attend(
            f32(op.a, rows, op.heads, n),
            keys,
            values,
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

    elif code == Code.JOIN:
        a, z = share(op.heads, part, parts)
        join(
            f32(step[PARTS], step[CELLS], op.heads, m + 2),
            i64(step[SEQS], rows),
            i64(step[POSITIONS], rows),
            op.group,
            a,
            z,
            step[SCRATCH] + thread * step[SCRATCH_BYTES],
            f32(op.out, rows, op.heads, m),
        )

    elif code == Code.SELECT:
        a, z = share(rows, part, parts)
        select(
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


@kernel
def run_experts(op: Any, step: Any, part: int, parts: int) -> None:
    """One part of an op that shares rows out among experts, or puts their results together."""
    rows = step[op.rows]
    code, n = op.code, op.n

    if code == Code.QUANTIZE_EXPERTS:
        plan = plan_at(op.plan)
        a, z = share(plan[PAIRS] * (n // BLOCK), part, parts)
        quantize_experts(f32(op.a, rows, n), plan, a, z, u8(op.out, 1))

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


@kernel
def rows_of_pairs(op: Any) -> Any:
    """The row of each pair of an op's plan."""
    plan = plan_at(op.plan)
    return lists(plan)[3][: plan[PAIRS]]

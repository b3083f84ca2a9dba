"""Attention over the pages of a cache, for any number of threads.

The queries that read the same key head are taken together: some rows of the batch, and all heads
that share the key head. A page serves all of them while it is near: their scores are one small
product, the weighted sum of the values another, and the softmax is kept running.

A few rows (a decode step) would be too few parts for many threads. There the positions are cut into
chunks as well, and `join` puts their results together. Chunks have a fixed size, so that the result
does not depend on the number of threads.

Where keys and values are one (latent attention), a page of values is made of the page of keys.

Sources: Milakov and Gimelshein, Online normalizer calculation, 2018; Dao et al., FlashAttention,
2022; for the chunks, Dao et al., Flash-Decoding, 2023.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from pyllama_kernels import latent
from pyllama_kernels.byte_tile import TILE, one_page, two_pages
from pyllama_kernels.cache import turn_keys, unpack_numbers, unpack_values
from pyllama_kernels.exponential import exp, exp_of_differences
from pyllama_kernels.halves import IN_HARDWARE, float_to_half, half_to_float
from pyllama_kernels.jit import kernel
from pyllama_kernels.latent import add_values
from pyllama_kernels.layout import ROW_BYTES
from pyllama_kernels.lowlevel import LINE, address_of, float32_pointer, int32_pointer, prefetch
from pyllama_kernels.pages import CHUNK, FEW, KEPT_F16, KEPT_F32, KEPT_Q80, PAGE
from pyllama_kernels.rounding import round_block
from pyllama_kernels.simd import F32, I8, I16, I32, I64, Asm, Value

MOST = 64  # query heads and rows that are taken together
_AHEAD = 8192  # bytes from what is read of a cache to what is asked for
_QUERY_BYTES = 4  # of a number of a query: as float32, or rounded
_AT_ONCE = 8  # queries whose sums fit into registers
_SCORES = 4096  # that are worked on at a time: these stay in the first-level cache


def scratch_bytes(head_dim: int) -> int:
    """Memory that each thread needs beside the arrays; values are no wider than keys."""
    queries = MOST * ((_QUERY_BYTES + 4) * head_dim + 8)
    turned = max(
        latent.scratch_bytes(head_dim, count, _positions_at_once(count))
        for count in range(TILE, MOST + 1, TILE)
    )
    return queries + 4 * (PAGE * head_dim + _SCORES) + turned


@register_jitable
def _positions_at_once(queries: int) -> int:
    """Positions whose scores are held at a time, for so many queries: pairs of pages."""
    return min(CHUNK, _SCORES // queries // (2 * PAGE) * (2 * PAGE))


@kernel
def count_chunks(positions: Any) -> int:
    """Into how many chunks the positions of a batch are cut."""
    return positions.max() // CHUNK + 1 if positions.size <= FEW else 1


@kernel
def attend(
    query: Any,
    keys: Any,
    values: Any,
    kind: int,
    slots: Any,
    positions: Any,
    first: int,
    group: int,
    scale: float,
    mask: Any,
    parts: Any,
    out: Any,
    scratch: int,
    thread: int,
    n_threads: int,
) -> None:
    """One thread's part of `reference.attention`; `join` follows when all are done.

    Args:
        query: this and the next nine: see `reference.attention`.
        keys: pages.
        values: pages.
        kind: of the pages.
        slots: of the rows.
        positions: of the rows.
        first: place of the first head in its group.
        group: query heads that share a key head.
        scale: of the scores.
        mask: added to the scores.
        parts: [rows, heads, chunks, value_dim + 2] float32, written if there are several chunks:
            weighted sum of the values, sum of the weights, largest score.
        out: [rows, heads, value_dim] float32, written if there is one chunk.
        scratch: address of `scratch_bytes` of this thread's own.
        thread: this thread.
        n_threads: all threads.
    """
    rows, heads, _ = query.shape
    chunks = count_chunks(positions)
    first_key, last_key = first // group, (first + heads - 1) // group
    at_once = min(group, MOST)  # heads that are taken together
    height = max(1, MOST // at_once)  # rows
    unit = 0
    for kv_head in range(first_key, last_key + 1):
        first_head, stop_head = max(0, kv_head * group - first), (kv_head + 1) * group - first
        for head in range(first_head, min(heads, stop_head), at_once):
            stop = min(heads, stop_head, head + at_once)
            begin = int64(0)  # not a literal, which would be a type of its own to compile for
            while begin < rows:  # rows of one sequence after the other
                end = begin + 1
                while end < min(rows, begin + height) and slots[end] == slots[begin]:
                    end += 1
                last, ready = positions[begin:end].max() + 1, False
                for chunk in range(chunks):
                    unit += 1
                    if (unit - 1) % n_threads != thread:
                        continue
                    row_span, head_span = (begin, end), (head, stop)
                    if not ready:
                        _prepare(query, row_span, head_span, kind, float32(scale), scratch)
                        ready = True
                    _attend(
                        query,
                        keys[slots[begin], kv_head],
                        values[slots[begin], kv_head],
                        kind,
                        positions,
                        row_span,
                        head_span,
                        (CHUNK * chunk, min(last, CHUNK * (chunk + 1)) if chunks > 1 else last),
                        mask,
                        parts,
                        out,
                        scratch,
                    )
                begin = end


@kernel
def _attend(
    query: Any,
    keys: Any,
    values: Any,
    kind: int,
    positions: Any,
    row_span: Any,
    head_span: Any,
    position_span: Any,
    mask: Any,
    parts: Any,
    out: Any,
    scratch: int,
) -> None:
    """Some rows of one sequence, heads that share a key head, and positions of one chunk.

    Their queries are in the scratch: see `_prepare`.
    """
    n, m, chunks = query.shape[2], out.shape[2], parts.shape[2]
    turned = address_of(keys) == address_of(values)  # values are made of keys
    (first_row, last_row), (first_head, last_head) = row_span, head_span
    start, stop = position_span
    heads = last_head - first_head
    queries = (last_row - first_row) * heads
    room = (queries + TILE - 1) // TILE * TILE  # whole tiles of queries
    totals_at = scratch + _QUERY_BYTES * MOST * n
    totals = carray(float32_pointer(totals_at), (room, m))
    page_at = totals_at + 4 * MOST * n
    page_keys = carray(float32_pointer(page_at), (PAGE * n,))
    page_values = carray(float32_pointer(page_at), (PAGE * m,))
    scores_at = page_at + 4 * PAGE * n
    largest = carray(float32_pointer(scores_at + 4 * _SCORES), (queries,))
    sums = carray(float32_pointer(scores_at + 4 * (_SCORES + MOST)), (queries,))

    totals[:] = 0
    largest[:], sums[:] = float32(-np.inf), float32(0)

    # Pages are multiplied as they are kept if that is as fast; many queries share what is unpacked.
    few, whole = queries <= _AT_ONCE, m // PAGE * PAGE
    as_kept = kind == KEPT_F32 or (kind == KEPT_F16 and few and whole == m)
    size = 2 if as_kept and kind == KEPT_F16 else 4  # bytes of a number in what is multiplied
    # Many positions of the keys, then as many of the values: each is read as a stream.
    pairs = max(1, (stop - start + 2 * PAGE - 1) // (2 * PAGE))  # these rows may end before `start`
    at_once = min(_positions_at_once(room), 2 * PAGE * pairs)
    row_bytes = 4 * at_once
    scores = carray(float32_pointer(scores_at), (room, at_once))
    for block in range(start, stop, at_once):
        first = block // PAGE
        pages = (min(at_once, stop - block) + PAGE - 1) // PAGE
        scores[:] = 0
        if kind == KEPT_Q80:
            _score(keys[first : first + pages], n // 32, scratch, scores_at, row_bytes, queries)
        for page in range(pages if kind != KEPT_Q80 else 0):
            b, c = address_of(keys[first + page]), scores_at + 4 * PAGE * page
            if not as_kept:
                unpack_numbers(keys[first + page], kind, page_keys)
                b = page_at
            multiply(scratch, 4 * n, b, size, size * PAGE, n, c, row_bytes, queries)
        if kind == KEPT_Q80 and not turned:  # the first values, while scores become weights
            for line in range(0, min(_AHEAD, pages * values.shape[1]), LINE):
                prefetch(address_of(values[first]) + line)
        for i in range(queries if mask.size else 0):
            added = mask[first_row + i // heads, block:]
            for j in range(min(PAGE * pages, added.size)):
                scores[i, j] += added[j]
        for i in range(queries):
            limit = min(PAGE * pages, positions[first_row + i // heads] + 1 - block)
            _soften(scores[i, : PAGE * pages], limit, totals[i], largest, sums, i)
        if turned and kind == KEPT_Q80:
            scores[:, PAGE * pages :] = 0
            some = values[first : first + pages]
            add_values(some, m, scores, queries, totals, scores_at + 4 * (_SCORES + 2 * MOST))
            continue
        for page in range(pages):
            a, b = scores_at + 4 * PAGE * page, address_of(values[first + page])
            if kind == KEPT_Q80 and few and not turned:
                for i in range(0, queries, TILE):
                    _add_tile(b, m // 32, a + i * row_bytes, row_bytes, totals_at + 4 * i * m)
                continue
            value_size = size
            if turned:
                turn_keys(values[first + page], kind, m, page_values)
                b, value_size = page_at, 4
            elif not as_kept:
                unpack_values(values[first + page], kind, page_values)
                b = page_at
            for j in range(0, whole, PAGE):
                c = totals_at + 4 * j
                multiply(a, row_bytes, b, value_size, value_size * PAGE, PAGE, c, 4 * m, queries)
                b += value_size * PAGE * PAGE
            rest = carray(float32_pointer(b), (PAGE, m - whole))
            for i in range(queries if whole < m else 0):
                for lane in range(PAGE):
                    for j in range(whole, m):
                        totals[i, j] += scores[i, PAGE * page + lane] * rest[lane, j - whole]

    for i in range(queries):
        row, head = first_row + i // heads, first_head + i % heads
        if chunks > 1:
            chunk = start // CHUNK
            for j in range(m):
                parts[row, head, chunk, j] = totals[i, j]
            parts[row, head, chunk, m], parts[row, head, chunk, m + 1] = sums[i], largest[i]
        else:
            for j in range(m):
                out[row, head, j] = totals[i, j] / sums[i]


@kernel
def _prepare(
    query: Any, row_span: Any, head_span: Any, kind: int, scale: Any, scratch: int
) -> None:
    """Brings some queries, times a scale, to where `_attend` looks for them."""
    if kind == KEPT_Q80:
        _round_queries(query, row_span, head_span, scale, scratch)
        return
    (first_row, last_row), (first_head, last_head) = row_span, head_span
    heads, n = last_head - first_head, query.shape[2]
    queries = carray(float32_pointer(scratch), ((last_row - first_row) * heads, n))
    for i in range(queries.shape[0]):
        for j in range(n):
            queries[i, j] = query[first_row + i // heads, first_head + i % heads, j] * scale


@kernel
def _round_queries(query: Any, row_span: Any, head_span: Any, scale: Any, tiles: int) -> None:
    """Queries times a scale as tiles of Q80: see `layout`. What is left of the last one is zero."""
    (first_row, last_row), (first_head, last_head) = row_span, head_span
    heads, n = last_head - first_head, query.shape[2]
    queries = (last_row - first_row) * heads
    blocks = n // 32
    for i in range((queries + TILE - 1) // TILE * TILE):
        place = i % TILE
        for block in range(blocks):
            cell = tiles + ((i - place) * blocks + block * TILE) * ROW_BYTES
            half, total = float_to_half(float32(0)), 0
            if i < queries:
                values = query[first_row + i // heads, first_head + i % heads, 32 * block :]
                half, total = round_block(values, cell + 32 * place)
            scales = carray(float32_pointer(cell + 32 * TILE), (TILE,))
            offsets = carray(int32_pointer(cell + 36 * TILE), (TILE,))
            scales[place], offsets[place] = half_to_float(half) * scale, -8 * total


@kernel
def _score(
    keys: Any, blocks: int, activations: int, scores: int, stride: int, queries: int
) -> None:
    """Adds to [queries, positions] float32 the products with pages of Q80 keys.

    `activations` and `scores` are addresses, `stride` the bytes from one query's scores to the
    next's.
    """
    pages, size = keys.shape
    tiles = (queries + TILE - 1) // TILE
    # Every tile brings its share of two later pages near: more at once would be waited for.
    lines = (2 * size // 64 + tiles * blocks - 1) // (tiles * blocks)
    for page in range(0, pages, 2):
        at = address_of(keys[page])
        for i in range(tiles):
            x = activations + TILE * i * blocks * ROW_BYTES
            out = scores + TILE * i * stride + 4 * PAGE * page
            ahead = at + max(2 * size, _AHEAD) + 64 * lines * blocks * i
            if page + 1 < pages:
                two_pages(at, size, x, blocks, out, stride, ahead, lines)
            else:
                one_page(at, size, x, blocks, out, stride, ahead, lines)


@intrinsic
def _add_tile(typingctx, page, blocks, weights, stride, totals):
    """Adds a page of Q80 values, weighted, to [4, head_dim] float32.

    Addresses and sizes: the page, its blocks of 32, [4, 16] float32 weights so many bytes from row
    to row, the totals. The scale of each position goes to its weights.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        page, blocks, weights, stride, totals = (Value(asm, value) for value in args)
        kind, bytes_ = ir.VectorType(F32, PAGE), ir.VectorType(I8, PAGE)
        wide = ir.VectorType(I32, PAGE)
        rows = [weights + stride * asm.constant(I64, i) for i in range(TILE)]
        room = cgutils.alloca_once(builder, ir.ArrayType(F32, TILE * PAGE))
        scaled = Value(asm, builder.ptrtoint(room, I64))
        with asm.loop(blocks) as block:
            part = page.plus(block, PAGE * 34)
            for line in range(0, PAGE * 34, 64):
                asm.prefetch(part, _AHEAD + line)
            scales = asm.load(ir.VectorType(I16, PAGE), part).halves_as_floats(IN_HARDWARE)
            for i, row in enumerate(rows):
                asm.store(asm.load(kind, row) * scales, scaled, 4 * PAGE * i)
            # Both halves of 32 at once: a weight that has been loaded serves two products.
            places = {
                (i, half): (totals + blocks * asm.constant(I64, 4 * 32 * i))
                .plus(block, 4 * 32)
                .plus(4 * PAGE * half)
                for i in range(TILE)
                for half in range(2)
            }
            sums = {key: asm.load(kind, place) for key, place in places.items()}
            for lane in range(PAGE):
                floats = [
                    asm.load(bytes_, part, 2 * PAGE + 32 * lane + PAGE * half)
                    .widened(wide, signed=True)
                    .as_floats()
                    for half in range(2)
                ]
                for i in range(TILE):
                    weight = asm.load(F32, scaled, 4 * (PAGE * i + lane))
                    for half in range(2):
                        factor = asm.splat(weight, PAGE)
                        sums[i, half] = asm.fused(factor, floats[half], sums[i, half])
            for key, place in places.items():
                asm.store(sums[key], place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@kernel
def _soften(scores: Any, limit: int, total: Any, largest: Any, sums: Any, i: int) -> None:
    """Scores to weights, for the first `limit` positions; earlier sums shrink to the new scale."""
    if limit <= 0:
        scores[:] = 0
        return
    for j in range(limit, scores.size):
        scores[j] = float32(-np.inf)
    address, vectors = address_of(scores), scores.size // PAGE
    top = max(largest[i], _largest_score(address, vectors))
    if top == float32(-np.inf):  # nothing of it is selected
        scores[:] = 0
        return
    if top > largest[i]:
        shrink = exp(largest[i] - top)
        sums[i] *= shrink
        for j in range(total.size):
            total[j] *= shrink
        largest[i] = top
    sums[i] += exp_of_differences(address, top, vectors)


@kernel
def join(parts: Any, first: int, last: int, out: Any) -> None:
    """Puts the chunks of heads `first` to before `last` together; arrays as in `attend`."""
    rows, _, chunks, width = parts.shape
    n = width - 2
    for row in range(rows):
        for head in range(first, last):
            largest, total = float32(-np.inf), float32(0)
            for chunk in range(chunks):
                largest = max(largest, parts[row, head, chunk, n + 1])
            for j in range(n):
                out[row, head, j] = 0
            for chunk in range(chunks):
                # A row may end before this chunk: nothing is there, and its largest is -inf.
                weight = exp(parts[row, head, chunk, n + 1] - largest)
                total += weight * parts[row, head, chunk, n]
                for j in range(n):
                    out[row, head, j] += weight * parts[row, head, chunk, j]
            for j in range(n):
                out[row, head, j] /= total


@intrinsic
def _largest_score(typingctx, address, vectors):
    """The largest of 16 * vectors float32."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        scores, count = (Value(asm, value) for value in args)
        kind = ir.VectorType(F32, PAGE)
        top = asm.variable(asm.load(kind, scores))
        with asm.loop(count) as i:
            top.set(top.get().larger(asm.load(kind, scores.plus(i, 4 * PAGE))))
        return top.get().across("fmax").llvm

    return types.float32(types.int64, types.int64), codegen


@kernel
def multiply(
    a: int,
    a_stride: int,
    b: int,
    b_size: int,
    b_stride: int,
    count: int,
    c: int,
    c_stride: int,
    queries: int,
) -> None:
    """c[query, :16] += sum over k of a[query, k] * b[k, :16].

    Addresses, and strides in bytes; `b` holds float32, or float16 if its numbers have 2 bytes.
    """
    i = 0
    while i < queries:
        row, out, left = a + i * a_stride, c + i * c_stride, queries - i
        if b_size == 2:
            if left >= 8:
                _halves_8(row, a_stride, b, b_stride, count, out, c_stride)
            elif left >= 4:
                _halves_4(row, a_stride, b, b_stride, count, out, c_stride)
            else:
                _halves_1(row, a_stride, b, b_stride, count, out, c_stride)
        elif left >= 8:
            _floats_8(row, a_stride, b, b_stride, count, out, c_stride)
        elif left >= 4:
            _floats_4(row, a_stride, b, b_stride, count, out, c_stride)
        else:
            _floats_1(row, a_stride, b, b_stride, count, out, c_stride)
        i += 8 if left >= 8 else 4 if left >= 4 else 1


def _multiply_rows(queries, halves):
    """An intrinsic: `multiply` for so many queries, with the sums in registers."""

    @intrinsic
    def _multiply(typingctx, a, a_stride, b, b_stride, count, c, c_stride):
        def codegen(context, builder, signature, args):
            asm = Asm(builder)
            a, a_stride, b, b_stride, count, c, c_stride = (Value(asm, value) for value in args)
            kind, kept = ir.VectorType(F32, PAGE), ir.VectorType(I16, PAGE)
            a_rows = [a + a_stride * asm.constant(I64, i) for i in range(queries)]
            c_rows = [c + c_stride * asm.constant(I64, i) for i in range(queries)]
            sums = [asm.variable(asm.load(kind, row)) for row in c_rows]
            with asm.loop(count) as k:
                place = b + b_stride * k
                if halves:
                    asm.prefetch(place, _AHEAD)
                    vector = asm.load(kept, place).halves_as_floats(IN_HARDWARE)
                else:
                    vector = asm.load(kind, place)
                for row, total in zip(a_rows, sums, strict=True):
                    value = asm.splat(asm.load(F32, row.plus(k, 4)), PAGE)
                    total.set(asm.fused(value, vector, total.get()))
            for row, total in zip(c_rows, sums, strict=True):
                asm.store(total.get(), row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return _multiply


_floats_8, _floats_4, _floats_1 = (_multiply_rows(queries, False) for queries in (8, 4, 1))
_halves_8, _halves_4, _halves_1 = (_multiply_rows(queries, True) for queries in (8, 4, 1))

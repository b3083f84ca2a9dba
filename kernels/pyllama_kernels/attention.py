"""Attention over the pages of a cache, for any number of threads.

Queries that read the same key head form one batch: some rows, and all query heads that share the
key head. They reuse a page while it is in the cache: their scores are one small matrix product, the
weighted sum of the values another. The kernel goes through the context in chunks of positions and
carries an online softmax from chunk to chunk.

The order of a query's additions depends on its position alone: sums of a chunk start from zero, and
chunks are added in their order. So no result depends on the batch, on where blocks lie, or on the
threads.

In a decode step, a few rows would be too few parts for many threads. There each chunk is a part of
its own, and `join` adds the chunks; otherwise one thread takes all chunks of its queries.

In latent attention, keys and values are the same array: a page of values is made from the page of
keys.

Sources: Milakov and Gimelshein, Online normalizer calculation, 2018; Dao et al., FlashAttention,
2022; for the chunks, Dao et al., Flash-Decoding, 2023.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from pyllama_kernels import latent
from pyllama_kernels.byte_tile import TILE, one_page, two_pages
from pyllama_kernels.cache import transpose_keys, unpack_numbers, widen_values
from pyllama_kernels.exponential import exp, exp_of_differences
from pyllama_kernels.halves import IN_HARDWARE, float_to_half, half_to_float
from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.latent import add_values
from pyllama_kernels.layout import ROW_BYTES
from pyllama_kernels.lowlevel import (
    address_of,
    float32_pointer,
    int32_pointer,
    int64_pointer,
    uint8_pointer,
)
from pyllama_kernels.pages import (
    BLOCK_PAGES,
    CHUNK,
    KEPT_F16,
    KEPT_F32,
    KEPT_Q80,
    KV_BLOCK,
    PAGE,
)
from pyllama_kernels.rounding import round_block
from pyllama_kernels.simd import F32, I8, I16, I32, I64, Asm, Value

MOST = 64  # queries (rows times query heads) in one batch
_AHEAD = 8192  # bytes, at least, from what is read of a cache to what is asked for
_QUERY_BYTES = 4  # of a number of a query: as float32, or rounded
_AT_ONCE = 8  # queries whose sums fit into registers
_ROW = CHUNK + PAGE  # of scores; without the rest, rows would meet in the first-level cache
_CHUNK_PAGES = CHUNK // PAGE


def scratch_bytes(head_dim: int) -> int:
    """Memory that each thread needs beside the arrays; values are no wider than keys."""
    queries = MOST * (_QUERY_BYTES * head_dim + 4 * head_dim + 4 * (head_dim + 2))
    transposed = latent.scratch_bytes(head_dim, MOST, KV_BLOCK)
    return queries + 4 * (PAGE * head_dim + MOST * (PAGE + _ROW + 2)) + transposed


@kernel
def _next_rows(
    seqs: Any, positions: Any, begin: int, group: int, free: int
) -> tuple[int, int, bool]:
    """Finds the rows of one sequence from `begin` on that form a batch.

    Returns the row after the last one, the chunks of their positions, and whether each of these is
    a part of its own: then there is room for them among the cells that are free.
    """
    most = max(1, MOST // min(group, MOST))
    end = begin + 1
    while end < min(seqs.size, begin + most) and seqs[end] == seqs[begin]:
        end += 1
    chunks = positions[begin:end].max() // CHUNK + 1
    return end, chunks, chunks > 1 and (end - begin) * chunks <= free


@kernel
def attend(
    query: Any,
    keys: Any,
    values: Any,
    kind: int,
    seqs: Any,
    positions: Any,
    table: Any,
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
        query: this and the next ten: see `reference.attention`.
        keys: blocks.
        values: blocks.
        kind: of the pages.
        seqs: of the rows.
        positions: of the rows.
        table: of the sequences' blocks.
        first: place of the first head in its group.
        group: query heads that share a key head.
        scale: of the scores.
        mask: added to the scores.
        parts: [cells, heads, value_dim + 2] float32, for what is found in a chunk: weighted sum of
            the values, sum of the weights, largest score. See `pages.count_cells`.
        out: [rows, heads, value_dim] float32; rows whose chunks are in `parts` are not written.
        scratch: address of `scratch_bytes` of this thread's own.
        thread: this thread.
        n_threads: all threads.
    """
    rows, heads, _ = query.shape
    first_key, last_key = first // group, (first + heads - 1) // group
    at_once = min(group, MOST)  # heads in one batch
    unit, mine = 0, False
    for kv_head in range(first_key, last_key + 1):
        first_head, stop_head = max(0, kv_head * group - first), (kv_head + 1) * group - first
        for head in range(first_head, min(heads, stop_head), at_once):
            stop = min(heads, stop_head, head + at_once)
            begin, used = int64(0), int64(0)  # not literals: types of their own to compile for
            while begin < rows:
                end, chunks, cut = _next_rows(seqs, positions, begin, group, len(parts) - used)
                blocks = address_of(table[seqs[begin]])
                cached = _cached(keys, values, kv_head, blocks)
                row_span, head_span, ready = (begin, end), (head, stop), False
                for chunk in range(chunks):
                    if cut or chunk == 0:
                        mine = unit % n_threads == thread
                        unit += 1
                    if mine and not ready:
                        _prepare(query, row_span, head_span, kind, float32(scale), scratch)
                        ready = True
                    if mine:
                        _attend(
                            query.shape[2],
                            cached,
                            kind,
                            positions,
                            row_span,
                            head_span,
                            (chunk, chunks),
                            mask,
                            used if cut else int64(-1),
                            parts,
                            out,
                            scratch,
                        )
                used += (end - begin) * chunks if cut else 0
                begin = end


@kernel
def _attend(
    n: int,
    cached: Any,
    kind: int,
    positions: Any,
    row_span: Any,
    head_span: Any,
    chunk_of: Any,
    mask: Any,
    cell: int,
    parts: Any,
    out: Any,
    scratch: int,
) -> None:
    """Some rows of one sequence, heads that share a key head, and positions of one chunk.

    Their queries, `n` wide, are in the scratch: see `_prepare`. What is found goes to the cells
    from `cell` on; or, where that is -1, to what the chunks before have left in the scratch.
    """
    keys, values, _, page_bytes, _ = cached
    m, from_keys = out.shape[2], keys == values  # latent attention: values are made from keys
    (first_row, last_row), (first_head, last_head), (chunk, chunks) = row_span, head_span, chunk_of
    heads = last_head - first_head
    queries = (last_row - first_row) * heads
    room = (queries + TILE - 1) // TILE * TILE  # whole tiles of queries
    totals_at = scratch + _QUERY_BYTES * MOST * n
    totals = carray(float32_pointer(totals_at), (room, m))
    held_at = totals_at + 4 * MOST * n
    held = carray(float32_pointer(held_at), (queries, m + 2))
    page_at = held_at + 4 * MOST * (n + 2)
    page_keys = carray(float32_pointer(page_at), (PAGE * n,))
    page_values = carray(float32_pointer(page_at), (PAGE * m,))
    scaled_at = page_at + 4 * PAGE * n
    scores_at, row_bytes = scaled_at + 4 * PAGE * MOST, 4 * _ROW
    scores = carray(float32_pointer(scores_at), (room, _ROW))
    largest = carray(float32_pointer(scores_at + 4 * _ROW * MOST), (queries,))
    sums = carray(float32_pointer(scores_at + 4 * (_ROW + 1) * MOST), (queries,))
    spare = scores_at + 4 * (_ROW + 2) * MOST

    # Pages are multiplied in their own dtype if that is as fast, else unpacked for all queries.
    few, whole = queries <= _AT_ONCE, m // PAGE * PAGE
    as_kept = kind == KEPT_F32 or (kind == KEPT_F16 and few and whole == m)
    size = 2 if as_kept and kind == KEPT_F16 else 4  # bytes of a number in what is multiplied
    # All keys, then all values: each is read as a stream.
    seen = positions[first_row:last_row].max() + 1
    first, last = _CHUNK_PAGES * chunk, (seen + PAGE - 1) // PAGE
    pages = min(_CHUNK_PAGES, last - first)
    far = max(2, (_AHEAD // page_bytes + 1) // 2 * 2)
    stream = (first, pages, last, far)
    scores[:, : PAGE * (pages + 1)] = 0
    if kind == KEPT_Q80:
        _score(cached, stream, n // 32, scratch, scores_at, row_bytes, queries)
    for page in range(pages if kind != KEPT_Q80 else 0):
        b, c = _page(cached, keys, first + page), scores_at + 4 * PAGE * page
        ahead = _page_ahead(cached, stream, page) - b
        if not as_kept:
            unpack_numbers(carray(uint8_pointer(b), (page_bytes,)), kind, page_keys)
            b, ahead = page_at, 0
        multiply(scratch, 4 * n, b, size, size * PAGE, n, c, row_bytes, queries, ahead)
    for i in range(queries if mask.size else 0):
        added = mask[first_row + i // heads, PAGE * first :]
        for j in range(min(PAGE * pages, added.size)):
            scores[i, j] += added[j]
    for i in range(queries):
        limit = positions[first_row + i // heads] + 1 - PAGE * first
        sums[i], largest[i] = _softmax_weights(scores[i, : PAGE * pages], limit)
    totals[:] = 0
    if from_keys and kind == KEPT_Q80:
        for page in range(0, pages, BLOCK_PAGES):
            at, some = _page(cached, keys, first + page), min(BLOCK_PAGES, pages - page)
            block = carray(uint8_pointer(at), (some, page_bytes))
            add_values(block, m, scores[:, PAGE * page :], queries, totals, spare)
    for page in range(0 if from_keys and kind == KEPT_Q80 else pages):
        a, b = scores_at + 4 * PAGE * page, _page(cached, values, first + page)
        ahead = _page_ahead(cached, stream, pages + page) - b
        if kind == KEPT_Q80 and few:
            for i in range(0, queries, TILE):
                c = totals_at + 4 * i * m
                _add_tile(b, m // 32, a + i * row_bytes, row_bytes, c, ahead)
            continue
        if kind == KEPT_Q80:
            _add_many(b, m, a, row_bytes, queries, totals_at, page_at, scaled_at)
            continue
        value_size = size
        if from_keys:
            transpose_keys(carray(uint8_pointer(b), (page_bytes,)), kind, m, page_values)
            b, ahead, value_size = page_at, 0, 4
        elif not as_kept:
            unpack_numbers(carray(uint8_pointer(b), (page_bytes,)), kind, page_values)
            b, ahead = page_at, 0
        for j in range(0, whole, PAGE):
            c, step = totals_at + 4 * j, value_size * PAGE
            multiply(a, row_bytes, b, value_size, step, PAGE, c, 4 * m, queries, ahead)
            b += value_size * PAGE * PAGE
        rest = carray(float32_pointer(b), (PAGE, m - whole))
        for i in range(queries if whole < m else 0):
            for lane in range(PAGE):
                for j in range(whole, m):
                    totals[i, j] += scores[i, PAGE * page + lane] * rest[lane, j - whole]

    for i in range(queries):
        row, head = i // heads, first_head + i % heads
        if cell >= 0:
            part = parts[cell + row * chunks + chunk, head]
            for j in range(m):
                part[j] = totals[i, j]
            part[m], part[m + 1] = sums[i], largest[i]
        elif chunks == 1:
            _divide(totals[i], sums[i], out[first_row + row, head])
        else:
            _online_softmax_update(held[i], totals[i], sums[i], largest[i], chunk)
            if chunk == chunks - 1:
                _divide(held[i], held[i, m], out[first_row + row, head])


@kernel
def _cached(keys: Any, values: Any, kv_head: int, blocks: int) -> tuple[int, int, int, int, int]:
    """What a key head has in caches: numbers, since arrays cost time wherever they are handed on.

    The addresses of its first page of keys and of values in block 0, bytes from block to block and
    of a page, and the address of the sequence's row of the table.
    """
    page_bytes = keys.shape[3]
    first = kv_head * BLOCK_PAGES * page_bytes
    block_bytes = keys.shape[1] * BLOCK_PAGES * page_bytes
    return address_of(keys) + first, address_of(values) + first, block_bytes, page_bytes, blocks


@kernel
def _page(cached: Any, base: int, page: int) -> int:
    """The address of a page of a sequence; `base` is that of keys or of values."""
    _, _, block_bytes, page_bytes, blocks = cached
    place = page // BLOCK_PAGES
    block = carray(int64_pointer(blocks), (place + 1,))[place]
    return base + block * block_bytes + page % BLOCK_PAGES * page_bytes


@kernel
def _page_ahead(cached: Any, stream: Any, place: int) -> int:
    """The address of the page to ask for while that at a place in the stream is read.

    The stream is some pages of keys and as many of values, then the keys behind them, and those of
    the next key head: `stream` has the first page, how many, the one after the last of the
    sequence, and how far to look ahead. Where values are keys, there are only keys.
    """
    keys, values, _, page_bytes, _ = cached
    first, pages, last, far = stream
    place += far
    if keys != values and place >= pages:
        place -= pages
        if place < pages:
            return _page(cached, values, first + place)
    page = first + place
    if page < last or keys == values:
        return _page(cached, keys, min(page, last - 1))
    return _page(cached, keys + BLOCK_PAGES * page_bytes, min(page - last, last - 1))


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
    cached: Any,
    stream: Any,
    n_blocks: int,
    activations: int,
    scores: int,
    stride: int,
    queries: int,
) -> None:
    """Adds to [queries, positions] float32 the products with pages of Q80 keys.

    `n_blocks` are those of 32 numbers; `activations` and `scores` are addresses, `stride` the
    bytes from one query's scores to the next's.
    """
    keys, _, _, size, _ = cached
    first, pages, _, _ = stream
    tiles = (queries + TILE - 1) // TILE
    # Every tile brings its share of two later pages near: more at once would be waited for.
    lines = (2 * size // 64 + tiles * n_blocks - 1) // (tiles * n_blocks)
    for page in range(0, pages, 2):  # both of the same block
        at, near = _page(cached, keys, first + page), _page_ahead(cached, stream, page)
        for i in range(tiles):
            x = activations + TILE * i * n_blocks * ROW_BYTES
            out = scores + TILE * i * stride + 4 * PAGE * page
            ahead = near + 64 * lines * n_blocks * i
            if page + 1 < pages:
                two_pages(at, size, x, n_blocks, out, stride, ahead, lines)
            else:
                one_page(at, size, x, n_blocks, out, stride, ahead, lines)


@intrinsic
def _add_tile(typingctx, page, blocks, weights, stride, totals, ahead):
    """Adds a page of Q80 values, weighted, to [4, head_dim] float32.

    Addresses and sizes: the page, its blocks of 32, [4, 16] float32 weights so many bytes from row
    to row, the totals, bytes from the page to the one to ask for. The scale of each position goes
    to its weights.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        page, blocks, weights, stride, totals, ahead = (Value(asm, value) for value in args)
        kind, bytes_ = ir.VectorType(F32, PAGE), ir.VectorType(I8, PAGE)
        wide = ir.VectorType(I32, PAGE)
        rows = [weights + stride * asm.constant(I64, i) for i in range(TILE)]
        room = cgutils.alloca_once(builder, ir.ArrayType(F32, TILE * PAGE))
        scaled = Value(asm, builder.ptrtoint(room, I64))
        with asm.loop(blocks) as block:
            part = page.plus(block, PAGE * 34)
            for line in range(0, PAGE * 34, 64):
                asm.prefetch(part + ahead, line)
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

    return types.void(*[types.int64] * 6), codegen


@kernel
def _add_many(
    page: int,
    m: int,
    weights: int,
    stride: int,
    queries: int,
    totals: int,
    floats: int,
    scaled: int,
) -> None:
    """As `_add_tile`, with the same results, for any number of queries.

    `floats` and `scaled` are addresses of memory for a block of 32, and for all weights.
    """
    for block in range(m // 32):
        part, c = page + PAGE * 34 * block, totals + 4 * 32 * block
        widen_values(part, floats)
        _scale(weights, stride, part, queries, scaled)
        for half in range(2):
            b = floats + 4 * PAGE * PAGE * half
            multiply(scaled, 4 * PAGE, b, 4, 4 * PAGE, PAGE, c + 4 * PAGE * half, 4 * m, queries, 0)


@intrinsic
def _scale(typingctx, weights, stride, block, queries, scaled):
    """Rows of 16 weights times the scales of a block of Q80: addresses and sizes."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        weights, stride, block, queries, scaled = (Value(asm, value) for value in args)
        scales = asm.load(ir.VectorType(I16, PAGE), block).halves_as_floats(IN_HARDWARE)
        with asm.loop(queries) as i:
            row = asm.load(scales.type, weights + stride * i)
            asm.store(row * scales, scaled.plus(i, 4 * PAGE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@kernel
def _softmax_weights(scores: Any, limit: int) -> tuple[float, float]:
    """Replaces the scores of a chunk by exp(score - largest), the softmax's unnormalised weights.

    Positions from `limit` on get weight 0. Returns the sum of the weights and the largest score,
    which is -inf if no position is left or selected.
    """
    for j in range(max(0, limit), scores.size):
        scores[j] = float32(-np.inf)
    address, vectors = address_of(scores), scores.size // PAGE
    top = float32(_largest_score(address, vectors))
    if top == float32(-np.inf):
        scores[:] = 0
        return float32(0), top
    return exp_of_differences(address, top, vectors), top


@exact_kernel
def _online_softmax_update(held: Any, found: Any, weight: Any, largest: Any, chunk: int) -> None:
    """Adds the sums of one more chunk to those of earlier chunks, both rescaled to one maximum.

    `held` is [n + 2] float32: sums of values, sum of weights, largest score, all of the earlier
    ones; `found` is [n] float32 of this chunk, with its weight and largest score.
    """
    n = held.size - 2
    if chunk == 0:
        for j in range(n):
            held[j] = found[j]
        held[n], held[n + 1] = weight, largest
        return
    if largest == float32(-np.inf):  # nothing of it is seen
        return
    top = max(held[n + 1], largest)
    shrink, grow = exp(held[n + 1] - top), exp(largest - top)
    for j in range(n):
        held[j] = held[j] * shrink + found[j] * grow
    held[n] = held[n] * shrink + weight * grow
    held[n + 1] = top


@exact_kernel
def _divide(found: Any, weight: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = found[j] / weight


@kernel
def join(
    parts: Any,
    seqs: Any,
    positions: Any,
    group: int,
    first: int,
    last: int,
    scratch: int,
    out: Any,
) -> None:
    """Adds up the chunks of heads `first` to before `last`; arrays and sizes as in `attend`."""
    rows, m = out.shape[0], out.shape[2]
    held = carray(float32_pointer(scratch), (m + 2,))
    begin, cell = int64(0), int64(0)
    while begin < rows:
        end, chunks, cut = _next_rows(seqs, positions, begin, group, len(parts) - cell)
        for row in range(begin, end if cut else begin):
            for head in range(first, last):
                for chunk in range(chunks):
                    part = parts[cell + chunk, head]
                    _online_softmax_update(held, part, part[m], part[m + 1], chunk)
                _divide(held, held[m], out[row, head])
            cell += chunks
        begin = end


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
    ahead: int,
) -> None:
    """c[query, :16] += sum over k of a[query, k] * b[k, :16].

    Addresses, and strides in bytes; `b` holds float32, or float16 if its numbers have 2 bytes. What
    lies `ahead` bytes behind halves is asked for.
    """
    i = 0
    while i < queries:
        row, out, left = a + i * a_stride, c + i * c_stride, queries - i
        if b_size == 2:
            if left >= 8:
                _halves_8(row, a_stride, b, b_stride, count, out, c_stride, ahead)
            elif left >= 4:
                _halves_4(row, a_stride, b, b_stride, count, out, c_stride, ahead)
            else:
                _halves_1(row, a_stride, b, b_stride, count, out, c_stride, ahead)
        elif left >= 8:
            _floats_8(row, a_stride, b, b_stride, count, out, c_stride, ahead)
        elif left >= 4:
            _floats_4(row, a_stride, b, b_stride, count, out, c_stride, ahead)
        else:
            _floats_1(row, a_stride, b, b_stride, count, out, c_stride, ahead)
        i += 8 if left >= 8 else 4 if left >= 4 else 1


def _multiply_rows(queries, halves):
    """An intrinsic: `multiply` for so many queries, with the sums in registers."""

    @intrinsic
    def _multiply(typingctx, a, a_stride, b, b_stride, count, c, c_stride, ahead):
        def codegen(context, builder, signature, args):
            asm = Asm(builder)
            a, a_stride, b, b_stride, count, c, c_stride, ahead = (
                Value(asm, value) for value in args
            )
            kind, kept = ir.VectorType(F32, PAGE), ir.VectorType(I16, PAGE)
            a_rows = [a + a_stride * asm.constant(I64, i) for i in range(queries)]
            c_rows = [c + c_stride * asm.constant(I64, i) for i in range(queries)]
            sums = [asm.variable(asm.load(kind, row)) for row in c_rows]
            with asm.loop(count) as k:
                place = b + b_stride * k
                if halves:
                    asm.prefetch(place + ahead, 0)
                    vector = asm.load(kept, place).halves_as_floats(IN_HARDWARE)
                else:
                    vector = asm.load(kind, place)
                for row, total in zip(a_rows, sums, strict=True):
                    value = asm.splat(asm.load(F32, row.plus(k, 4)), PAGE)
                    total.set(asm.fused(value, vector, total.get()))
            for row, total in zip(c_rows, sums, strict=True):
                asm.store(total.get(), row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return _multiply


_floats_8, _floats_4, _floats_1 = (_multiply_rows(queries, False) for queries in (8, 4, 1))
_halves_8, _halves_4, _halves_1 = (_multiply_rows(queries, True) for queries in (8, 4, 1))

"""Weighted sums of values that are the keys themselves, kept as Q80: latent attention.

Keys lie so that products over their numbers need no sum across lanes; values are summed over
positions instead. So pages are turned: 16 numbers of 32 positions lie as 16 rows of 32 inputs, and
the tile that multiplies queries with keys adds values up as well, with the weights of the positions
as its activations. The weights take the positions' scales with them and are rounded as activations
are: 32 positions share a scale.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import carray, float32, types
from numba.extending import intrinsic

from pyllama_kernels import cpu
from pyllama_kernels.halves import half_to_float
from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.layout import ROW_BYTES
from pyllama_kernels.lowlevel import (
    address_of,
    float32_pointer,
    int32_pointer,
    uint16_pointer,
)
from pyllama_kernels.matrix import Q80_KEYS, make_tile
from pyllama_kernels.pages import PAGE
from pyllama_kernels.simd import F32, I8, I32, Asm, Value

_PAIR = 2 * PAGE  # positions that share a scale
_CELL = 34 * PAGE  # bytes of 16 rows in one block of 32 inputs
_PAGE_BLOCK = 34 * PAGE  # bytes of 32 numbers of each position of a page
_ONE = 0x3C00  # as float16
_ROUNDS = 1.5 * 2.0**23  # added to a small number, it leaves no room for a fraction


TILE, LARGE_TILE = 4, 16  # queries that are multiplied with 16 interleaved rows together
_small, _large = (
    make_tile(cpu.load(cpu.choose().name).ISA, Q80_KEYS, rows) for rows in (TILE, LARGE_TILE)
)


@kernel
def multiply_q80(
    rows: int, activations: int, blocks: int, sums: int, stride: int, queries: int
) -> None:
    """16 interleaved rows of Q80 times queries, large tiles first: see `matrix.make_tile`."""
    i = 0
    while i < queries:
        tile, out = activations + i * blocks * ROW_BYTES, sums + i * stride
        if queries - i >= LARGE_TILE:
            _large(rows, tile, blocks, out, stride)
            i += LARGE_TILE
        else:
            _small(rows, tile, blocks, out, stride)
            i += TILE


def scratch_bytes(head_dim: int, queries: int, positions: int) -> int:
    """Memory that `add_values` needs for so many queries and positions."""
    pairs = -(-positions // _PAIR)
    turned = pairs * (head_dim // PAGE * _CELL + head_dim // 32 * 4 * (_PAIR + 1))
    return turned + queries * (pairs * (ROW_BYTES + 4) + 4 * PAGE)


@intrinsic
def _turn(typingctx, block, low, high):
    """32 numbers of 16 positions as twice 16 rows of 16 inputs. Addresses.

    A vector holds 4 numbers of 16 positions; wanted are 4 positions of 16 numbers.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        block, *targets = (Value(asm, value) for value in args)
        bytes_, words = ir.VectorType(I8, 64), ir.VectorType(I32, 16)
        # Within 16 bytes: 4 positions of 4 numbers become 4 numbers of 4 positions.
        swap = [16 * q + 4 * p + i for q in range(4) for i in range(4) for p in range(4)]
        for half, target in enumerate(targets):
            a, b, c, d = (
                asm.load(bytes_, block, 2 * PAGE + 64 * (4 * half + i)).part(*swap).bits_as(words)
                for i in range(4)
            )
            for quad in range(4):
                lanes = range(4 * quad, 4 * quad + 4)
                both = [*lanes, *(16 + lane for lane in lanes)]
                whole = a.lanes_with(b, *both).lanes_with(c.lanes_with(d, *both), *range(16))
                asm.store(whole, target, 64 * quad)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _round(typingctx, weights, scales, target):
    """Writes 32 float32 times 32 others, each product up to 127, as int8; returns their sum."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        weights, scales, target = (Value(asm, value) for value in args)
        floats, total = ir.VectorType(F32, PAGE), None
        rounds = asm.constant(floats, _ROUNDS)
        for i in range(2):
            product = asm.load(floats, weights, 64 * i) * asm.load(floats, scales, 64 * i)
            whole = (product + rounds - rounds).as_integers()
            asm.store(whole.narrowed(ir.VectorType(I8, PAGE)), target, PAGE * i)
            total = whole if total is None else total + whole
        return total.across("add").llvm

    return types.int32(types.int64, types.int64, types.int64), codegen


@exact_kernel
def _rounded(weights: int, scales: int, target: int) -> int:
    return _round(weights, scales, target)


@intrinsic
def _largest(typingctx, address):
    """The largest of 32 float32."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        kind = ir.VectorType(F32, PAGE)
        low, high = (asm.load(kind, Value(asm, args[0]), 4 * PAGE * i) for i in range(2))
        return low.larger(high).across("fmax").llvm

    return types.float32(types.int64), codegen


@intrinsic
def _scale(typingctx, address, factor):
    """32 float32 times a factor, in place."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        address, factor = (Value(asm, value) for value in args)
        for i in range(2):
            vector = asm.load(ir.VectorType(F32, PAGE), address, 4 * PAGE * i)
            asm.store(vector * asm.splat(factor, PAGE), address, 4 * PAGE * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def _add_rows(typingctx, rows, count, totals, stride):
    """Adds [count, 16] float32 to rows that are so many bytes apart. Addresses and sizes."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        rows, count, totals, stride = (Value(asm, value) for value in args)
        kind = ir.VectorType(F32, PAGE)
        with asm.loop(count) as i:
            place = totals + stride * i
            asm.store(asm.load(kind, place) + asm.load(kind, rows.plus(i, 4 * PAGE)), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@kernel
def _to_one(numbers: int, size: int) -> Any:
    """Makes `size` of the largest of 32 numbers, others in proportion; returns what a 1 is worth.

    `numbers` is their address; none is negative.
    """
    top = _largest(numbers)
    if not top > 0:
        return float32(0)
    _scale(numbers, float32(size) / top)
    return top / float32(size)


@kernel
def add_values(values: Any, m: int, scores: Any, queries: int, totals: Any, scratch: int) -> None:
    """totals += scores @ values, with the scores rounded; they are spoilt.

    Args:
        values: [pages, page bytes] uint8, pages of Q80 keys.
        m: numbers of a position that count, a multiple of 32.
        scores: [queries, positions] float32 weights, 0 behind the last position of the pages;
            positions are a multiple of 32.
        queries: rows of the scores that count.
        totals: [queries, m] float32.
        scratch: address of `scratch_bytes`.
    """
    pages = values.shape[0]
    pairs, blocks = (pages + 1) // 2, m // 32
    places = pairs * _PAIR
    scales_at = scratch + 2 * blocks * pairs * _CELL
    scales = carray(float32_pointer(scales_at), (blocks, places))
    tops_at = scales_at + 4 * blocks * places
    largest = carray(float32_pointer(tops_at), (blocks, pairs))
    tops = carray(float32_pointer(tops_at + 4 * blocks * pairs), (queries, pairs))
    sums_at = tops_at + 4 * (blocks + queries) * pairs
    weights_at = sums_at + 4 * PAGE * ((queries + TILE - 1) // TILE * TILE)

    for block in range(blocks):
        rows = scratch + 2 * block * pairs * _CELL
        for pair in range(2 * pairs):
            ones = carray(uint16_pointer(rows + pair * _CELL), (PAGE,))
            ones[:] = _ONE
        for page in range(pages):
            place = address_of(values[page]) + block * _PAGE_BLOCK
            target = rows + page // 2 * _CELL + 2 * PAGE + page % 2 * 256
            _turn(place, target, target + pairs * _CELL)
            halves = carray(uint16_pointer(place), (PAGE,))
            for lane in range(PAGE):
                scales[block, PAGE * page + lane] = half_to_float(halves[lane])
        scales[block, PAGE * pages :] = 0
        for pair in range(pairs):
            largest[block, pair] = _to_one(scales_at + 4 * (block * places + _PAIR * pair), 1)
    for i in range(queries):
        for pair in range(pairs):
            tops[i, pair] = _to_one(address_of(scores[i]) + 4 * _PAIR * pair, 127)

    stop = queries // LARGE_TILE * LARGE_TILE  # queries in large tiles
    for block in range(blocks):
        for i in range(queries):
            tile = LARGE_TILE if i < stop else TILE
            place = i % tile
            for pair in range(pairs):
                cell = weights_at + ((i - place) * pairs + pair * tile) * ROW_BYTES
                total = _rounded(
                    address_of(scores[i]) + 4 * _PAIR * pair,
                    scales_at + 4 * (block * places + _PAIR * pair),
                    cell + 32 * place,
                )
                carray(float32_pointer(cell + 32 * tile), (tile,))[place] = (
                    tops[i, pair] * largest[block, pair]
                )
                carray(int32_pointer(cell + 36 * tile), (tile,))[place] = -8 * total
        for half in range(2):
            rows = scratch + (2 * block + half) * pairs * _CELL
            multiply_q80(rows, weights_at, pairs, sums_at, 4 * PAGE, queries)
            first = 32 * block + PAGE * half
            _add_rows(sums_at, queries, address_of(totals) + 4 * first, 4 * m)

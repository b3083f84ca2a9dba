"""Weighted sums of values for latent attention, where the Q80 keys are the values too.

Scores are sums over the numbers of a key, and the layout of a page suits those. Values are summed
over positions. So pages are transposed: 16 numbers of 32 positions become 16 rows of 32 inputs, to
be multiplied with the weights of the positions. All numbers of a position are rescaled to the
largest scale of its blocks, and that scale is moved into the position's weight. Weights are
quantized as activations are, 32 positions to a scale, once for all numbers.

    transposed: [m / 16][pairs of pages][8][16 numbers][4 positions] bytes, plus the bias of the
                instruction set
    weights:    tiles of 4 queries, as `layout` has them: [pairs][32 int8 of each query, 4 scales,
                4 offsets]
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pyllama_kernels.byte_tile import ISA, TILE, TILE_BYTES, two_transposed
from pyllama_kernels.halves import IN_HARDWARE
from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.lowlevel import address_of, float32_pointer, uint8_pointer
from pyllama_kernels.pages import PAGE
from pyllama_kernels.simd import F32, I8, I16, I32, Asm, Value

_PAIR = 2 * PAGE  # positions that share a scale
_CELL = _PAIR * PAGE  # bytes of 16 numbers of 32 positions
_PAGE_BLOCK = 34 * PAGE  # bytes of 32 numbers of each position of a page
_ROUNDS = 1.5 * 2.0**23  # added to a small number, it leaves no room for a fraction


def scratch_bytes(head_dim: int, queries: int, positions: int) -> int:
    """Memory that `add_values` needs for so many queries and positions."""
    pairs = -(-positions // _PAIR)
    tiles = -(-queries // TILE)
    return pairs * (head_dim // PAGE * _CELL + 2 * 4 * _PAIR + tiles * TILE_BYTES)


@intrinsic
def _largest_scales(typingctx, page, blocks, scales, inverses):
    """The largest scale of each of a page's 16 positions, and its inverse. Addresses."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        page, blocks, scales, inverses = (Value(asm, value) for value in args)
        floats = ir.VectorType(F32, PAGE)
        top = asm.variable(asm.constant(floats, 2.0**-24))  # where all are 0, nothing is divided
        with asm.loop(blocks) as block:
            top.set(top.get().larger(_scales(asm, page.plus(block, _PAGE_BLOCK))))
        asm.store(top.get(), scales)
        asm.store(asm.constant(floats, 1.0).over(top.get()), inverses)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _scales(asm: Asm, block: Value) -> Value:
    halves = asm.load(ir.VectorType(I16, PAGE), block)
    return halves.halves_as_floats(IN_HARDWARE)


@intrinsic
def _transpose(typingctx, block, inverses, low, high):
    """Transposes 32 numbers of 16 positions to twice 16 rows of 16 inputs of one scale. Addresses.

    A vector holds 4 numbers of 16 positions; wanted are 4 positions of 16 numbers.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        block, inverses, *targets = (Value(asm, value) for value in args)
        bytes_, lanes = ir.VectorType(I8, 64), ir.VectorType(I32, 16)
        ratio = _scales(asm, block) * asm.load(ir.VectorType(F32, PAGE), inverses)
        ratio = (ratio * asm.constant(ratio.type, 32767.0)).as_integers()
        ratios = (ratio | (ratio << asm.constant(lanes, 16))).bits_as(ir.VectorType(I16, 32))
        # Within 16 bytes: 4 positions of 4 numbers become 4 numbers of 4 positions.
        swap = [16 * q + 4 * p + i for q in range(4) for i in range(4) for p in range(4)]
        for half, target in enumerate(targets):
            a, b, c, d = (
                _times(asm, asm.load(bytes_, block, 2 * PAGE + 64 * i), ratios)
                .part(*swap)
                .bits_as(lanes)
                for i in range(4 * half, 4 * half + 4)
            )
            for quad in range(4):
                some = range(4 * quad, 4 * quad + 4)
                both = [*some, *(16 + lane for lane in some)]
                whole = a.lanes_with(b, *both).lanes_with(c.lanes_with(d, *both), *range(16))
                asm.store(whole, target, 64 * quad)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _times(asm: Asm, numbers: Value, ratios: Value) -> Value:
    """64 int8 times int16 ratios (32767 is 1), one for each two, rounded, with the bias added."""
    words = ir.VectorType(I16, 32)

    def number(value: int) -> Value:
        return asm.constant(words, value)

    pairs = numbers.bits_as(words)
    # A byte at the top of a word, times a ratio, keeps 7 bits more than a byte.
    rounds = number(64 + 128 * ISA.bias)
    first, second = (
        word.high_product(ratios) + rounds for word in (pairs << number(8), pairs & number(0xFF00))
    )
    low, high = (first >> number(7)) & number(0xFF), (second << number(1)) & number(0xFF00)
    return (low | high).bits_as(numbers.type)


@intrinsic
def _round(typingctx, weights, scales, values, scale, offset):
    """Quantizes 32 float32 weights, each times its scale, as activations are. Addresses.

    Writes 32 int8, a float32 scale, and -8 times the sum of the int8.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        weights, scales, values, scale, offset = (Value(asm, value) for value in args)
        floats = ir.VectorType(F32, PAGE)
        low, high = (
            asm.load(floats, weights, 64 * i) * asm.load(floats, scales, 64 * i) for i in range(2)
        )
        # Weights that are all 0, or nearly, count as 0 with any scale.
        top = low.larger(high).larger(asm.constant(floats, 2.0**-100)).across("fmax")
        size = asm.splat(asm.constant(F32, 127.0).over(top), PAGE)
        rounds, total = asm.constant(floats, _ROUNDS), None
        for i, part in enumerate((low, high)):
            whole = (part * size + rounds - rounds).as_integers()
            asm.store(whole.narrowed(ir.VectorType(I8, PAGE)), values, PAGE * i)
            total = whole if total is None else total + whole
        asm.store(top * asm.constant(F32, 1 / 127), scale)
        asm.store(total.across("add") * asm.constant(I32, -8), offset)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@exact_kernel
def _rounded(weights: int, scales: int, values: int, scale: int, offset: int) -> None:
    _round(weights, scales, values, scale, offset)


@kernel
def add_values(values: Any, m: int, scores: Any, queries: int, totals: Any, scratch: int) -> None:
    """totals += scores @ values, with the scores rounded.

    Args:
        values: [pages, page bytes] uint8, pages of Q80 keys.
        m: numbers of a position that count, a multiple of 32.
        scores: [queries, positions] float32 weights, 0 behind the last position of the pages;
            positions are a multiple of 32.
        queries: rows of the scores that count.
        totals: [queries, m] float32, with room for a multiple of 4 queries.
        scratch: address of `scratch_bytes`.
    """
    pages, blocks = values.shape[0], m // 32
    pairs = (pages + 1) // 2
    group_bytes = pairs * _CELL
    scales = scratch + m // PAGE * group_bytes
    inverses = scales + 4 * pairs * _PAIR
    weights = inverses + 4 * pairs * _PAIR
    tiles = (queries + TILE - 1) // TILE

    # The last pair may have one page: its other positions have no weight, and a scale that is none.
    carray(float32_pointer(scales), (pairs * _PAIR,))[PAGE * pages :] = 0
    for page in range(pages):
        place = 4 * PAGE * page
        _largest_scales(address_of(values[page]), blocks, scales + place, inverses + place)
        for block in range(blocks):
            source = address_of(values[page]) + block * _PAGE_BLOCK
            target = scratch + 2 * block * group_bytes + page // 2 * _CELL + page % 2 * (_CELL // 2)
            _transpose(source, inverses + place, target, target + group_bytes)
    for tile in range(tiles):
        for pair in range(pairs):
            cell = weights + (tile * pairs + pair) * TILE_BYTES
            if TILE * (tile + 1) > queries:
                carray(uint8_pointer(cell), (TILE_BYTES,))[:] = 0
            for q in range(min(TILE, queries - TILE * tile)):
                _rounded(
                    address_of(scores[TILE * tile + q]) + 4 * _PAIR * pair,
                    scales + 4 * _PAIR * pair,
                    cell + 32 * q,
                    cell + 32 * TILE + 4 * q,
                    cell + 36 * TILE + 4 * q,
                )
    for block in range(blocks):
        for tile in range(tiles):
            two_transposed(
                scratch + 2 * block * group_bytes,
                group_bytes,
                weights + tile * pairs * TILE_BYTES,
                pairs,
                address_of(totals[TILE * tile]) + 4 * 32 * block,
                4 * m,
                0,
                0,
            )

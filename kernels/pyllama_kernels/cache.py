"""The compiled side of `pages`: keys and values are stored, and pages unpacked."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pyllama_kernels.halves import IN_HARDWARE, float_to_half, half_to_float
from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    address_of,
    float32_pointer,
    int8_pointer,
    stack,
    uint16_pointer,
)
from pyllama_kernels.pages import KEPT_F16, KEPT_F32, KEPT_Q80, KV_BLOCK, PAGE
from pyllama_kernels.rounding import round_block
from pyllama_kernels.simd import I8, I16, I32, Asm, Value

_BLOCK_BYTES = PAGE * 34  # of 32 numbers of each position, as Q80


@kernel
def _f32s(page: Any, rows: int, columns: int) -> Any:
    return carray(float32_pointer(address_of(page)), (rows, columns))


@kernel
def _halves(page: Any, rows: int, columns: int) -> Any:
    return carray(uint16_pointer(address_of(page)), (rows, columns))


@kernel
def place_of(blocks: Any, position: int) -> tuple[int, int, int]:
    """Where a position of a sequence lies: its block, the page there, and its place in the page."""
    inside = position % KV_BLOCK
    return blocks[position // KV_BLOCK], inside // PAGE, inside % PAGE


@kernel
def store_keys(x: Any, seqs: Any, positions: Any, table: Any, kind: int, cache: Any) -> None:
    """See `reference.store_keys`."""
    rows, heads, n = x.shape
    room = stack(32)
    rounded = carray(int8_pointer(room), (32,))
    for row in range(rows):
        held, number, lane = place_of(table[seqs[row]], positions[row])
        for head in range(heads):
            page = cache[held, head, number]
            if kind == KEPT_F32:
                floats = _f32s(page, n, PAGE)
                for i in range(n):
                    floats[i, lane] = x[row, head, i]
            elif kind == KEPT_F16:
                halves = _halves(page, n, PAGE)
                for i in range(n):
                    halves[i, lane] = float_to_half(x[row, head, i])
            else:
                for block in range(n // 32):
                    part = page[_BLOCK_BYTES * block :]
                    half, _ = round_block(x[row, head, 32 * block :], room)
                    _halves(part, 1, PAGE)[0, lane] = half
                    for i in range(32):
                        part[2 * PAGE + 4 * (PAGE * (i // 4) + lane) + i % 4] = rounded[i]


@kernel
def store_values(x: Any, seqs: Any, positions: Any, table: Any, kind: int, cache: Any) -> None:
    """See `reference.store_values`."""
    rows, heads, n = x.shape
    for row in range(rows):
        held, number, lane = place_of(table[seqs[row]], positions[row])
        for head in range(heads):
            page = cache[held, head, number]
            if kind == KEPT_F32:
                floats = _f32s(page, 1, PAGE * n)[0]
                for i in range(n):
                    floats[_place(lane, i, n)] = x[row, head, i]
            elif kind == KEPT_F16:
                halves = _halves(page, 1, PAGE * n)[0]
                for i in range(n):
                    halves[_place(lane, i, n)] = float_to_half(x[row, head, i])
            else:
                for block in range(n // 32):
                    part = page[_BLOCK_BYTES * block :]
                    target = address_of(part) + 2 * PAGE + 32 * lane
                    half, _ = round_block(x[row, head, 32 * block :], target)
                    _halves(part, 1, PAGE)[0, lane] = half


@kernel
def _place(lane: int, i: int, n: int) -> int:
    """Where value i of a position lies in a page of values."""
    start = i // PAGE * PAGE
    return PAGE * start + lane * min(PAGE, n - start) + i - start


@intrinsic
def widen_values(typingctx, block, out):
    """The int8 of a block of Q80 values as float32, without scales. Addresses.

    `out` is [2][16 positions][16]: the first half of each position's numbers, then the second.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        block, out = (Value(asm, value) for value in args)
        for lane in range(PAGE):
            for half in range(2):
                bytes_ = asm.load(ir.VectorType(I8, PAGE), block, 2 * PAGE + 32 * lane + 16 * half)
                floats = bytes_.widened(ir.VectorType(I32, PAGE), signed=True).as_floats()
                asm.store(floats, out, 4 * PAGE * (PAGE * half + lane))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@kernel
def unpack_numbers(page: Any, kind: int, out: Any) -> None:
    """A page of float32 or float16, keys or values, as float32 in the same order."""
    target = _f32s(out, 1, out.size)
    if kind == KEPT_F32:
        floats = _f32s(page, 1, out.size)
        for i in range(out.size):
            target[0, i] = floats[0, i]
    else:
        halves = _halves(page, 1, out.size)
        for i in range(out.size):
            target[0, i] = half_to_float(halves[0, i])


@kernel
def unpack_keys(page: Any, kind: int, out: Any) -> None:
    """A page of keys as float32, in the order of a page of float32: [16 * head_dim]."""
    if kind != KEPT_Q80:
        unpack_numbers(page, kind, out)
        return
    for block in range(out.size // (32 * PAGE)):
        part = page[_BLOCK_BYTES * block :]
        scales, values = _halves(part, 1, PAGE), carray(int8_pointer(address_of(part)), (544,))
        for i in range(32):
            for lane in range(PAGE):
                number = values[2 * PAGE + 4 * (PAGE * (i // 4) + lane) + i % 4]
                place = PAGE * (32 * block + i) + lane
                out[place] = number * half_to_float(scales[0, lane])


@intrinsic
def _transpose_q80(typingctx, page, blocks, out):
    """Blocks of Q80 keys to values as float32, in the order of a page. Addresses and a count.

    Four vectors hold 4 numbers of each of 16 positions; 16 numbers of a position are wanted.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        page, blocks, out = (Value(asm, value) for value in args)
        quads, bytes_ = ir.VectorType(I32, PAGE), ir.VectorType(I8, PAGE)
        with asm.loop(blocks) as block:
            part, target = page.plus(block, _BLOCK_BYTES), out.plus(block, 4 * 32 * PAGE)
            scales = asm.load(ir.VectorType(I16, PAGE), part).halves_as_floats(IN_HARDWARE)
            for half in range(2):
                a, b, c, d = (
                    asm.load(quads, part, 2 * PAGE + 64 * (4 * half + i)) for i in range(4)
                )
                for lane in range(0, PAGE, 4):
                    pairs = [i + 16 * side for i in range(lane, lane + 4) for side in range(2)]
                    ab, cd = a.lanes_with(b, *pairs), c.lanes_with(d, *pairs)
                    for i in range(4):
                        number = ab.lanes_with(cd, 2 * i, 2 * i + 1, 2 * i + 8, 2 * i + 9)
                        wide = number.bits_as(bytes_).widened(quads, signed=True)
                        scale = scales.part(*[lane + i] * PAGE)
                        place = 4 * PAGE * (PAGE * half + lane + i)
                        asm.store(wide.as_floats() * scale, target, place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@kernel
def transpose_keys(page: Any, kind: int, n: int, out: Any) -> None:
    """The first n numbers of a page of keys as float32, in the order of a page of values.

    `n` is a multiple of 16, and of 32 for Q80; `out` is [16 * n] float32.
    """
    if kind == KEPT_Q80:
        _transpose_q80(address_of(page), n // 32, address_of(out))
    elif kind == KEPT_F32:
        floats = _f32s(page, n, PAGE)
        for i in range(n):
            for lane in range(PAGE):
                out[_place(lane, i, n)] = floats[i, lane]
    else:
        halves = _halves(page, n, PAGE)
        for i in range(n):
            for lane in range(PAGE):
                out[_place(lane, i, n)] = half_to_float(halves[i, lane])

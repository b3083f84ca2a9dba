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
from pyllama_kernels.pages import KEPT_F16, KEPT_F32, KEPT_Q80, PAGE
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
def store_keys(x: Any, slots: Any, positions: Any, kind: int, cache: Any) -> None:
    """See `reference.store_keys`."""
    rows, heads, n = x.shape
    room = stack(32)
    rounded = carray(int8_pointer(room), (32,))
    for row in range(rows):
        number, lane = positions[row] // PAGE, positions[row] % PAGE
        for head in range(heads):
            page = cache[slots[row], head, number]
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
def store_values(x: Any, slots: Any, positions: Any, kind: int, cache: Any) -> None:
    """See `reference.store_values`."""
    rows, heads, n = x.shape
    for row in range(rows):
        number, lane = positions[row] // PAGE, positions[row] % PAGE
        for head in range(heads):
            page = cache[slots[row], head, number]
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
def _unpack_values_q80(typingctx, values, scale, out):
    """32 numbers of one position, into two parts of 16. Addresses, and a float32."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        values, scale, out = (Value(asm, value) for value in args)
        for i in range(0, 32, PAGE):
            bytes_ = asm.load(ir.VectorType(I8, PAGE), values, i)
            floats = bytes_.widened(ir.VectorType(I32, PAGE), signed=True).as_floats()
            asm.store(floats * asm.splat(scale, PAGE), out, 4 * PAGE * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


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


@kernel
def unpack_values(page: Any, kind: int, out: Any) -> None:
    """A page of values as float32, in the order of a page of float32: [16 * head_dim]."""
    if kind == KEPT_Q80:
        for block in range(out.size // (32 * PAGE)):
            part = page[_BLOCK_BYTES * block :]
            scales = _halves(part, 1, PAGE)
            for lane in range(PAGE):
                values = address_of(part) + 2 * PAGE + 32 * lane
                target = address_of(out) + 4 * PAGE * (32 * block + lane)
                _unpack_values_q80(values, half_to_float(scales[0, lane]), target)
    else:
        unpack_numbers(page, kind, out)


@intrinsic
def _turn_q80(typingctx, page, blocks, out):
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
def turn_keys(page: Any, kind: int, n: int, out: Any) -> None:
    """The first n numbers of a page of keys as float32, in the order of a page of values.

    `n` is a multiple of 16, and of 32 for Q80; `out` is [16 * n] float32.
    """
    if kind == KEPT_Q80:
        _turn_q80(address_of(page), n // 32, address_of(out))
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

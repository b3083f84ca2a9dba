"""The compiled side of `pages`: keys and values are stored, and pages unpacked."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from pyllama_kernels.halves import float_to_half, half_to_float
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
from pyllama_kernels.simd import I8, I32, Asm, Value

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

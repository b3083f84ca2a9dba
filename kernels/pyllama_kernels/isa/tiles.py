"""AMX's tile registers: each holds 16 rows of 64 bytes, and multiplies bf16 numbers as matrices.

    tile of      its row        the 64 bytes of a row
    ----------------------------------------------------------------------------
    activations  row of batch   inputs 0 to 31, bf16
    weights      inputs 2k,     two bf16 for each of 16 rows of weights
                 2k + 1
    sums         row of batch   one float32 for each of 16 rows of weights

A tile of activations or weights covers one block of inputs. In memory two of them lie side by side
for each block, so that a step of `multiply` reads 2 KiB here and 2 KiB there for 32 x 32 sums.

Each function is one loop of machine code. Addresses and counts are int64.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pyllama_kernels.layout import BLOCK, GROUP, GROUP_BYTES, ROW_BYTES, TILE_ROWS
from pyllama_kernels.simd import F32, I8, I16, I32, I64, VOID, Asm, Value

TILE = 1024  # bytes of a register, which has as many rows as a tile of a batch
SIDE = 2 * TILE_ROWS  # rows of the batch, and rows of weights, that `multiply` takes

_ROW = TILE // TILE_ROWS  # bytes
_SUMS, _ACTIVATIONS, _WEIGHTS = range(4), range(4, 6), range(6, 8)  # registers
_FLOATS, _WORDS = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
_AHEAD = 2048  # bytes from a weight that is read to the one that is asked for

# Palette 1, then at byte 16 the bytes of a row and at byte 48 the rows, of eight registers.
_SHAPES = bytes([1, *[0] * 15, *[_ROW, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8])


@intrinsic
def configure(typingctx):
    """Gives the registers their shape; nothing else here works before."""

    def codegen(context, builder, signature, args):
        shapes = cgutils.global_constant(builder, "tile_shapes", cgutils.make_bytearray(_SHAPES))
        asm = Asm(builder)
        place = Value(asm, builder.bitcast(shapes, I8.as_pointer()))
        asm.call("llvm.x86.ldtilecfg", VOID, place)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release(typingctx):
    """Gives the registers back: the system need not save them any longer."""

    def codegen(context, builder, signature, args):
        Asm(builder).call("llvm.x86.tilerelease", VOID)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def activations_to_bf16(typingctx, tile, rows, blocks, target):
    """Blocks of a tile of so many rows of a batch (see `layout`) to bf16.

    `target` is where the first block's register goes; the next one's goes two registers further.
    """

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        x, rows, n_blocks, to = (Value(asm, value) for value in args)
        with asm.loop(n_blocks) as block:
            x_block = x + rows * block * asm.constant(I64, ROW_BYTES)
            scales = x_block.plus(rows, BLOCK)
            to_block = to.plus(block, 2 * TILE)
            with asm.loop(rows) as row:
                values = asm.load(ir.VectorType(I8, BLOCK), x_block.plus(row, BLOCK))
                scale = asm.splat(asm.load(F32, scales.plus(row, 4)), 16)
                even, odd = (
                    values.part(*range(k, 32, 2)).widened(_WORDS, signed=True).as_floats() * scale
                    for k in range(2)
                )
                asm.store(_pairs(asm, even, odd), to_block.plus(row, _ROW))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def weights_to_bf16(typingctx, group, blocks, target):
    """Blocks of a group of 16 rows of weights (see `layout`) to bf16; `target` likewise."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        w, n_blocks, to = (Value(asm, value) for value in args)
        with asm.loop(n_blocks) as block:
            w_block = w.plus(block, GROUP_BYTES)
            to_block = to.plus(block, 2 * TILE)
            for line in range(0, GROUP_BYTES, 64):
                asm.prefetch(w_block, _AHEAD + line)
            scale = asm.load(ir.VectorType(I16, GROUP), w_block).halves_as_floats()
            start = scale * asm.constant(_FLOATS, -136.0)
            for line in range(4):
                quads = asm.load(_WORDS, w_block, 2 * GROUP + 64 * line)
                for high in range(2):
                    values = [_nibbles(asm, quads, 8 * i + 4 * high) for i in range(4)]
                    # A nibble q became 128 + q, and 136 is 128 + 8: exact, whatever the scale.
                    a, b, c, d = (asm.fused(value, scale, start) for value in values)
                    row = 8 * high + 2 * line
                    asm.store(_pairs(asm, a, b), to_block, _ROW * row)
                    asm.store(_pairs(asm, c, d), to_block, _ROW * (row + 1))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _nibbles(asm: Asm, quads: Value, place: int) -> Value:
    """128 + q as float32, of the nibble at this bit of each word.

    128 has the exponent with which bit 16 of a float32 counts 1: no conversion is needed.
    """
    shift = asm.constant(_WORDS, abs(16 - place))
    moved = quads << shift if place < 16 else quads >> shift
    nibble = moved & asm.constant(_WORDS, 0xF0000)
    return (nibble | asm.constant(_WORDS, 0x43000000)).bits_as(_FLOATS)


def _pairs(asm: Asm, even: Value, odd: Value) -> Value:
    """Each two float32 as bf16 in one word, rounded to nearest, halves away from zero."""
    half = asm.constant(_WORDS, 0x8000)
    low, high = (value.bits_as(_WORDS) + half for value in (even, odd))
    return (low >> asm.constant(_WORDS, 16)) | (high & asm.constant(_WORDS, -0x10000))


def _multiplier(fresh: bool):
    @intrinsic
    def multiply(typingctx, activations, weights, blocks, sums):
        def codegen(context, builder, signature, args):
            asm = Asm(builder)
            x, w, n_blocks, out = (Value(asm, value) for value in args)
            for i, tile in enumerate(_SUMS):
                if fresh:
                    asm.call("llvm.x86.tilezero", VOID, asm.constant(I8, tile))
                else:
                    _move(asm, "tileloadd64", tile, out, i)
            with asm.loop(n_blocks) as block:
                for i, tile in enumerate(_ACTIVATIONS):
                    _move(asm, "tileloadd64", tile, x.plus(block, 2 * TILE), i)
                for i, tile in enumerate(_WEIGHTS):
                    _move(asm, "tileloadd64", tile, w.plus(block, 2 * TILE), i)
                for i, tile in enumerate(_SUMS):
                    factors = _ACTIVATIONS[i // 2], _WEIGHTS[i % 2]
                    registers = (asm.constant(I8, number) for number in (tile, *factors))
                    asm.call("llvm.x86.tdpbf16ps", VOID, *registers)
            for i, tile in enumerate(_SUMS):
                _move(asm, "tilestored64", tile, out, i)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return multiply


def _move(asm: Asm, how: str, tile: int, address: Value, place: int) -> None:
    """A register from or to the place of that number in a row of tiles."""
    at = asm.builder.inttoptr(address.plus(place, TILE).llvm, I8.as_pointer())
    stride = asm.constant(I64, _ROW)
    asm.call(f"llvm.x86.{how}", VOID, asm.constant(I8, tile), Value(asm, at), stride)


# 32 rows of a batch times 32 rows of weights, over some blocks: (activations, weights, blocks,
# sums). The four tiles of sums are those of rows 0 to 15 of the batch, then those of 16 to 31.
multiply_first = _multiplier(fresh=True)  # from zero
multiply_more = _multiplier(fresh=False)  # from what the sums are


@intrinsic
def add_16(typingctx, a, b, out):
    """Sixteen float32 plus sixteen others, at three addresses."""

    def codegen(context, builder, signature, args):
        asm = Asm(builder)
        left, right, to = (Value(asm, value) for value in args)
        asm.store(asm.load(_FLOATS, left) + asm.load(_FLOATS, right), to)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen

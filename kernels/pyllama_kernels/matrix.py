"""The product with Q80 activations, written once; an instruction set supplies its dot products.

A *tile* is the innermost loop: 16 rows of weights times 1 to 16 rows of a batch, over all blocks of
inputs. Its sums stay in registers. See `layout` for what lies where.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba import carray, float32, types
from numba.extending import intrinsic

from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.layout import GROUP, GROUP_BYTES, ROW_BYTES, TILE_ROWS, tile_rows
from pyllama_kernels.lowlevel import address_of, float32_pointer, stack
from pyllama_kernels.simd import F32, I8, I16, I32, I64, Asm, Value

# Prefetch distance in bytes, and the cache level that it goes to (see
# `Asm.prefetch`). Measured: on Zen 4, 2 KiB costs 4 to 9 % against 1; on Zen 5, 4 KiB gains 9 % on
# 1, and to leave the second level to the small ops' memory 2 to 4 % more; Intel needs 2 KiB to
# reach what memory can give, and there the same hint halves it.
_AHEAD, _WHERE = {"znver4": (1024, 2), "znver5": (4096, 0)}.get(
    binding.get_host_cpu_name(), (2048, 2)
)
_NEAR = 1 << 19  # bytes: half of the second-level cache of what is common today
_SUMS_BYTES = 4 * TILE_ROWS * GROUP


@dataclass(frozen=True)
class InstructionSet:
    """The part of this product that depends on the CPU.

    Its `Dots` add up inputs: of (asm, quads, x, start), `quads` are vectors of bytes, each with the
    next four inputs of `lanes` rows of weights; `x` is the address of the int8 that they meet;
    `start` are the `lanes` int32 to which the products are added. An instruction may want its bytes
    without sign: then `start` makes up for what was added to them.
    """

    name: str
    features: tuple[str, ...]  # LLVM's names of what the CPU must have
    lanes: int  # rows of weights in a vector
    sums: int  # vectors of sums that fit into registers beside the rest
    nibble_dots: "Dots"  # bytes 0 to 15, which stand for -8 to 7
    byte_dots: "Dots"  # bytes -127 to 127, plus the bias
    bias: int = 0
    halves: bool = True  # float16 is converted in hardware


Dots = Callable[[Asm, Sequence[Value], Value, Value], Value]


def _nibbles(isa: InstructionSet, asm: Asm, block: Value, v: int) -> list[Value]:
    """The eight quads of a block, for vector number v of the 16 rows."""
    bytes_, words = ir.VectorType(I8, 4 * isa.lanes), ir.VectorType(I16, 2 * isa.lanes)
    mask, four = asm.constant(bytes_, 15), asm.constant(words, 4)
    lines = [asm.load(bytes_, block, 2 * GROUP + 64 * i + 4 * isa.lanes * v) for i in range(4)]
    low = [line & mask for line in lines]
    high = [(line.bits_as(words) >> four).bits_as(bytes_) & mask for line in lines]
    return low + high


def make_matmul_q40(isa: InstructionSet) -> Any:
    """The kernel for an instruction set. Arguments: see `reference.matmul_q40`."""
    tile_1, tile_4, tile_8, tile_16 = (_make_tile(isa, rows) for rows in (1, 4, 8, 16))

    @exact_kernel  # the same sums, to the bit, with every instruction set
    def matmul(activations: Any, rows: int, weight: Any, bias: Any, out: Any) -> None:
        groups, blocks, _ = weight.shape
        m = out.shape[1]
        sums = stack(_SUMS_BYTES)
        found = carray(float32_pointer(sums), (TILE_ROWS, GROUP))
        row_bytes = blocks * ROW_BYTES
        # So many rows stay in the second-level cache while all the weights pass by.
        at_once = TILE_ROWS * max(1, _NEAR // (TILE_ROWS * max(1, row_bytes)))
        for first in range(0, rows, at_once):
            for group in range(groups):
                w = address_of(weight) + group * blocks * GROUP_BYTES
                for row in range(first, min(rows, first + at_once), TILE_ROWS):
                    x = address_of(activations) + row * row_bytes
                    t = tile_rows(rows - row)
                    if t == 1:
                        tile_1(w, x, blocks, sums, 4 * GROUP)
                    elif t == 4:
                        tile_4(w, x, blocks, sums, 4 * GROUP)
                    elif t == 8:
                        tile_8(w, x, blocks, sums, 4 * GROUP)
                    else:
                        tile_16(w, x, blocks, sums, 4 * GROUP)
                    for i in range(min(t, rows - row)):
                        for j in range(min(GROUP, m - GROUP * group)):
                            start = bias[GROUP * group + j] if bias.size else float32(0)
                            out[row + i, GROUP * group + j] = found[i, j] + start

    return matmul


def _make_tile(isa: InstructionSet, rows: int) -> Any:
    """An intrinsic: 16 interleaved rows times a tile of so many rows of activations.

    Its arguments are addresses and sizes: the rows, the activations, the number of blocks of
    inputs, and where the sums go, [rows, 16] float32 with so many bytes from row to row.
    """

    @intrinsic
    def tile(typingctx, weights, activations, blocks, sums, stride):
        def codegen(context, builder, signature, args):
            asm = Asm(builder)
            w, x, n_blocks, out, stride = (Value(asm, value) for value in args)
            vectors = GROUP // isa.lanes
            at_once = min(rows, max(1, isa.sums // vectors))
            for first in range(0, rows, at_once):
                chunk = range(first, first + at_once)
                zero = asm.constant(ir.VectorType(F32, isa.lanes), 0.0)
                totals = {(t, v): asm.variable(zero) for t in chunk for v in range(vectors)}
                with asm.loop(n_blocks) as block:
                    w_block = w.plus(block, GROUP_BYTES)
                    x_block = x.plus(block, ROW_BYTES * rows)
                    if first == 0:
                        for line in range(0, GROUP_BYTES, 64):
                            asm.prefetch(w_block, _AHEAD + line, _WHERE)
                    for v in range(vectors):
                        halves = asm.load(ir.VectorType(I16, isa.lanes), w_block, 2 * isa.lanes * v)
                        scale = halves.halves_as_floats(isa.halves)
                        quads = _nibbles(isa, asm, w_block, v)
                        for t in chunk:
                            x_scale = asm.load(F32, x_block, 32 * rows + 4 * t)
                            offset = asm.splat(asm.load(I32, x_block, 36 * rows + 4 * t), isa.lanes)
                            dots = isa.nibble_dots(asm, quads, x_block.plus(32 * t), offset)
                            factor = scale * asm.splat(x_scale, isa.lanes)
                            total = totals[t, v]
                            total.set(asm.fused(dots.as_floats(), factor, total.get()))
                for (t, v), total in totals.items():
                    row = out + stride * asm.constant(I64, t)
                    asm.store(total.get(), row, 4 * isa.lanes * v)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return tile

"""Products of whole bytes: 4 rows of activations with groups of 16 interleaved rows.

What attention over a Q80 cache is made of. A tile of 4 queries meets two groups at once, so that
each load serves several products: two pages of keys give the scores of 32 positions; two groups of
transposed values (see `latent`) give 32 numbers of the result.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyllama_kernels import cpu
from pyllama_kernels.layout import GROUP, ROW_BYTES
from pyllama_kernels.matrix import InstructionSet
from pyllama_kernels.simd import F32, I8, I16, I32, I64, Asm, Value

TILE = 4  # rows of activations
TILE_BYTES = TILE * ROW_BYTES  # of a tile in one block of inputs: see `layout`

ISA: InstructionSet = cpu.compiled().ISA


def with_bias(quad: Value) -> Value:
    """Bytes with a sign as the instruction set wants them: see `InstructionSet`."""
    return quad ^ quad.asm.constant(quad.type, -ISA.bias) if ISA.bias else quad


def _make_tile(groups: int, *, keys: bool) -> Any:
    """An intrinsic that adds to [4, 16 * groups] float32. Its arguments are addresses and sizes.

    They are the first group, bytes from one group to the next, the activations, blocks of inputs,
    the sums, bytes from one row of sums to the next; and what to prefetch meanwhile: an address,
    and lines of 64 bytes for each block.

    Args:
        groups: that are multiplied together.
        keys: a group is a page of keys, with scales; otherwise bytes that have their bias.
    """
    cell, head = (34 * GROUP, 2 * GROUP) if keys else (32 * GROUP, 0)

    @intrinsic
    def tile(typingctx, first, apart, activations, blocks, sums, stride, ahead, lines):
        def codegen(context, builder, signature, args):
            asm = Asm(builder)
            values = [Value(asm, value) for value in args]
            first, apart, activations, blocks, sums, stride, ahead, lines = values
            lanes = ISA.lanes
            floats, bytes_ = ir.VectorType(F32, lanes), ir.VectorType(I8, 4 * lanes)
            each = [(t, g) for t in range(TILE) for g in range(groups)]
            for part in range(GROUP // lanes):
                places = {
                    (t, g): (sums + stride * asm.constant(I64, t)).plus(
                        4 * GROUP * g + 4 * lanes * part
                    )
                    for t, g in each
                }
                totals = {key: asm.variable(asm.load(floats, places[key])) for key in each}
                with asm.loop(blocks) as block:
                    x = activations.plus(block, TILE_BYTES)
                    rows = [
                        (first + apart * asm.constant(I64, g)).plus(block, cell)
                        for g in range(groups)
                    ]
                    if part == 0:
                        with asm.loop(lines) as line:
                            asm.prefetch(ahead.plus(block * lines + line, 64), 0)
                    dots = {}
                    for t, g in each:
                        offset = asm.splat(asm.load(I32, x, 36 * TILE + 4 * t), lanes)
                        dots[t, g] = offset * asm.constant(offset.type, ISA.bias // 8)
                    for i in range(8):
                        for g, row in enumerate(rows):
                            quad = asm.load(bytes_, row, head + 64 * i + 4 * lanes * part)
                            quad = with_bias(quad) if keys else quad
                            for t in range(TILE):
                                inputs = x.plus(32 * t + 4 * i)
                                dots[t, g] = ISA.byte_dots(asm, [quad], inputs, dots[t, g])
                    for t, g in each:
                        scale = asm.splat(asm.load(F32, x, 32 * TILE + 4 * t), lanes)
                        if keys:
                            halves = ir.VectorType(I16, lanes)
                            kept = asm.load(halves, rows[g], 2 * lanes * part)
                            scale *= kept.halves_as_floats(ISA.halves)
                        total = totals[t, g]
                        total.set(asm.fused(dots[t, g].as_floats(), scale, total.get()))
                for key in each:
                    asm.store(totals[key].get(), places[key])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


two_pages = _make_tile(2, keys=True)
one_page = _make_tile(1, keys=True)
two_transposed = _make_tile(2, keys=False)

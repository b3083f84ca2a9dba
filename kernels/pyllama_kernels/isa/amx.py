"""AMX: Intel's server CPUs since Sapphire Rapids (2023).

A tile instruction multiplies 16 x 32 with 32 x 16 bf16 numbers and adds to 16 x 16 float32. A scale
for every 32 inputs would break up the sums, so weights and activations are scaled and rounded to
bf16 (8 significant bits) first, and a sum runs over all inputs. See `tiles` for the layout.

Each weight is unpacked once for 512 rows of the batch. Cache blocking: 256 rows of weights x 512
inputs stay in the second-level cache, 32 rows of the batch x 512 inputs in the first-level one.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numba import carray, float32

from pyllama_kernels.isa import avx512_vnni
from pyllama_kernels.isa.tiles import (
    SIDE,
    TILE,
    activations_to_bf16,
    add_16,
    configure,
    multiply_first,
    multiply_more,
    release,
    weights_to_bf16,
)
from pyllama_kernels.jit import kernel
from pyllama_kernels.layout import GROUP, GROUP_BYTES, ROW_BYTES, TILE_ROWS, tile_rows
from pyllama_kernels.lowlevel import address_of, float32_pointer, stack

ISA = replace(
    avx512_vnni.ISA,
    name="amx",
    features=(*avx512_vnni.ISA.features, "amx-tile", "amx-bf16"),
)

# Rows from which on tiles pay: VNNI multiplies 24, as 16 and 8, in 0.85 of the time, but takes as
# long for 25 as for 32.
LEAST = 25
_ROWS = 512  # of the batch at a time
_GROUPS = 16  # of weights at a time
_BLOCKS = 16  # of inputs at a time
_PANELS = _GROUPS * GROUP // SIDE
_STARTS_BYTES = 4 * _GROUPS * GROUP


@kernel
def matmul_q40(activations: Any, rows: int, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_q40`. The values of a row of `out` lie side by side."""
    if rows < LEAST:
        avx512_vnni.matmul_q40(activations, rows, weight, bias, out)
        return
    blocks = weight.shape[1]
    pairs = (min(rows, _ROWS) + SIDE - 1) // SIDE
    tiles = 2 * pairs * blocks + _GROUPS * _BLOCKS + 4 * pairs * _PANELS
    scratch = np.empty(tiles * TILE + 64, np.uint8)
    configure()
    for first in range(0, rows, _ROWS):
        last = min(rows, first + _ROWS)
        _multiply(activations[first * blocks * ROW_BYTES :], weight, bias, out[first:last], scratch)
    release()


@kernel
def _multiply(activations: Any, weight: Any, bias: Any, out: Any, scratch: Any) -> None:
    """`matmul_q40` for `_ROWS` rows at most."""
    rows = out.shape[0]
    groups, blocks, _ = weight.shape
    pairs = (rows + SIDE - 1) // SIDE
    x = (address_of(scratch) + 63) // 64 * 64  # [pairs, blocks, 2] tiles
    w = x + 2 * pairs * blocks * TILE  # [_PANELS, _BLOCKS, 2] tiles
    sums = w + _GROUPS * _BLOCKS * TILE  # [pairs, _PANELS, 4] tiles

    # What lies after the last row is multiplied too, but nobody reads that.
    for row in range(0, rows, TILE_ROWS):
        source = address_of(activations) + row * blocks * ROW_BYTES
        target = x + (row // SIDE * 2 * blocks + row // TILE_ROWS % 2) * TILE
        activations_to_bf16(source, tile_rows(rows - row), blocks, target)

    for first in range(0, groups, _GROUPS):
        count = min(_GROUPS, groups - first)
        for block in range(0, max(1, blocks), _BLOCKS):  # without inputs, sums are zeros
            length = min(_BLOCKS, blocks - block)
            for i in range(count):
                source = address_of(weight) + ((first + i) * blocks + block) * GROUP_BYTES
                weights_to_bf16(source, length, w + (i // 2 * 2 * _BLOCKS + i % 2) * TILE)
            for pair in range(pairs):
                for panel in range((count + 1) // 2):
                    x_tiles = x + (pair * blocks + block) * 2 * TILE
                    w_tiles = w + panel * _BLOCKS * 2 * TILE
                    found = sums + (pair * _PANELS + panel) * 4 * TILE
                    if block == 0:
                        multiply_first(x_tiles, w_tiles, length, found)
                    else:
                        multiply_more(x_tiles, w_tiles, length, found)
        start, stop = first * GROUP, min(out.shape[1], (first + count) * GROUP)
        _hand_out(sums, bias[start:stop], out[:, start:stop])


@kernel
def _hand_out(sums: int, bias: Any, out: Any) -> None:
    """Sums of `_GROUPS` groups at most, plus bias, to where they belong.

    Row by row: rows may lie a multiple of 4 KiB apart, and then tile by tile would ask one set of
    the cache for 32 lines.
    """
    rows, m = out.shape
    starts = carray(float32_pointer(stack(_STARTS_BYTES)), (_GROUPS * GROUP,))
    for j in range(m):
        starts[j] = bias[j] if bias.size else float32(0)
    whole = m // GROUP
    for row in range(rows):
        found = sums + (row // SIDE * _PANELS * 4 + row // TILE_ROWS % 2 * 2) * TILE
        found += row % TILE_ROWS * 4 * GROUP
        place = address_of(out) + row * out.strides[0]
        for i in range(whole):
            tile = i // 2 * 4 + i % 2
            add_16(found + tile * TILE, address_of(starts) + 4 * i * GROUP, place + 4 * i * GROUP)
        last = carray(float32_pointer(found + (whole // 2 * 4 + whole % 2) * TILE), (GROUP,))
        for j in range(whole * GROUP, m):
            out[row, j] = last[j - whole * GROUP] + starts[j]

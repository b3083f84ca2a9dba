"""How the matrix kernels want their memory: weights in groups of 16 rows, activations in tiles.

Weights. Sixteen rows lie interleaved, so that one load brings the same four inputs of each row:

    group of 16 rows, 32 inputs: 288 bytes
    +----------------+---------------+---------------+---------------+---------------+
    | 16 scales, f16 | inputs 0-3    | inputs 4-7    | inputs 8-11   | inputs 12-15  | low nibbles
    |                | and 16-19     | and 20-23     | and 24-27     | and 28-31     | high nibbles
    +----------------+---------------+---------------+---------------+---------------+
      32 bytes         64 bytes: 4 of row 0, 4 of row 1, ... 4 of row 15

The bytes are those of a `.m` file's Q40 blocks, in another order; a matrix whose rows are no
multiple of 16 is filled up with zeros. The groups of a matrix lie one after the other, and within a
group the blocks, so that a kernel reads one stream from the first byte to the last.

Activations. The rows of a batch are cut into tiles of 16 rows; the last tile has 1, 4, 8 or 16, as
few as hold the rows that are left (`tile_rows`):

    tile of T rows, 32 inputs: 40 * T bytes
    +------------------+------------------+-----+------------------+-------------+--------------+
    | 32 int8 of row 0 | 32 int8 of row 1 | ... | of row T-1       | T scales    | T offsets    |
    +------------------+------------------+-----+------------------+-------------+--------------+
      32 bytes each                                                  float32       int32

Rows that a tile has beyond those of the batch have scales of 0. What else lies there is multiplied
too, and nobody reads the sums; but with scales left over from other data they would be denormal
numbers, or not finite, which makes a CPU several times slower.

A nibble q stands for q - 8. The kernels multiply with q as it is and start from the offset, which
is -8 times the sum of the row's 32 values.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.extending import register_jitable

from pyllama_kernels.blocks import BLOCK, Q40_BYTES
from pyllama_kernels.jit import kernel

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

GROUP = 16  # rows of weights that lie interleaved
GROUP_BYTES = GROUP * Q40_BYTES  # of a group of rows in one block of inputs
ROW_BYTES = BLOCK + 8  # of a row of activations in one block: values, scale, offset
TILE_ROWS = 16  # of every tile of a batch but the last one


@register_jitable
def packed_rows(rows: int) -> int:
    """Rows of a packed matrix: a multiple of `GROUP`."""
    return -(-rows // GROUP) * GROUP


def pack_weights(blocks: U8) -> U8:
    """Q40 blocks in the order of a file to groups of 16 rows.

    Args:
        blocks: [rows, n / 32, 18] uint8.

    Returns:
        [groups, n / 32, 288] uint8.
    """
    rows, n_blocks, _ = blocks.shape
    filled = np.zeros((packed_rows(rows), n_blocks, Q40_BYTES), np.uint8)
    filled[:rows] = blocks
    groups = len(filled) // GROUP
    by_group = filled.reshape(groups, GROUP, n_blocks, Q40_BYTES)
    scales = by_group[..., :2].transpose(0, 2, 1, 3)  # [groups, blocks, rows, 2]
    quads = by_group[..., 2:].reshape(groups, GROUP, n_blocks, 4, 4)
    lines = quads.transpose(0, 2, 3, 1, 4)  # [groups, blocks, lines, rows, 4]
    packed = np.empty((groups, n_blocks, GROUP_BYTES), np.uint8)
    packed[..., : 2 * GROUP] = scales.reshape(groups, n_blocks, 2 * GROUP)
    packed[..., 2 * GROUP :] = lines.reshape(groups, n_blocks, 16 * GROUP)
    return packed


def unpack_weights(packed: U8) -> U8:
    """The inverse of `pack_weights`, with the rows that were filled up."""
    groups, n_blocks, _ = packed.shape
    blocks = np.empty((groups, GROUP, n_blocks, Q40_BYTES), np.uint8)
    scales = packed[..., : 2 * GROUP].reshape(groups, n_blocks, GROUP, 2)
    lines = packed[..., 2 * GROUP :].reshape(groups, n_blocks, 4, GROUP, 4)
    blocks[..., :2] = scales.transpose(0, 2, 1, 3)
    blocks[..., 2:] = lines.transpose(0, 3, 1, 2, 4).reshape(groups, GROUP, n_blocks, 16)
    return blocks.reshape(groups * GROUP, n_blocks, Q40_BYTES)


@kernel
def pack_weights_in_place(words: Any, n_blocks: int, spare: Any) -> None:
    """`pack_weights` where the blocks lie, group by group.

    Args:
        words: [groups * n_blocks * 144] uint16: the blocks of a whole number of groups, two bytes
            to a word; a block is a scale and eight words of nibbles.
        n_blocks: blocks in a row.
        spare: uint16, at least n_blocks * 144: room for one group.
    """
    size = n_blocks * 144
    for start in range(0, words.size, size):
        for i in range(size):
            spare[i] = words[start + i]
        for row in range(GROUP):
            for block in range(n_blocks):
                source = (row * n_blocks + block) * 9
                target = start + block * 144
                words[target + row] = spare[source]
                for line in range(4):
                    place = target + 16 + 32 * line + 2 * row
                    words[place] = spare[source + 1 + 2 * line]
                    words[place + 1] = spare[source + 2 + 2 * line]


@register_jitable
def tile_rows(rows: int) -> int:
    """Rows of the tile that comes next, where so many rows of a batch are left."""
    if rows <= 1:
        return rows
    if rows <= 4:
        return 4
    return 8 if rows <= 8 else TILE_ROWS


@register_jitable
def padded_rows(rows: int) -> int:
    """Rows of all tiles of a batch of so many rows."""
    whole = rows // TILE_ROWS * TILE_ROWS
    return whole + tile_rows(rows - whole)


@register_jitable
def activation_bytes(rows: int, n: int) -> int:
    """Bytes of the activations of a batch of so many rows of n values."""
    return padded_rows(rows) * (n // BLOCK) * ROW_BYTES


@register_jitable
def cell_of(row: int, rows: int, block: int, blocks: int) -> tuple[int, int, int]:
    """One block of the tile that a row lies in: bytes before it, rows of the tile, the row's place.

    Args:
        row: of the batch.
        rows: of the batch.
        block: of inputs.
        blocks: of inputs.
    """
    place = row % TILE_ROWS
    first = row - place
    t = tile_rows(rows - first)
    return (first * blocks + block * t) * ROW_BYTES, t, place


def pack_activations(values: npt.NDArray[np.int8], scales: F32, packed: U8) -> None:
    """Values and scales of a batch to tiles.

    Args:
        values: [rows, n] int8.
        scales: [rows, n / 32] float32.
        packed: uint8, at least the tiles of the batch; written.
    """
    rows, blocks = scales.shape
    by_block = values.reshape(rows, blocks, BLOCK)
    offsets = -8 * by_block.sum(axis=2, dtype=np.int32)
    for first, t, cells in _tiles(packed, rows, blocks):
        batch = slice(first, first + t)
        fields = (
            by_block[batch],
            scales[batch, :, None].astype("<f4").view(np.int8),
            offsets[batch, :, None].astype("<i4").view(np.int8),
        )
        at = 0
        for field in fields:  # [rows, blocks, bytes]
            count, _, size = field.shape
            filled = np.zeros((blocks, t, size), np.int8)
            filled[:, :count] = field.transpose(1, 0, 2)
            cells[:, at : at + t * size] = filled.reshape(blocks, t * size).view(np.uint8)
            at += t * size


def unpack_activations(packed: U8, rows: int, n: int) -> F32:
    """A batch as numbers, [rows, n] float32; the inverse of `pack_activations`."""
    blocks = n // BLOCK
    by_row = np.empty((padded_rows(rows), n), np.float32)
    for first, t, cells in _tiles(packed, rows, blocks):
        values = cells[:, : BLOCK * t].view(np.int8).reshape(blocks, t, BLOCK)
        scales = np.ascontiguousarray(cells[:, BLOCK * t : (BLOCK + 4) * t]).view("<f4")
        numbers = values * scales[..., None]  # [blocks, t, 32] float32
        by_row[first : first + t] = numbers.transpose(1, 0, 2).reshape(t, n)
    return by_row[:rows]


def _tiles(packed: U8, rows: int, blocks: int) -> Iterator[tuple[int, int, U8]]:
    """The tiles of a batch: the first row, how many, and memory, [blocks, bytes] uint8."""
    for first in range(0, rows, TILE_ROWS):
        t = tile_rows(rows - first)
        start, size = first * blocks * ROW_BYTES, t * ROW_BYTES
        yield first, t, packed[start : start + blocks * size].reshape(blocks, size)

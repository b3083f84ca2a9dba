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

Activations. The rows of a batch are cut into tiles of 1, 4 or 16 rows (`tile_rows`):

    tile of T rows, 32 inputs: 40 * T bytes
    +------------------+------------------+-----+------------------+-------------+--------------+
    | 32 int8 of row 0 | 32 int8 of row 1 | ... | of row T-1       | T scales    | T offsets    |
    +------------------+------------------+-----+------------------+-------------+--------------+
      32 bytes each                                                  float32       int32

A nibble q stands for q - 8. The kernels multiply with q as it is and start from the offset, which
is -8 times the sum of the row's 32 values.
"""

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
    """Rows of a tile for a batch of so many rows."""
    if rows == 1:
        return 1
    return 4 if rows <= 4 else 16


def pack_activations(values: npt.NDArray[np.int8], scales: F32, packed: U8) -> None:
    """Values and scales of a batch to tiles.

    Args:
        values: [rows, n] int8.
        scales: [rows, n / 32] float32.
        packed: uint8, at least the tiles of the batch; written.
    """
    rows, blocks = scales.shape
    t = tile_rows(rows)
    tiles = -(-rows // t)
    filled = np.zeros((tiles * t, blocks, ROW_BYTES), np.uint8)
    by_block = values.reshape(rows, blocks, BLOCK)
    filled[:rows, :, :BLOCK] = by_block.view(np.uint8)
    filled[:rows, :, BLOCK : BLOCK + 4] = scales[:, :, None].astype("<f4").view(np.uint8)
    offsets = -8 * by_block.sum(axis=2, dtype=np.int32)
    filled[:rows, :, BLOCK + 4 :] = offsets[:, :, None].astype("<i4").view(np.uint8)
    cells = filled.reshape(tiles, t, blocks, ROW_BYTES).transpose(0, 2, 1, 3)
    parts = np.split(cells, [BLOCK, BLOCK + 4], axis=3)  # each [tiles, blocks, t, bytes]
    flat = np.concatenate(
        [part.reshape(tiles, blocks, t * part.shape[3]) for part in parts], axis=2
    )
    packed[: flat.size] = flat.reshape(-1)


@register_jitable
def activation_bytes(rows: int, n: int) -> int:
    """Bytes of the activations of a batch of so many rows of n values."""
    t = tile_rows(rows)
    return -(-rows // t) * t * (n // BLOCK) * ROW_BYTES


def unpack_activations(packed: U8, rows: int, n: int) -> F32:
    """A batch as numbers, [rows, n] float32; the inverse of `pack_activations`."""
    t, blocks = tile_rows(rows), n // BLOCK
    tiles = -(-rows // t)
    cells = packed[: tiles * blocks * ROW_BYTES * t].reshape(tiles, blocks, ROW_BYTES * t)
    values = cells[..., : BLOCK * t].view(np.int8).reshape(tiles, blocks, t, BLOCK)
    scales = np.ascontiguousarray(cells[..., BLOCK * t : (BLOCK + 4) * t]).view("<f4")
    numbers = values * scales[..., None]  # [tiles, blocks, t, 32] float32
    by_row: F32 = numbers.transpose(0, 2, 1, 3).reshape(tiles * t, n)
    return by_row[:rows]

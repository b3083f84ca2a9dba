"""The paged KV cache: pages of 16 positions, as float32, float16 or Q80.

A page of keys holds the 16 positions side by side, so that one vector load reads one value of each
position, and the scores of 16 positions need no sum across lanes. A page of values holds 16 values
of each position after the other, so that a position's values are added to the result as vectors.
Both are read sequentially.

    float32, float16     keys:   [head_dim][16 positions]
                         values: [head_dim / 16][16 positions][16], the last one may be narrower
    Q80, for each 32 of head_dim: 16 scales as float16, then
                         keys:   [8][16 positions][4] int8, as 16 rows of weights lie
                         values: [16 positions][32] int8

A cache is [n_blocks, kv_heads, BLOCK_PAGES, page bytes] uint8. A block holds the pages of some
positions that follow each other, for all key heads; a table, [n_seqs, blocks per sequence] int64,
maps the positions of a sequence to blocks and is -1 where none is allocated yet. So memory grows
with the positions in use, and sequences can share the blocks of a common prefix.

`cache` holds the compiled side; here are the sizes and the NumPy side.

Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
PagedAttention, 2023.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_kernels.blocks import quantize_q80

U8 = npt.NDArray[np.uint8]

PAGE = 16  # positions
KV_BLOCK = 128  # positions of a block; the softmax is updated once for each
BLOCK_PAGES = KV_BLOCK // PAGE
_LONGEST = 8  # rows of the longest context whose chunks can be parts of their own
CHUNK = 512  # positions whose sums are made from zero, then added to those before: whole blocks

# The dtype of a cache: distributed-llama's numbers of float types.
KEPT_F32, KEPT_F16, KEPT_Q80 = 0, 1, 3


def page_bytes(kind: int, head_dim: int) -> int:
    """Bytes of a page; head_dim must be a multiple of 32 for Q80."""
    row = {KEPT_F32: 4 * head_dim, KEPT_F16: 2 * head_dim, KEPT_Q80: head_dim // 32 * 34}[kind]
    return PAGE * row


def seq_blocks(seq_len: int) -> int:
    """Blocks of a sequence of so many positions."""
    return -(-seq_len // KV_BLOCK)


def count_cells(seq_len: int, max_rows: int) -> int:
    """How many chunks of rows, at most, are parts of their own: see `attention`."""
    return min(_LONGEST, max_rows) * -(-seq_len // CHUNK)


def pages_of(cache: U8, blocks: npt.NDArray[np.int64], head: int, count: int) -> U8:
    """The pages of a sequence's first positions, [pages, page bytes]: a copy.

    Args:
        cache: [n_blocks, kv_heads, BLOCK_PAGES, page bytes] uint8.
        blocks: the row of the table that belongs to the sequence.
        head: a key head.
        count: positions.
    """
    pages: U8 = cache[blocks[: seq_blocks(count)], head].reshape(-1, cache.shape[-1])
    return pages[: -(-count // PAGE)]


def write_position(
    page: U8, lane: int, x: npt.NDArray[np.float32], kind: int, *, lanes_last: bool
) -> None:
    """Writes one position of a page: `x` is [head_dim] float32; keys have their lanes last."""
    if kind == KEPT_Q80:
        blocks = quantize_q80(x).reshape(-1, 34)
        scales, values = _blocks_of(page, lanes_last)
        scales[:, lane] = blocks[:, :2].copy().view("<f2")[:, 0]
        values[:, lane] = blocks[:, 2:].view(np.int8).reshape(-1, 8, 4)
        return
    numbers = page.view("<f4" if kind == KEPT_F32 else "<f2")
    if lanes_last:
        numbers.reshape(-1, PAGE)[:, lane] = x
        return
    for start in range(0, len(x), PAGE):
        some = x[start : start + PAGE]
        part = numbers[PAGE * start : PAGE * (start + len(some))]
        part.reshape(PAGE, -1)[lane] = some


def read_positions(pages: U8, head_dim: int, kind: int, *, lanes_last: bool) -> Any:
    """All positions of some pages, [16 * pages, head_dim] float32."""
    count = len(pages)
    if kind == KEPT_Q80:
        numbers = np.empty((count, PAGE, head_dim), np.float32)
        for page, out in zip(pages, numbers, strict=True):
            scales, values = _blocks_of(page, lanes_last)
            scaled = values.reshape(-1, PAGE, 32) * scales.astype(np.float32)[:, :, None]
            out[:] = scaled.transpose(1, 0, 2).reshape(PAGE, head_dim)
        return numbers.reshape(-1, head_dim)
    flat = pages.view("<f4" if kind == KEPT_F32 else "<f2").astype(np.float32)
    if lanes_last:
        return flat.reshape(count, head_dim, PAGE).transpose(0, 2, 1).reshape(-1, head_dim)
    parts = [
        flat[:, PAGE * start : PAGE * min(start + PAGE, head_dim)].reshape(count * PAGE, -1)
        for start in range(0, head_dim, PAGE)
    ]
    return np.concatenate(parts, axis=1)


def _blocks_of(page: U8, lanes_last: bool) -> tuple[Any, Any]:
    """Views of a Q80 page: scales [blocks, 16] float16, values [blocks, 16, 8, 4] int8."""
    parts = page.reshape(-1, PAGE * 34)
    values = parts[:, 2 * PAGE :].view(np.int8)
    if lanes_last:
        return parts[:, : 2 * PAGE].view("<f2"), values.reshape(-1, 8, PAGE, 4).transpose(
            0, 2, 1, 3
        )
    return parts[:, : 2 * PAGE].view("<f2"), values.reshape(-1, PAGE, 8, 4)

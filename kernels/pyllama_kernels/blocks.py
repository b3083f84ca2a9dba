"""Q40 and Q80, the block formats of distributed-llama, byte for byte.

A block is 32 consecutive values of a row and one scale `d` in float16, little-endian:

- Q40, 18 bytes: `d`, then 16 bytes, of which byte j holds value j in its low half and value j + 16
  in its high half. A value is `(half - 8) * d`.
- Q80, 34 bytes: `d`, then 32 int8. A value is `q * d`.

The formulas are those of distributed-llama's converter (`converter/writer.py`) in float32. Neither
NaN nor infinity is looked for here: whoever reads the numbers from a file does that.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
Q40_BYTES = 18
Q80_BYTES = 34

# Blocks worked on at once: 128 KiB of float32, so that every pass over them meets the L2 cache.
_CHUNK = 1024


def quantize_q40(x: Floats) -> Bytes:
    """Q40 blocks of `x`.

    The value of largest magnitude becomes -8, so `d` has the opposite sign. Values are rounded by
    adding 8.5 and cutting off.

    Args:
        x: `[..., n]` float32, finite, n a multiple of 32.

    Returns:
        `[..., n // 32 * 18]` uint8.

    Raises:
        ValueError: n is not a multiple of 32.
    """
    groups, out = _groups(x, Q40_BYTES)
    for start in range(0, len(groups), _CHUNK):
        g, o = groups[start : start + _CHUNK], out[start : start + _CHUNK]
        low, high = _extremes(g)
        d: Floats = np.divide(np.where(-low > high, low, high), np.float32(-8))
        o[:, :2] = _half_bytes(d)
        q: Floats = np.multiply(g, _inverse(d)[:, None])
        q += np.float32(8.5)
        np.clip(q, 0, 15, out=q)
        halves = q.astype(np.uint8)
        np.left_shift(halves[:, 16:], 4, out=o[:, 2:])
        o[:, 2:] |= halves[:, :16]
    return out.reshape(*x.shape[:-1], x.shape[-1] // BLOCK * Q40_BYTES)


def quantize_q80(x: Floats) -> Bytes:
    """Q80 blocks of `x`, rounded half to even.

    Args:
        x: `[..., n]` float32, finite, n a multiple of 32.

    Returns:
        `[..., n // 32 * 34]` uint8.

    Raises:
        ValueError: n is not a multiple of 32.
    """
    groups, out = _groups(x, Q80_BYTES)
    for start in range(0, len(groups), _CHUNK):
        g, o = groups[start : start + _CHUNK], out[start : start + _CHUNK]
        low, high = _extremes(g)
        d: Floats = np.divide(np.maximum(np.abs(low), np.abs(high)), np.float32(127))
        o[:, :2] = _half_bytes(d)
        q: Floats = np.multiply(g, _inverse(d)[:, None])
        np.rint(q, out=q)
        o[:, 2:] = q.astype(np.int8).view(np.uint8)
    return out.reshape(*x.shape[:-1], x.shape[-1] // BLOCK * Q80_BYTES)


def dequantize_q40(blocks: Bytes) -> Floats:
    """Values of Q40 blocks.

    Args:
        blocks: `[..., m]` uint8, m a multiple of 18.

    Returns:
        `[..., m // 18 * 32]` float32.

    Raises:
        ValueError: m is not a multiple of 18.
    """
    rows, out = _blocks(blocks, Q40_BYTES)
    for start in range(0, len(rows), _CHUNK):
        b, o = rows[start : start + _CHUNK], out[start : start + _CHUNK]
        np.bitwise_and(b[:, 2:], 15, out=o[:, :16], casting="unsafe")
        np.right_shift(b[:, 2:], 4, out=o[:, 16:], casting="unsafe")
        o -= np.float32(8)
        o *= _scales(b)
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // Q40_BYTES * BLOCK)


def dequantize_q80(blocks: Bytes) -> Floats:
    """Values of Q80 blocks.

    Args:
        blocks: `[..., m]` uint8, m a multiple of 34.

    Returns:
        `[..., m // 34 * 32]` float32.

    Raises:
        ValueError: m is not a multiple of 34.
    """
    rows, out = _blocks(blocks, Q80_BYTES)
    for start in range(0, len(rows), _CHUNK):
        b, o = rows[start : start + _CHUNK], out[start : start + _CHUNK]
        np.multiply(b[:, 2:].view(np.int8), _scales(b), out=o)
    return out.reshape(*blocks.shape[:-1], blocks.shape[-1] // Q80_BYTES * BLOCK)


def _groups(x: Floats, block_bytes: int) -> tuple[Floats, Bytes]:
    """The values as `[blocks, 32]`, and room for their bytes, `[blocks, block_bytes]`."""
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"shape {x.shape}: the last axis is not whole blocks of {BLOCK}")
    groups = x.reshape(x.size // BLOCK, BLOCK)
    return groups, np.empty((len(groups), block_bytes), np.uint8)


def _blocks(blocks: Bytes, block_bytes: int) -> tuple[Bytes, Floats]:
    """The blocks as `[blocks, block_bytes]`, and room for their values, `[blocks, 32]`."""
    if blocks.ndim == 0 or blocks.shape[-1] % block_bytes:
        raise ValueError(f"shape {blocks.shape}: the last axis is not whole {block_bytes} bytes")
    rows = blocks.reshape(blocks.size // block_bytes, block_bytes)
    return rows, np.empty((len(rows), BLOCK), np.float32)


def _extremes(groups: Floats) -> tuple[Floats, Floats]:
    """Least and greatest value of each block, `[blocks]` each.

    Halves are folded over each other: NumPy reduces a short last axis several times slower.
    """
    low = np.minimum(groups[:, :16], groups[:, 16:])
    high = np.maximum(groups[:, :16], groups[:, 16:])
    for width in (8, 4, 2, 1):
        low = np.minimum(low[:, :width], low[:, width:])
        high = np.maximum(high[:, :width], high[:, width:])
    return low[:, 0], high[:, 0]


def _inverse(d: Floats) -> Floats:
    """1 / d, and 0 where d is 0 or so small that its inverse is no float32 any more."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Floats = np.divide(np.float32(1), d)
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half_bytes(d: Floats) -> Bytes:
    """`d` rounded to float16, as `[blocks, 2]` bytes."""
    with np.errstate(over="ignore", under="ignore"):
        return d.astype("<f2").view(np.uint8).reshape(-1, 2)


def _scales(blocks: Bytes) -> Floats:
    """The scales of `[blocks, bytes]`, as `[blocks, 1]`."""
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)

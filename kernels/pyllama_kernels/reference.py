"""The NumPy twin of every kernel: the same names, arguments and results, written to be read.

They are the oracle of the compiled kernels, and what `PYLLAMA_KERNELS=reference` runs.
Every kernel writes into its last argument. `rows` are rows of a batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_kernels.blocks import dequantize_q40, dequantize_q80, quantize_q80
from pyllama_kernels.layout import pack_activations, unpack_activations, unpack_weights
from pyllama_kernels.pages import KEPT_Q80, PAGE, read_positions, write_position

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


def rms_norm(x: F32, weight: F32, epsilon: float, out: F32) -> None:
    """x * rsqrt(mean(x^2) + epsilon) * weight, row by row.

    Args:
        x: [rows, n] float32.
        weight: [n] float32.
        epsilon: added to the mean of squares.
        out: [rows, n] float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    mean = np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True)
    out[:] = x / np.sqrt(mean + epsilon) * weight


def quantize(x: F32, activations: U8) -> None:
    """Q80 as a matrix reads it.

    Args:
        x: [rows, n] float32.
        activations: uint8, the tiles of the batch: see `layout`.
    """
    rows, n = x.shape
    packed = quantize_q80(x).reshape(rows, n // 32, 34)
    scales = np.ascontiguousarray(packed[..., :2]).view("<f2")[..., 0].astype(np.float32)
    values = np.ascontiguousarray(packed[..., 2:]).view(np.int8).reshape(rows, n)
    pack_activations(values, scales, activations)


def pack_q80(x: F32, out: U8) -> None:
    """Q80 as it travels: [blocks, 32] float32 to [blocks, 34] uint8."""
    out[:] = quantize_q80(x)


def matmul_f32(x: F32, weight: F32, bias: F32, out: F32) -> None:
    """x @ weight.T + bias.

    Args:
        x: [rows, n] float32.
        weight: [m, n] float32.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    out[:] = x @ weight.T
    if bias.size:
        out += bias


def matmul_q40(activations: U8, rows: int, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q40 weights, plus bias.

    Args:
        activations: uint8, the tiles of the batch: see `layout`.
        rows: of the batch.
        weight: [groups, n / 32, 288] uint8, groups of 16 rows: see `layout`.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    _product(activations, rows, unpack_weights(weight)[: out.shape[1]], dequantize_q40, bias, out)


def matmul_q80(activations: U8, rows: int, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q80 weights, plus bias.

    Args:
        activations: as for `matmul_q40`.
        rows: of the batch.
        weight: [m, n / 32, 34] uint8, Q80 blocks.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    _product(activations, rows, weight, dequantize_q80, bias, out)


def _product(activations: U8, rows: int, blocks: U8, dequantize: Any, bias: F32, out: F32) -> None:
    m, n_blocks, size = blocks.shape
    x = unpack_activations(activations, rows, 32 * n_blocks)
    matmul_f32(x, dequantize(blocks.reshape(m, n_blocks * size)), bias, out)


def rope(positions: I64, cos: F32, sin: F32, x: F32) -> None:
    """Turns pairs (2i, 2i + 1) of the first values of each head, in place.

    Args:
        positions: [rows] int64.
        cos: [seq_len, rotary_dim / 2] float32, by position and pair.
        sin: likewise.
        x: [rows, heads, head_dim] float32, changed in place.

    Source: Su et al., RoFormer, 2021, in GLM's pairing (modeling_glm.py of transformers).
    """
    turned = 2 * cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]  # [rows, 1, pairs]
    even, odd = x[:, :, 0:turned:2].copy(), x[:, :, 1:turned:2].copy()
    x[:, :, 0:turned:2] = even * c - odd * s
    x[:, :, 1:turned:2] = odd * c + even * s


def store_keys(x: F32, slots: I64, positions: I64, kind: int, cache: U8) -> None:
    """Keeps each row's keys.

    Args:
        x: [rows, kv_heads, head_dim] float32.
        slots: [rows] int64, the sequence of each row.
        positions: [rows] int64.
        kind: float type of the cache: see `cache`.
        cache: [slots, kv_heads, pages, page bytes] uint8: see `cache`.
    """
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        page, lane = divmod(position, PAGE)
        for head, key in enumerate(x[row]):
            write_position(cache[slot, head, page], lane, key, kind, lanes_last=True)


def store_values(x: F32, slots: I64, positions: I64, kind: int, cache: U8) -> None:
    """Keeps each row's values: arguments as for `store_keys`."""
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        page, lane = divmod(position, PAGE)
        for head, value in enumerate(x[row]):
            write_position(cache[slot, head, page], lane, value, kind, lanes_last=False)


def attention(
    query: F32,
    keys: U8,
    values: U8,
    kind: int,
    slots: I64,
    positions: I64,
    first: int,
    group: int,
    out: F32,
) -> None:
    """softmax(q . k / sqrt(head_dim)) . v over the positions 0 to the row's own.

    Args:
        query: [rows, heads, head_dim] float32.
        keys: [slots, kv_heads, pages, page bytes] uint8: see `cache`.
        values: likewise.
        kind: float type of the cache; keys of Q80 meet queries that are rounded to Q80.
        slots: [rows] int64.
        positions: [rows] int64.
        first: head h reads key head (first + h) // group.
        group: query heads that share a key head.
        out: [rows, heads, head_dim] float32.

    Source: Vaswani et al., 2017; shared key heads: Ainslie et al., 2023.
    """
    n = query.shape[2]
    if kind == KEPT_Q80:
        query = dequantize_q80(quantize_q80(query))
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        for head in range(query.shape[1]):
            kv_head = (first + head) // group
            # [context, head_dim]
            k = read_positions(keys[slot, kv_head], n, kind, lanes_last=True)[: position + 1]
            v = read_positions(values[slot, kv_head], n, kind, lanes_last=False)[: position + 1]
            scores = k @ query[row, head] * np.float32(1 / np.sqrt(n))
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v / weights.sum()


def silu_mul(gate: F32, up: F32, out: F32) -> None:
    """gate * sigmoid(gate) * up, [n] float32 each. Source: Shazeer, GLU variants, 2020."""
    with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0, as it should be
        out[:] = gate / (1 + np.exp(-gate)) * up


def merge_f32(parts: F32, out: F32) -> None:
    """The sum of [parts, n] float32 over parts, added one after the other."""
    out[:] = parts[0]
    for part in parts[1:]:
        out += part


def merge_q80(parts: U8, out: F32) -> None:
    """The sum of [parts, blocks, 34] uint8 over parts as [blocks, 32] float32."""
    out[:] = 0
    for part in parts:
        out += dequantize_q80(part)


def add(x: F32, out: F32) -> None:
    """out += x, [n] float32 each."""
    out += x


def gather(x: F32, index: I64, out: F32) -> None:
    """out[i] = x[index[i]]: [rows, n] float32, [k] int64, [k, n] float32."""
    out[:] = x[index]

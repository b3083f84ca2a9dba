"""The NumPy twin of every kernel: the same names, arguments and results, written to be read.

They are the oracle of the compiled kernels, and what `PYLLAMA_KERNELS=reference` runs.
Every kernel writes into its last argument. `rows` are rows of a batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_kernels.blocks import dequantize_q40, dequantize_q80, quantize_q80

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


def quantize(x: F32, values: I8, scales: F32) -> None:
    """Q80 as a matrix reads it: values and scales apart.

    Args:
        x: [blocks, 32] float32.
        values: [blocks, 32] int8.
        scales: [blocks] float32, each of them a float16's value.
    """
    packed = quantize_q80(x)  # [blocks, 34]
    scales[:] = packed[:, :2].copy().view(np.float16)[:, 0]
    values[:] = packed[:, 2:].view(np.int8)


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


def matmul_q40(values: I8, scales: F32, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q40 weights, plus bias.

    Args:
        values: [rows, n] int8.
        scales: [rows, n / 32] float32.
        weight: [m, n / 32, 18] uint8, Q40 blocks.
        bias: [m] float32, or [0] for none.
        out: [rows, m] float32.
    """
    matmul_f32(_activations(values, scales), _rows(dequantize_q40, weight), bias, out)


def matmul_q80(values: I8, scales: F32, weight: U8, bias: F32, out: F32) -> None:
    """A Q80 batch times Q80 weights, plus bias: as `matmul_q40`, with blocks of 34 bytes."""
    matmul_f32(_activations(values, scales), _rows(dequantize_q80, weight), bias, out)


def _activations(values: I8, scales: F32) -> F32:
    blocks = values.reshape(*scales.shape, 32).astype(np.float32)
    return (blocks * scales[:, :, None]).reshape(values.shape)


def _rows(dequantize: Any, weight: U8) -> F32:
    m, blocks, size = weight.shape
    flat: F32 = dequantize(weight.reshape(m, blocks * size))
    return flat


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


def store(x: F32, slots: I64, positions: I64, cache: F32) -> None:
    """Keeps each row's keys (or values).

    Args:
        x: [rows, kv_heads, head_dim] float32.
        slots: [rows] int64, the sequence of each row.
        positions: [rows] int64.
        cache: [slots, kv_heads, seq_len, head_dim] float32.
    """
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        cache[slot, :, position] = x[row]


def attention(
    query: F32,
    keys: F32,
    values: F32,
    slots: I64,
    positions: I64,
    first: int,
    group: int,
    out: F32,
) -> None:
    """softmax(q . k / sqrt(head_dim)) . v over the positions 0 to the row's own.

    Args:
        query: [rows, heads, head_dim] float32.
        keys: [slots, kv_heads, seq_len, head_dim] float32.
        values: likewise.
        slots: [rows] int64.
        positions: [rows] int64.
        first: head h reads key head (first + h) // group.
        group: query heads that share a key head.
        out: [rows, heads, head_dim] float32.

    Source: Vaswani et al., 2017; shared key heads: Ainslie et al., 2023.
    """
    scale = np.float32(1 / np.sqrt(query.shape[2]))
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        for head in range(query.shape[1]):
            kv_head = (first + head) // group
            k = keys[slot, kv_head, : position + 1]  # [context, head_dim]
            v = values[slot, kv_head, : position + 1]
            scores = k @ query[row, head] * scale
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

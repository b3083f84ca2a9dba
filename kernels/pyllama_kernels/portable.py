"""The kernels in plain Numba, for any CPU. Arguments and results: see `reference`.

LLVM makes vector code of the inner loops for the CPU it finds.
"""

import math
from typing import Any

import numpy as np
from numba import float32, int32, uint32

from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.lowlevel import bits_of_float, float_of_bits


@kernel
def half_to_float(half: Any) -> Any:
    """The value of a float16, given as its bits; infinities and NaN included."""
    magnitude = uint32(half & 0x7FFF) << uint32(13)
    # The exponent is off by 112; a multiplication mends it for subnormal numbers too.
    value = float_of_bits(magnitude) * float32(2.0**112)
    if magnitude >= uint32(0x0F800000):
        value = float_of_bits(magnitude | uint32(0x7F800000))
    return float_of_bits(bits_of_float(value) | (uint32(half & 0x8000) << uint32(16)))


@kernel
def float_to_half(value: Any) -> Any:
    """The bits of the nearest float16, ties to even; beyond the largest: infinity."""
    bits = bits_of_float(value)
    sign = (bits >> uint32(16)) & uint32(0x8000)
    bits &= uint32(0x7FFFFFFF)
    if bits > uint32(0x7F800000):
        half = uint32(0x7E00)
    elif bits >= uint32(0x477FF000):  # 65520 and above round to infinity
        half = uint32(0x7C00)
    elif bits < uint32(0x38800000):
        # Subnormal: adding 0.5 leaves the rounded value in the low bits.
        half = bits_of_float(float_of_bits(bits) + float32(0.5)) - uint32(0x3F000000)
    else:
        odd = (bits >> uint32(13)) & uint32(1)
        half = (bits - uint32(0x38000000) + uint32(0xFFF) + odd) >> uint32(13)
    return sign | half


@kernel
def rms_norm(x: Any, weight: Any, epsilon: float, out: Any) -> None:
    """See `reference.rms_norm`."""
    rows, n = x.shape
    for row in range(rows):
        total = float32(0)
        for i in range(n):
            total += x[row, i] * x[row, i]
        scale = float32(1 / math.sqrt(total / n + epsilon))
        for i in range(n):
            out[row, i] = x[row, i] * scale * weight[i]


@kernel
def _largest(x: Any) -> Any:
    largest = float32(0)
    for i in range(32):
        largest = max(largest, abs(x[i]))
    return largest


@exact_kernel
def _q80_scale(largest: Any) -> Any:
    """A block's scale and its inverse: 0 if there is none. Bytes are the same on every CPU."""
    d = largest / float32(127)
    inverse = float32(1) / d
    return d, inverse if inverse < float32(np.inf) else float32(0)


@kernel
def quantize(x: Any, values: Any, scales: Any) -> None:
    """See `reference.quantize`."""
    for block in range(x.shape[0]):
        d, inverse = _q80_scale(_largest(x[block]))
        scales[block] = half_to_float(float_to_half(d))
        for i in range(32):
            values[block, i] = np.int8(np.rint(x[block, i] * inverse))


@kernel
def pack_q80(x: Any, out: Any) -> None:
    """See `reference.pack_q80`."""
    for block in range(x.shape[0]):
        d, inverse = _q80_scale(_largest(x[block]))
        half = float_to_half(d)
        out[block, 0] = half & 0xFF
        out[block, 1] = half >> 8
        for i in range(32):
            out[block, 2 + i] = np.int8(np.rint(x[block, i] * inverse))


@kernel
def matmul_f32(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_f32`."""
    rows, n = x.shape
    for j in range(weight.shape[0]):
        start = bias[j] if bias.size else float32(0)
        for row in range(rows):
            total = float32(0)
            for i in range(n):
                total += x[row, i] * weight[j, i]
            out[row, j] = total + start


@kernel
def matmul_q40(values: Any, scales: Any, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_q40`. A row of weights is unpacked once for all rows of the batch."""
    rows, n = values.shape
    blocks = n // 32
    unpacked = np.empty(n, np.int8)
    d = np.empty(blocks, np.float32)
    for j in range(weight.shape[0]):
        for b in range(blocks):
            d[b] = half_to_float(uint32(weight[j, b, 0]) | (uint32(weight[j, b, 1]) << uint32(8)))
            for i in range(16):
                halves = weight[j, b, 2 + i]
                unpacked[32 * b + i] = np.int8(halves & 15) - np.int8(8)
                unpacked[32 * b + 16 + i] = np.int8(halves >> 4) - np.int8(8)
        start = bias[j] if bias.size else float32(0)
        for row in range(rows):
            out[row, j] = _dot(values[row], scales[row], unpacked, d) + start


@kernel
def matmul_q80(values: Any, scales: Any, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_q80`."""
    rows, n = values.shape
    blocks = n // 32
    unpacked = np.empty(n, np.int8)
    d = np.empty(blocks, np.float32)
    for j in range(weight.shape[0]):
        for b in range(blocks):
            d[b] = half_to_float(uint32(weight[j, b, 0]) | (uint32(weight[j, b, 1]) << uint32(8)))
            for i in range(32):
                unpacked[32 * b + i] = np.int8(weight[j, b, 2 + i])
        start = bias[j] if bias.size else float32(0)
        for row in range(rows):
            out[row, j] = _dot(values[row], scales[row], unpacked, d) + start


@kernel
def _dot(x: Any, x_scales: Any, w: Any, w_scales: Any) -> Any:
    """The product of two rows of int8 blocks with their scales."""
    total = float32(0)
    for b in range(x_scales.size):
        products = int32(0)
        for i in range(32):
            products = int32(products + int32(x[32 * b + i]) * int32(w[32 * b + i]))
        total += float32(products) * (x_scales[b] * w_scales[b])
    return total


@kernel
def rope(positions: Any, cos: Any, sin: Any, x: Any) -> None:
    """See `reference.rope`."""
    rows, heads, _ = x.shape
    for row in range(rows):
        position = positions[row]
        for head in range(heads):
            for i in range(cos.shape[1]):
                c, s = cos[position, i], sin[position, i]
                even, odd = x[row, head, 2 * i], x[row, head, 2 * i + 1]
                x[row, head, 2 * i] = even * c - odd * s
                x[row, head, 2 * i + 1] = odd * c + even * s


@kernel
def store(x: Any, slots: Any, positions: Any, cache: Any) -> None:
    """See `reference.store`."""
    rows, heads, head_dim = x.shape
    for row in range(rows):
        for head in range(heads):
            for i in range(head_dim):
                cache[slots[row], head, positions[row], i] = x[row, head, i]


@kernel
def attention(
    query: Any,
    keys: Any,
    values: Any,
    slots: Any,
    positions: Any,
    first: int,
    group: int,
    out: Any,
) -> None:
    """See `reference.attention`. One pass over the positions: the softmax is kept running.

    Source of the running softmax: Milakov and Gimelshein, Online normalizer calculation, 2018.
    """
    rows, heads, head_dim = query.shape
    scale = float32(1 / math.sqrt(head_dim))
    for row in range(rows):
        slot = slots[row]
        for head in range(heads):
            kv_head = (first + head) // group
            largest, total = float32(-np.inf), float32(0)
            for i in range(head_dim):
                out[row, head, i] = 0
            for position in range(positions[row] + 1):
                score = float32(0)
                for i in range(head_dim):
                    score += query[row, head, i] * keys[slot, kv_head, position, i]
                score *= scale
                if score > largest:
                    shrink = float32(math.exp(largest - score))
                    total *= shrink
                    for i in range(head_dim):
                        out[row, head, i] *= shrink
                    largest = score
                weight = float32(math.exp(score - largest))
                total += weight
                for i in range(head_dim):
                    out[row, head, i] += weight * values[slot, kv_head, position, i]
            for i in range(head_dim):
                out[row, head, i] /= total


@kernel
def silu_mul(gate: Any, up: Any, out: Any) -> None:
    """See `reference.silu_mul`."""
    for i in range(gate.size):
        out[i] = gate[i] / (float32(1) + float32(math.exp(-gate[i]))) * up[i]


@kernel
def merge_f32(parts: Any, out: Any) -> None:
    """See `reference.merge_f32`."""
    n_parts, n = parts.shape
    for i in range(n):
        out[i] = parts[0, i]
    for part in range(1, n_parts):
        for i in range(n):
            out[i] += parts[part, i]


@kernel
def merge_q80(parts: Any, out: Any) -> None:
    """See `reference.merge_q80`."""
    n_parts, blocks, _ = parts.shape
    out[:] = 0
    for part in range(n_parts):
        for b in range(blocks):
            block = parts[part, b]
            d = half_to_float(uint32(block[0]) | (uint32(block[1]) << uint32(8)))
            for i in range(32):
                out[b, i] += d * float32(np.int8(block[2 + i]))


@kernel
def add(x: Any, out: Any) -> None:
    """See `reference.add`."""
    for i in range(x.size):
        out[i] += x[i]


@kernel
def gather(x: Any, index: Any, out: Any) -> None:
    """See `reference.gather`."""
    for k in range(index.size):
        for i in range(x.shape[1]):
            out[k, i] = x[index[k], i]

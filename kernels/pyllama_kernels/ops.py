"""The kernels that LLVM makes fast by itself: plain Numba for any CPU.

Arguments and results: see `reference`. LLVM makes vector code of the inner loops.
"""

import math
from typing import Any

import numpy as np
from numba import carray, float32, int32, uint32

from pyllama_kernels.dot import dot
from pyllama_kernels.exponential import exp
from pyllama_kernels.halves import half_to_float
from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.layout import cell_of
from pyllama_kernels.lowlevel import (
    address_of,
    float32_pointer,
    int32_pointer,
)
from pyllama_kernels.rounding import round_block


@exact_kernel
def rms_norm(x: Any, weight: Any, epsilon: float, out: Any) -> None:
    """See `reference.rms_norm`."""
    rows, n = x.shape
    for row in range(rows):
        total = dot(address_of(x[row]), address_of(x[row]), n)
        scale = float32(1 / math.sqrt(total / n + epsilon))
        for i in range(n):
            out[row, i] = x[row, i] * scale * weight[i]


@kernel
def layer_norm(x: Any, weight: Any, bias: Any, epsilon: float, out: Any) -> None:
    """See `reference.layer_norm`."""
    rows, n = x.shape
    for row in range(rows):
        total = float32(0)
        for i in range(n):
            total += x[row, i]
        mean, squares = total / float32(n), float32(0)
        for i in range(n):
            squares += (x[row, i] - mean) * (x[row, i] - mean)
        scale = float32(1 / math.sqrt(squares / n + epsilon))
        for i in range(n):
            out[row, i] = (x[row, i] - mean) * scale * weight[i] + bias[i]


@kernel
def quantize(x: Any, first: int, last: int, activations: Any) -> None:
    """See `reference.quantize`; blocks `first` to before `last` only, row by row."""
    rows, n = x.shape
    blocks = n // 32
    for index in range(first, last):
        row, b = index // blocks, index % blocks
        before, t, place = cell_of(row, rows, b, blocks)
        cell = address_of(activations) + before
        half, total = round_block(x[row, 32 * b :], cell + 32 * place)
        scales = carray(float32_pointer(cell + 32 * t), (t,))
        scales[place] = half_to_float(half)
        if row == rows - 1:
            scales[place + 1 :] = 0  # see `layout`
        carray(int32_pointer(cell + 36 * t), (t,))[place] = -8 * total


@kernel
def pack_q80(x: Any, out: Any) -> None:
    """See `reference.pack_q80`."""
    for block in range(x.shape[0]):
        half, _ = round_block(x[block], address_of(out[block]) + 2)
        out[block, 0] = half & 0xFF
        out[block, 1] = half >> 8


@exact_kernel
def matmul_f32(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_f32`."""
    rows, n = x.shape
    for j in range(weight.shape[0]):
        start = bias[j] if bias.size else float32(0)
        for row in range(rows):
            out[row, j] = dot(address_of(x[row]), address_of(weight[j]), n) + start


@kernel
def matmul_q80(activations: Any, rows: int, weight: Any, bias: Any, out: Any) -> None:
    """See `reference.matmul_q80`."""
    m, blocks, _ = weight.shape
    for j in range(m):
        start = bias[j] if bias.size else float32(0)
        for row in range(rows):
            total = float32(0)
            for b in range(blocks):
                before, t, place = cell_of(row, rows, b, blocks)
                cell = activations[before:]
                scale = carray(float32_pointer(address_of(cell) + 32 * t), (t,))[place]
                block = weight[j, b]
                products = int32(0)
                for i in range(32):
                    product = int32(np.int8(cell[32 * place + i])) * int32(np.int8(block[2 + i]))
                    products = int32(products + product)
                d = half_to_float(uint32(block[0]) | (uint32(block[1]) << uint32(8)))
                total += float32(products) * (scale * d)
            out[row, j] = total + start


@kernel
def rope(positions: Any, cos: Any, sin: Any, halves: bool, x: Any) -> None:
    """See `reference.rope`."""
    rows, heads, _ = x.shape
    pairs = cos.shape[1]
    step, apart = (1, pairs) if halves else (2, 1)  # from pair to pair, and within a pair
    for row in range(rows):
        position = positions[row]
        for head in range(heads):
            for i in range(pairs):
                c, s = cos[position, i], sin[position, i]
                one, other = step * i, step * i + apart
                a, b = x[row, head, one], x[row, head, other]
                x[row, head, one] = a * c - b * s
                x[row, head, other] = b * c + a * s


@kernel
def concat(first: Any, second: Any, out: Any) -> None:
    """See `reference.concat`."""
    rows, heads, n = first.shape
    for row in range(rows):
        for head in range(heads):
            for i in range(n):
                out[row, head, i] = first[row, head, i]
            for i in range(second.shape[2]):
                out[row, head, n + i] = second[row, head, i]


@kernel
def silu_mul(gate: Any, up: Any, out: Any) -> None:
    """See `reference.silu_mul`."""
    for i in range(gate.size):
        out[i] = gate[i] / (float32(1) + exp(-gate[i])) * up[i]


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

"""Which positions a sparse attention looks at: those that a small attention scores highest."""

from typing import Any

import numpy as np
from numba import carray, float32, uint32

from pyllama_kernels.attention import multiply
from pyllama_kernels.cache import place_of, unpack_keys
from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import (
    address_of,
    bits_of_float,
    float32_pointer,
    int64_pointer,
    stack,
)
from pyllama_kernels.pages import PAGE

_DIGITS = 256  # a score is looked at in four digits of 8 bits
_DIGITS_BYTES = 8 * _DIGITS


def select_scratch_bytes(heads: int, head_dim: int) -> int:
    """Memory that each thread needs beside the arrays: a page of keys, and its products."""
    return 4 * PAGE * (head_dim + heads)


@kernel
def select(
    query: Any,
    weights: Any,
    keys: Any,
    kind: int,
    seqs: Any,
    positions: Any,
    table: Any,
    top_k: int,
    scale: float,
    out: Any,
    scratch: int,
    first: int,
    last: int,
) -> None:
    """See `reference.select`, for rows `first` to before `last`.

    `scratch` is the address of `select_scratch_bytes` of this thread's own.
    """
    _, heads, n = query.shape
    page_keys = carray(float32_pointer(scratch), (PAGE * n,))
    products = carray(float32_pointer(scratch + 4 * PAGE * n), (heads, PAGE))
    for row in range(first, last):
        seen = positions[row] + 1
        out[row, seen:] = float32(-np.inf)
        if seen <= top_k:
            out[row, :seen] = float32(0)
            continue
        q, k = address_of(query[row]), scratch
        for page in range((seen + PAGE - 1) // PAGE):
            block, number, _ = place_of(table[seqs[row]], PAGE * page)
            unpack_keys(keys[block, 0, number], kind, page_keys)
            products[:] = 0
            multiply(q, 4 * n, k, 4, 4 * PAGE, n, k + 4 * PAGE * n, 4 * PAGE, heads, 0)
            for lane in range(min(PAGE, seen - PAGE * page)):
                total = float32(0)
                for head in range(heads):
                    product = max(products[head, lane] * float32(scale), float32(0))
                    total += weights[row, head] * product
                out[row, PAGE * page + lane] = total
        _keep(out[row, :seen], top_k)


@kernel
def _keep(scores: Any, count: int) -> None:
    """Turns the `count` highest scores, the earlier of equal ones, into 0, the others into -inf."""
    seen = carray(int64_pointer(stack(_DIGITS_BYTES)), (_DIGITS,))
    prefix, left = uint32(0), count
    for shift in (24, 16, 8, 0):  # the lowest score that is kept, digit by digit
        seen[:] = 0
        for i in range(scores.size):
            rank = _rank(scores[i])
            if shift == 24 or rank >> uint32(shift + 8) == prefix >> uint32(shift + 8):
                seen[(rank >> uint32(shift)) & uint32(_DIGITS - 1)] += 1
        digit = _DIGITS - 1
        while digit > 0 and seen[digit] < left:
            left -= seen[digit]
            digit -= 1
        prefix = uint32(prefix | uint32(digit << shift))
    for i in range(scores.size):
        rank = _rank(scores[i])
        keep = rank > prefix
        if rank == prefix and left > 0:
            keep, left = True, left - 1
        scores[i] = float32(0) if keep else float32(-np.inf)


@kernel
def _rank(score: float) -> int:
    """A number without sign in the order of floats."""
    bits = uint32(bits_of_float(float32(score)))
    if score == float32(0):
        return uint32(1 << 31)  # -0 and 0 are equal
    return uint32(~bits) if bits >> uint32(31) else uint32(bits | uint32(1 << 31))

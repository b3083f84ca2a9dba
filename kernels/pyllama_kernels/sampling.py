"""Draws a token from its logits.

The most likely tokens, as many as top-k and top-p leave, are found without sorting: a radix select
over the bits of their weights finds the smallest weight that is left.
"""

from typing import Any

import numpy as np
from numba import carray, float32

from pyllama_kernels.exponential import exp_of_differences
from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.lowlevel import (
    address_of,
    bits_of_float,
    float64_pointer,
    float_of_bits,
    stack,
)

VECTOR = 16  # weights that are made at once

_BITS = 10  # of a digit; three hold all weights, which are at most 1
_DIGITS = 1 << _BITS
_MASSES_BYTES = 8 * _DIGITS


@exact_kernel
def adjust(
    logits: Any,
    seen: Any,
    counts: Any,
    repetition: float,
    presence: float,
    frequency: float,
    biased: Any,
    bias: Any,
    mask: Any,
    out: Any,
) -> None:
    """See `reference.adjust`."""
    out[: logits.size] = logits
    for j in range(seen.size):
        i = seen[j]
        x = out[i]
        x = x / float32(repetition) if x > 0 else x * float32(repetition)
        if counts[j] > 0:
            x -= float32(frequency) * float32(counts[j]) + float32(presence)
        out[i] = x
    for j in range(biased.size):
        out[biased[j]] += bias[j]
    if mask.size:
        for i in range(logits.size):
            if not (mask[i >> 5] >> np.uint32(i & 31)) & np.uint32(1):
                out[i] = -np.inf


@exact_kernel
def sample(
    logits: Any,
    top: float,
    inverse_temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    weights: Any,
    tokens: Any,
) -> int:
    """See `reference.sample`. There is room for as many `tokens` as `logits`, and for as many
    `weights`, up to a multiple of `VECTOR`.
    """
    n = logits.size
    for i in range(n):
        weights[i] = (logits[i] - float32(top)) * float32(inverse_temperature)
    weights[n:] = -np.inf
    total = exp_of_differences(address_of(weights), float32(0), weights.size // VECTOR)
    count = n
    if 0 < top_k < n:
        for i in range(n):
            tokens[i] = i
        least, equal, total = find_largest(weights, tokens, float(top_k), True)
        count = 0
        for i in range(n):
            if weights[i] < least or (weights[i] == least and equal == 0):
                continue
            equal -= weights[i] == least
            tokens[count] = i
            count += 1
        total = 0.0
        for i in tokens[:count]:
            total += weights[i]
    limit = top_p * total if 0 < top_p < 1 else np.inf
    # What is below, all together, is less than what may be left out.
    least = float_of_bits(max(1, bits_of_float(float32(max(0, total - limit) / count))))
    if count == n:
        count = 0
        for i in range(n):
            tokens[count] = i
            count += weights[i] >= least
    least, equal, mass = find_largest(weights, tokens[:count], limit, False)
    if float32(min_p) > least:
        least, equal, mass = float32(min_p), n, 0.0
        for i in tokens[:count]:
            if weights[i] >= least:
                mass += weights[i]
    drawn, reach, token = uniform * mass, 0.0, tokens[0]
    for i in tokens[:count]:
        if weights[i] < least:
            continue
        if weights[i] == least:
            if equal == 0:
                continue
            equal -= 1
        token = i
        reach += weights[i]
        if reach > drawn:
            break
    return token


@exact_kernel
def find_largest(
    weights: Any, tokens: Any, limit: float, by_count: bool
) -> tuple[float, int, float]:
    """The largest weights, as few as reach a limit together.

    Args:
        weights: float32, from 0 to 1.
        tokens: places of those to look at.
        limit: of the sum of the weights, or
        by_count: of their number.

    Returns:
        The smallest of the weights, how many of them are equal to it, and the sum or number of all.
    """
    masses = carray(float64_pointer(stack(_MASSES_BYTES)), (_DIGITS,))
    prefix, above = 0, 0.0  # the digits so far, and the mass of the weights that have higher ones
    for shift in (2 * _BITS, _BITS, 0):
        masses[:] = 0
        for i in tokens:
            bits = np.int64(bits_of_float(weights[i]))
            if bits >> (shift + _BITS) == prefix >> (shift + _BITS):
                masses[(bits >> shift) & (_DIGITS - 1)] += 1.0 if by_count else weights[i]
        digit = _DIGITS - 1
        while digit > 0 and above + masses[digit] < limit:
            above += masses[digit]
            digit -= 1
        prefix |= digit << shift
    if prefix == 0:
        return float32(0), 0, above
    least = float_of_bits(prefix)
    each = 1.0 if by_count else float(least)
    equal = np.rint(masses[prefix & (_DIGITS - 1)] / each)
    count = int(min(equal, np.ceil((limit - above) / each)))
    return least, count, above + count * each

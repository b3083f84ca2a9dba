"""Draws a token from its logits.

The *nucleus* are the most likely tokens, as few as reach a given share together. They are found
without sorting: the odds of the least likely one come to light digit by digit, from sums of all
that begin with the same digits.
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

VECTOR = 16  # odds that are made at once

_BITS = 10  # of a digit; three hold all odds, which are at most 1
_DIGITS = 1 << _BITS
_MASSES_BYTES = 8 * _DIGITS


@exact_kernel
def sample(
    logits: Any, top: float, coldness: float, topp: float, coin: float, odds: Any, tokens: Any
) -> int:
    """See `reference.sample`. There is room for as many `tokens` as `logits`, and for as many
    `odds`, up to a multiple of `VECTOR`.
    """
    n = logits.size
    for i in range(n):
        odds[i] = (logits[i] - float32(top)) * float32(coldness)
    odds[n:] = -np.inf
    total = exp_of_differences(address_of(odds), float32(0), odds.size // VECTOR)
    limit = topp * total if 0 < topp < 1 else np.inf
    # What is below, all together, is less than what may be left out.
    least = float_of_bits(max(1, bits_of_float(float32(max(0, total - limit) / n))))
    count = 0
    for i in range(n):
        tokens[count] = i
        count += odds[i] >= least
    least, equal, mass = find_nucleus(odds, tokens[:count], limit)
    drawn, reach, token = coin * mass, 0.0, tokens[0]
    for i in tokens[:count]:
        if odds[i] < least:
            continue
        if odds[i] == least:
            if equal == 0:
                continue
            equal -= 1
        token = i
        reach += odds[i]
        if reach > drawn:
            break
    return token


@exact_kernel
def find_nucleus(odds: Any, tokens: Any, limit: float) -> tuple[float, int, float]:
    """The smallest odds in the nucleus, how many in it are equal to them, and the sum of all.

    Args:
        odds: float32, from 0 to 1.
        tokens: places of those to look at.
        limit: the sum that the nucleus reaches, if all together do.
    """
    masses = carray(float64_pointer(stack(_MASSES_BYTES)), (_DIGITS,))
    prefix, above = 0, 0.0  # the digits so far, and the sum of the odds that have higher ones
    for shift in (2 * _BITS, _BITS, 0):
        masses[:] = 0
        for i in tokens:
            bits = np.int64(bits_of_float(odds[i]))
            if bits >> (shift + _BITS) == prefix >> (shift + _BITS):
                masses[(bits >> shift) & (_DIGITS - 1)] += odds[i]
        digit = _DIGITS - 1
        while digit > 0 and above + masses[digit] < limit:
            above += masses[digit]
            digit -= 1
        prefix |= digit << shift
    if prefix == 0:
        return float32(0), 0, above
    least = float_of_bits(prefix)
    equal = np.rint(masses[prefix & (_DIGITS - 1)] / least)
    count = int(min(equal, np.ceil((limit - above) / least)))
    return least, count, above + count * least

"""The kernels of a mixture of experts, beside the matrix products. For a plan see `plans`."""

import math
from typing import Any

import numpy as np
from numba import carray, float32

from pyllama_kernels import ops
from pyllama_kernels.exponential import exp
from pyllama_kernels.jit import exact_kernel, kernel
from pyllama_kernels.layout import BLOCK, ROW_BYTES, activation_bytes, padded_rows
from pyllama_kernels.lowlevel import address_of, float32_pointer, stack, uint8_pointer
from pyllama_kernels.plans import LISTED, MOST_EXPERTS, PAIRS, lists

_SCORES_BYTES = 4 * MOST_EXPERTS


@exact_kernel  # the same experts on every CPU, if the scores are the same
def route(
    x: Any,
    bias: Any,
    softmax: bool,
    active: int,
    groups: int,
    active_groups: int,
    normalize: bool,
    scale: float,
    out: Any,
) -> None:
    """See `reference.route`."""
    rows, experts = x.shape
    ranks = carray(float32_pointer(stack(_SCORES_BYTES)), (experts,))
    sums = carray(float32_pointer(stack(_SCORES_BYTES)), (groups,))
    for row in range(rows):
        scores = out[row]
        _score(x[row], softmax, scores)
        for i in range(experts):
            rank = scores[i] + bias[i] if bias.size else scores[i]
            ranks[i] = -np.inf if math.isnan(rank) else rank  # chosen last
        if active_groups < groups:
            _keep_best_groups(ranks, active_groups, sums)
        total = float32(0)
        for _ in range(active):
            total += scores[_take_best(ranks)]
        for i in range(experts):
            if math.isnan(ranks[i]):
                weight = scores[i] / (total + float32(1e-20)) if normalize else scores[i]
                scores[i] = weight * float32(scale)
            else:
                scores[i] = 0


@exact_kernel
def _score(x: Any, softmax: bool, out: Any) -> None:
    """The router's outputs for one row to scores, float32."""
    if not softmax:
        for i in range(x.size):
            out[i] = float32(1) / (float32(1) + exp(-x[i]))
        return
    top = x[0]
    for i in range(1, x.size):
        top = max(top, x[i])
    total = float32(0)
    for i in range(x.size):
        out[i] = exp(x[i] - top)
        total += out[i]
    for i in range(x.size):
        out[i] /= total


@exact_kernel
def _take_best(ranks: Any) -> int:
    """The place of the highest rank, the first of equal ones. It becomes NaN, which is no rank."""
    best = -1
    for i in range(ranks.size):
        if not math.isnan(ranks[i]) and (best < 0 or ranks[i] > ranks[best]):
            best = i
    ranks[best] = np.nan
    return best


@exact_kernel
def _keep_best_groups(ranks: Any, count: int, sums: Any) -> None:
    """Ranks become -inf outside of the groups whose best two have the largest sums."""
    members = ranks.size // sums.size
    for group in range(sums.size):
        first = second = float32(-np.inf)
        for i in range(group * members, (group + 1) * members):
            if ranks[i] > first:
                first, second = ranks[i], first
            elif ranks[i] > second:
                second = ranks[i]
        total = first + second
        sums[group] = -np.inf if math.isnan(total) else total
    for _ in range(count):
        _take_best(sums)
    for i in range(ranks.size):
        if not math.isnan(sums[i // members]):
            ranks[i] = -np.inf


@exact_kernel
def make_plan(route: Any, active: int, plan: Any) -> None:
    """See `reference.make_plan`."""
    experts, firsts, tiles, rows, chosen, pairs, counts = lists(plan)
    n_rows, n_experts = route.shape
    counts[:] = 0
    for row in range(n_rows):
        place, stop = row * active, (row + 1) * active
        for expert in range(n_experts):
            if route[row, expert] != 0 and place < stop:
                chosen[place] = expert
                counts[expert] += 1
                place += 1
        chosen[place:stop] = -1
        pairs[place:stop] = -1
    listed = pair = tile = 0
    for expert in range(n_experts):
        count = counts[expert]
        counts[expert] = pair  # the expert's next pair from here on
        if count > 0:
            experts[listed], firsts[listed], tiles[listed] = expert, pair, tile
            listed += 1
            pair += count
            tile += padded_rows(count)
    firsts[listed], tiles[listed] = pair, tile
    plan[PAIRS], plan[LISTED] = pair, listed
    for place in range(n_rows * active):
        if chosen[place] >= 0:
            pair = counts[chosen[place]]
            counts[chosen[place]] += 1
            rows[pair] = place // active
            pairs[place] = pair


@kernel
def quantize_experts(x: Any, plan: Any, first: int, last: int, activations: Any) -> None:
    """See `reference.quantize_experts`; blocks `first` to before `last` only, pair by pair."""
    _, firsts, tiles = lists(plan)[:3]
    n = x.shape[1]
    blocks = n // BLOCK
    for i in range(plan[LISTED]):
        start, stop = firsts[i], firsts[i + 1]
        a, z = max(first, start * blocks), min(last, stop * blocks)
        if a < z:
            address = address_of(activations) + tiles[i] * blocks * ROW_BYTES
            size = activation_bytes(stop - start, n)
            of_expert = carray(uint8_pointer(address), (size,))
            ops.quantize(x[start:stop], a - start * blocks, z - start * blocks, of_expert)


@exact_kernel  # the same sums on every CPU
def combine(x: Any, route: Any, plan: Any, active: int, out: Any) -> None:
    """See `reference.combine`."""
    _, _, _, _, chosen, pairs, _ = lists(plan)
    for row in range(out.shape[0]):
        out[row] = 0
        for place in range(row * active, (row + 1) * active):
            if pairs[place] < 0:
                break
            weight, source = route[row, chosen[place]], x[pairs[place]]
            for i in range(out.shape[1]):
                out[row, i] += weight * source[i]

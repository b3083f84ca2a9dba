"""The kernels of a mixture of experts against their references and plain arithmetic."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyllama_kernels import blocks, experts, layout, reference
from pyllama_kernels.plans import (
    EXPERTS,
    LISTED,
    PAIRS,
    ROOM,
    lists,
    most_tile_rows,
    new_plan,
    plan_words,
    spans,
)

KERNELS = pytest.mark.parametrize("kernels", [experts, reference], ids=["compiled", "reference"])
F32 = np.float32
NO_BIAS = np.empty(0, F32)

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(0, 40)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, F32)


def routed(
    kernels, x, bias=NO_BIAS, softmax=False, active=2, groups=(1, 1), normalize=True, scale=1.0
):
    out = np.full_like(x, np.nan)
    kernels.route(x, bias, softmax, active, *groups, normalize, scale, out)
    return out


def planned(kernels, route, active, room=None):
    """A plan in memory that held another one."""
    n_rows, count = route.shape
    pairs = n_rows * active if room is None else room
    plan = new_plan(count, pairs, np.full(plan_words(count, pairs), 77, np.int64))
    kernels.make_plan(route, active, plan)
    return plan


def a_route(seed: int, n_rows: int, count: int, active: int) -> np.ndarray:
    """`active` experts for each row, but some weights are 0."""
    rng = np.random.default_rng(seed)
    route = np.zeros((n_rows, count), F32)
    for row in route:
        row[rng.choice(count, active, replace=False)] = rng.uniform(0.1, 1, active)
    return np.where(rng.random(route.shape) < 0.1, F32(0), route)


# --- the router


def expected_route(x, bias, softmax, active, groups, active_groups, normalize, scale):
    """In float64, row by row, by the words of the model's paper."""
    out = np.zeros(x.shape)
    for row, values in zip(out, x.astype(np.float64), strict=True):
        powers = np.exp(values - values.max())
        scores = powers / powers.sum() if softmax else 1 / (1 + np.exp(-values))
        ranked = scores + (bias if bias.size else 0)
        size = len(values) // groups
        best_two = [sum(sorted(ranked[i : i + size])[-2:]) for i in range(0, len(values), size)]
        open_ = sorted(range(groups), key=lambda g: -best_two[g])[:active_groups]
        candidates = [i for i in range(len(values)) if i // size in open_]
        chosen = sorted(candidates, key=lambda i: -ranked[i])[:active]
        total = math.fsum(scores[chosen]) if normalize else 1.0
        row[chosen] = scores[chosen] / total * scale
    return out


@KERNELS
@given(
    rows,
    st.sampled_from([(8, 1, 1, 3), (160, 1, 1, 8), (16, 4, 2, 5), (12, 3, 3, 12), (6, 3, 1, 2)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 2.5]),
    seeds,
)
def test_route(kernels, n_rows, sizes, softmax, with_bias, normalize, scale, seed):
    count, groups, active_groups, active = sizes
    x = normal(seed, n_rows, count) * 3
    bias = normal(seed + 1, count) * F32(0.2) if with_bias else NO_BIAS
    found = routed(kernels, x, bias, softmax, active, (groups, active_groups), normalize, scale)
    expected = expected_route(x, bias, softmax, active, groups, active_groups, normalize, scale)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=0)


@KERNELS
def test_a_bias_chooses_but_does_not_weigh(kernels):
    x = np.log(np.array([[1, 3, 1, 9]], F32))  # sigmoids: 1/2, 3/4, 1/2, 9/10
    bias = np.array([0.5, 0, 0.3, -0.5], F32)
    found = routed(kernels, x, bias, active=2, scale=2.0)
    np.testing.assert_allclose(found, [[1, 0, 1, 0]], rtol=1e-6)
    found = routed(kernels, x, bias, active=3, normalize=False)
    np.testing.assert_allclose(found, [[0.5, 0.75, 0.5, 0]], rtol=1e-6)


@KERNELS
def test_of_equal_scores_the_first_is_chosen(kernels):
    found = routed(kernels, np.zeros((1, 6), F32), active=2)
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0, 0, 0, 0]])
    found = routed(kernels, np.zeros((1, 8), F32), active=2, groups=(4, 1))
    np.testing.assert_array_equal(found, [[0.5, 0.5, 0, 0, 0, 0, 0, 0]])


@KERNELS
def test_groups_are_chosen_by_their_best_two(kernels):
    x = np.array([[5, -9, -9, 2, 2, 2]], F32)
    found = routed(kernels, x, active=2, groups=(2, 1), normalize=False)
    assert (found > 0).tolist() == [[False, False, False, True, True, False]]


@KERNELS
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_as_many_experts_are_chosen_whatever_the_scores_are(kernels, softmax, groups):
    extremes = [np.nan, np.inf, -np.inf, 3e38, -3e38, 0]
    x = np.random.default_rng(0).choice(np.array(extremes, F32), (200, 8))
    x[0], x[1] = np.nan, np.inf
    for bias in (NO_BIAS, np.array([np.nan, np.inf, -np.inf, 0, 1, np.nan, 0, 0], F32)):
        route = routed(kernels, x, bias, softmax, 4, groups, normalize=False)
        assert ((route != 0).sum(axis=1) <= 4).all()
        plan = planned(kernels, route, 4)
        taken = lists(plan)[3][: plan[PAIRS]]
        assert ((taken >= 0) & (taken < 200)).all()


@KERNELS
def test_numbers_are_chosen_before_nan(kernels):
    x = np.array([[np.nan, 1, np.nan, 1, np.nan]], F32)
    np.testing.assert_array_equal(routed(kernels, x), [[0, 0.5, 0, 0.5, 0]])


# --- plans


@KERNELS
def test_a_plan_by_hand(kernels):
    route = np.zeros((5, 4), F32)
    route[[0, 1, 2, 3, 4], 3] = 1
    route[[0, 4], 1] = 0.5
    plan = planned(kernels, route, 2, room=12)
    assert plan[[PAIRS, LISTED, EXPERTS, ROOM]].tolist() == [7, 2, 4, 12]
    listed, firsts, tiles, row_of, chosen, pairs, _ = (part.tolist() for part in lists(plan))
    assert listed[:2] == [1, 3]
    assert firsts[:3] == [0, 2, 7]
    assert tiles[:3] == [0, 4, 12]  # two rows take a tile of 4, five one of 8
    assert row_of[:7] == [0, 4, 0, 1, 2, 3, 4]
    assert chosen[:10] == [1, 3, 3, -1, 3, -1, 3, -1, 1, 3]
    assert pairs[:10] == [0, 2, 3, -1, 4, -1, 5, -1, 1, 6]


@KERNELS
@given(rows, st.integers(1, 12), st.data(), seeds)
def test_a_plan_holds_every_pair_once(kernels, n_rows, count, data, seed):
    active = data.draw(st.integers(1, count))
    route = a_route(seed, n_rows, count, active)
    plan = planned(kernels, route, active, room=n_rows * active + 3)
    row_of, chosen, pairs = (part.tolist() for part in lists(plan)[3:6])
    found, seen = [], 0
    for expert, span, tile in spans(plan):
        found += [(row_of[pair], expert) for pair in range(span.start, span.stop)]
        assert tile == seen
        seen += layout.activation_bytes(span.stop - span.start, 32) // layout.ROW_BYTES
    assert found == [(row, expert) for expert, row in np.argwhere(route.T != 0).tolist()]
    assert plan[PAIRS] == len(found)
    assert seen <= most_tile_rows(n_rows * active, count)
    for place in range(n_rows * active):
        if pairs[place] >= 0:
            assert found[pairs[place]] == (place // active, chosen[place])
        else:
            assert chosen[place] == -1


@KERNELS
def test_a_route_of_too_many_experts_stays_within_the_plan(kernels):
    plan = planned(kernels, np.ones((6, 9), F32), 2)
    assert plan[PAIRS] == 12
    assert lists(plan)[4].tolist() == [0, 1] * 6
    assert len(lists(plan)[6]) == 9


def test_tiles_never_take_more_rows_than_planned():
    worst = [0] * 65  # of so many pairs
    for pairs in range(1, 65):
        for rows_ in range(1, pairs + 1):
            size = layout.activation_bytes(rows_, 32) // layout.ROW_BYTES
            worst[pairs] = max(worst[pairs], worst[pairs - rows_] + size)
        assert worst[pairs] <= most_tile_rows(pairs, 64) <= 2 * pairs
        whole = layout.activation_bytes(pairs, 32) // layout.ROW_BYTES
        assert whole <= most_tile_rows(pairs, 1)


# --- rows of experts


@KERNELS
@given(rows, st.integers(1, 9), st.integers(1, 3), st.data(), seeds)
@example(1, 8, 3, None, 0)
def test_rows_of_experts_are_quantized_as_small_batches(
    kernels, n_rows, count, n_blocks, data, seed
):
    active = data.draw(st.integers(1, count)) if data else 3
    plan = planned(reference, a_route(seed, n_rows, count, active), active)
    n, n_pairs = 32 * n_blocks, int(plan[PAIRS])
    x = normal(seed, n_rows * active, n)
    room = most_tile_rows(n_rows * active, count) * n_blocks * layout.ROW_BYTES
    tiles = np.zeros(room + 64, np.uint8)
    tiles[room:] = 99
    if kernels is reference:
        kernels.quantize_experts(x, plan, tiles)
    else:
        total = n_pairs * n_blocks
        for first, last in pairwise([0, total // 3, total // 2, total]):
            kernels.quantize_experts(x, plan, first, last, tiles)
    expected = blocks.dequantize_q80(blocks.quantize_q80(x)).reshape(x.shape)
    for _, span, tile in spans(plan):
        of_expert = tiles[tile * n_blocks * layout.ROW_BYTES :]
        found = layout.unpack_activations(of_expert, span.stop - span.start, n)
        np.testing.assert_array_equal(found, expected[span])
    assert (tiles[room:] == 99).all()


@KERNELS
@given(rows, st.integers(1, 9), st.integers(0, 20), st.data(), seeds)
def test_combine_adds_in_the_order_of_the_experts(kernels, n_rows, count, n, data, seed):
    active = data.draw(st.integers(1, count))
    route = a_route(seed, n_rows, count, active)
    plan = planned(reference, route, active)
    x = normal(seed, n_rows * active, n + 4)[:, 2 : 2 + n]
    out = np.full((n_rows, n + 4), np.nan, F32)
    kernels.combine(x, route, plan, active, out[:, 2 : 2 + n])
    expected = np.zeros((n_rows, n), F32)
    row_of = lists(plan)[3]
    for expert, span, _ in spans(plan):
        for pair in range(span.start, span.stop):
            expected[row_of[pair]] += route[row_of[pair], expert] * x[pair]
    np.testing.assert_array_equal(out[:, 2 : 2 + n], expected)
    assert np.isnan(out[:, :2]).all()
    assert np.isnan(out[:, 2 + n :]).all()

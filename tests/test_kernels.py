"""The compiled kernels of a layer and their reference implementations, against plain arithmetic.

Products of matrices are in `test_matrix`, attention in `test_attention`.
"""

import itertools
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyllama_dist.ops.rope import rope_tables
from pyllama_kernels import blocks, jit, oploop, ops, optable, reference, warm_up
from pyllama_kernels.exponential import exp, exp_of_differences

KERNELS = pytest.mark.parametrize("kernels", [ops, reference], ids=["compiled", "reference"])
F32 = np.float32

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(0, 33)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, F32)


# --- Q80

values32 = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=True)


@given(arrays(F32, st.tuples(st.integers(0, 3), st.just(32)), elements=values32))
@example(np.zeros((1, 32), F32))
@example(np.full((1, 32), 1e-44, F32))  # the scale's inverse is no float32
@example(np.linspace(-127, 127, 32, dtype=F32)[None] * F32(1.5))
@example(np.array([[127, *np.arange(-15, 16) + 0.5]], F32))  # ties
def test_quantizing_gives_the_bytes_of_the_converter(x):
    assert_same_blocks(x)


def test_quantizing_many_blocks_gives_the_bytes_of_the_converter():
    rng = np.random.default_rng(0)
    x = normal(1, 100_000, 32) * np.exp(rng.uniform(-12, 12, (100_000, 1))).astype(F32)
    assert_same_blocks(x)


def assert_same_blocks(x: np.ndarray) -> None:
    expected = blocks.quantize_q80(x)
    for kernels in (ops, reference):
        packed = np.empty((len(x), 34), np.uint8)
        kernels.pack_q80(x, packed)
        np.testing.assert_array_equal(packed, expected)


# --- what a layer does between its products


@KERNELS
@given(rows, st.sampled_from((1, 7, 16, 33, 64, 100)), st.sampled_from((0.0, 1e-5, 1.0)), seeds)
def test_rms_norm(kernels, n_rows, n, epsilon, seed):
    x, weight = normal(seed, n_rows, n), normal(seed + 1, n)
    out = np.full_like(x, np.nan)
    kernels.rms_norm(x, weight, epsilon, out)
    for row, found in zip(x.astype(np.float64), out, strict=True):
        length = math.sqrt(math.fsum(value * value for value in row) / n + epsilon)
        np.testing.assert_allclose(found, row / length * weight, rtol=5e-6)


@KERNELS
@given(rows, st.sampled_from((1, 7, 16, 33, 64, 100)), st.sampled_from((1e-6, 1e-3)), seeds)
def test_layer_norm(kernels, n_rows, n, epsilon, seed):
    x, weight, bias = normal(seed, n_rows, n) + F32(3), normal(seed + 1, n), normal(seed + 2, n)
    out = np.full_like(x, np.nan)
    kernels.layer_norm(x, weight, bias, epsilon, out)
    for row, found in zip(x.astype(np.float64), out, strict=True):
        mean = math.fsum(row) / n
        variance = math.fsum((value - mean) ** 2 for value in row) / n
        expected = (row - mean) / math.sqrt(variance + epsilon) * weight + bias
        np.testing.assert_allclose(found, expected, atol=2e-3 if n == 1 else 5e-5)


@KERNELS
@given(rows, st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), seeds)
def test_concat(kernels, n_rows, heads, n, m, seed):
    first, second = normal(seed, n_rows, heads, n), normal(seed + 1, n_rows, heads, m)
    out = np.full((n_rows, heads, n + m), np.nan, F32)
    kernels.concat(first, second, out)
    np.testing.assert_array_equal(out[:, :, :n], first)
    np.testing.assert_array_equal(out[:, :, n:], second)


@KERNELS
@given(rows, st.integers(1, 5), st.integers(0, 8), st.integers(0, 9), st.booleans(), seeds)
def test_rope_is_a_turn_of_complex_numbers(kernels, n_rows, heads, pairs, rest, halves, seed):
    seq_len, theta = 50, 10_000.0
    cos, sin = rope_tables(seq_len, 2 * pairs, theta)
    x = normal(seed, n_rows, heads + 2, 2 * pairs + rest)[:, 1 : 1 + heads]
    positions = np.random.default_rng(seed).integers(0, seq_len, n_rows)
    before, outside = x.copy(), x.base[:, 0].copy()
    kernels.rope(positions, cos, sin, halves, x)
    real, imaginary = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    if halves:
        real, imaginary = slice(0, pairs), slice(pairs, 2 * pairs)
    rotated = before[:, :, real] + 1j * before[:, :, imaginary]
    for pair in range(pairs):
        angles = positions * theta ** (-pair / pairs)
        expected = rotated[:, :, pair] * np.exp(1j * angles)[:, None]
        found = x[:, :, real][:, :, pair] + 1j * x[:, :, imaginary][:, :, pair]
        np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_array_equal(x[:, :, 2 * pairs :], before[:, :, 2 * pairs :])
    np.testing.assert_array_equal(x.base[:, 0], outside)


@KERNELS
def test_rotated_products_depend_on_the_distance_alone(kernels):
    cos, sin = rope_tables(64, 16, 10_000.0)
    query, key = normal(1, 16), normal(2, 16)
    products = []
    for start in (0, 7, 40):
        x = np.stack([query, key])[:, None].copy()  # [rows, 1, 16]
        kernels.rope(np.array([start + 9, start]), cos, sin, False, x)
        products.append(float(x[0, 0].astype(np.float64) @ x[1, 0]))
    np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-5)


def exponentials(x: np.ndarray) -> np.ndarray:
    return np.array([exp(value) for value in x], F32)


def test_exp_is_right_to_about_a_unit_in_the_last_place():
    x = np.concatenate([np.linspace(-87, 88, 20_001), np.geomspace(1e-30, 88, 500), [-0.0]])
    x = np.concatenate([x, -np.geomspace(1e-30, 87, 500)]).astype(F32)
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(exponentials(x) - expected) <= 2e-7 * expected).all()


@given(st.floats(-87, 88, width=32))
def test_exp_of_any_number_in_range(x):
    expected = math.exp(x)
    assert abs(float(exp(F32(x))) - expected) <= 2e-7 * expected


def test_exp_beyond_its_range():
    below = np.nextafter(F32(-87), F32(-np.inf))
    above = np.nextafter(F32(88), F32(np.inf))
    small = np.array([below, -88, -1000, -3e38, -np.inf], F32)
    large = np.array([above, 89, 1000, 3e38, np.inf], F32)
    np.testing.assert_array_equal(exponentials(small), 0)
    np.testing.assert_array_equal(exponentials(large), np.inf)
    assert exponentials(np.zeros(1, F32)) == 1


@given(st.integers(1, 5), st.sampled_from((1.0, 60.0)), st.booleans(), seeds)
def test_exponentials_of_differences_and_their_sum(vectors, size, ended, seed):
    x = normal(seed, 16 * vectors) * F32(size)
    if ended:
        x[7:] = -np.inf
    top = x.max() + F32(seed % 3)
    differences = (x - top).astype(np.float64)
    expected = np.where(differences < -87, 0, np.exp(differences))
    total = exp_of_differences(x.ctypes.data, top, vectors)
    assert (np.abs(x - expected) <= 2e-7 * expected).all()
    assert total == pytest.approx(expected.sum(), rel=2e-6)


@KERNELS
@given(st.integers(0, 100), st.sampled_from((1.0, 30.0)), seeds)
def test_silu_mul(kernels, n, size, seed):
    gate, up = normal(seed, n) * F32(size), normal(seed + 1, n)
    out = np.full(n, np.nan, F32)
    kernels.silu_mul(gate, up, out)
    expected = [
        float(g) / (1 + math.exp(-float(g))) * float(u) for g, u in zip(gate, up, strict=True)
    ]
    # Below -88 the exponential is no float32 any more, and the result is 0.
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-35)


@KERNELS
def test_silu_of_extreme_values(kernels):
    gate, out = np.array([-3e38, -200, -0.0, 0, 200, 3e38], F32), np.empty(6, F32)
    kernels.silu_mul(gate, np.ones(6, F32), out)
    np.testing.assert_array_equal(out, [0, 0, 0, 0, 200, F32(3e38)])


@KERNELS
@given(st.integers(1, 9), st.integers(0, 40), seeds)
def test_merge_f32_adds_in_the_order_of_the_nodes(kernels, n_parts, n, seed):
    parts = normal(seed, n_parts, n + 5)[:, 2 : 2 + n]
    out = np.full(n, np.nan, F32)
    kernels.merge_f32(parts, out)
    expected = parts[0].copy()
    for part in parts[1:]:
        expected = expected + part
    np.testing.assert_array_equal(out, expected)


@KERNELS
@given(st.integers(1, 9), st.integers(0, 5), seeds)
def test_merge_q80(kernels, n_parts, n_blocks, seed):
    packed = blocks.quantize_q80(normal(seed, n_parts, 32 * (n_blocks + 2)))
    parts = packed.reshape(n_parts, n_blocks + 2, 34)[:, 1 : 1 + n_blocks]
    out = np.full((n_blocks, 32), np.nan, F32)
    kernels.merge_q80(parts, out)
    expected = np.zeros((n_blocks, 32))
    for part in parts:
        for b in range(n_blocks):
            d, *values = struct.unpack("<e32b", part[b].tobytes())
            expected[b] += [d * value for value in values]
    np.testing.assert_allclose(out, expected, atol=1e-6 * n_parts)


@KERNELS
@given(st.integers(0, 70), seeds)
def test_add(kernels, n, seed):
    x, out = normal(seed, n), normal(seed + 1, n)
    expected = [F32(a + b) for a, b in zip(x, out, strict=True)]
    kernels.add(x, out)
    np.testing.assert_array_equal(out, np.array(expected, F32))


@KERNELS
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 20), seeds)
def test_gather(kernels, n_rows, count, n, seed):
    x = normal(seed, n_rows, n)
    index = np.random.default_rng(seed).integers(0, n_rows, count)
    out = np.full((count, n), np.nan, F32)
    kernels.gather(x, index, out)
    for found, row in zip(out, index, strict=True):
        np.testing.assert_array_equal(found, x[row])


# --- splits of work among threads


@given(st.integers(0, 10_000), st.integers(1, 33))
def test_a_split_tiles_the_whole(total, n_threads):
    ranges = [optable.split(total, thread, n_threads) for thread in range(n_threads)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == total
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 10_000), st.integers(1, 33))
def test_a_guided_split_tiles_the_whole_and_its_parts_get_smaller(total, parts):
    ranges = [oploop.guided_split(total, part, parts) for part in range(parts)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == total
    sizes = [stop - start for start, stop in ranges]
    assert all(later <= sooner + 1 for sooner, later in itertools.pairwise(sizes))
    assert abs(sizes[-1] - total / parts**3) <= 1


@pytest.mark.skipif(jit.CACHE is None, reason="compiled code is not kept here")
def test_what_is_compiled_ahead_is_what_the_op_loop_calls():
    """With other types of arguments it would be compiled again, and nobody would see."""
    warm_up.compile_attention()
    warm_up.compile_rest()
    warm_up.warm_up()
    large = ("products.multiply", "entries.rms_norm", "entries.attend", "oploop.run")
    for name in large:
        # A folder for each place that the sources are in, a file for each combination of types.
        folders = [path.parent for path in jit.CACHE.glob(f"**/{name}-*.nbc")]
        assert len(folders) == len(set(folders)) > 0, name

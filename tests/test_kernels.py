"""Every compiled kernel against its NumPy twin, and the twins against plain arithmetic.

Outputs are cut out of wider arrays where the op loop does so for a thread's share.
"""

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyllama_dist.executor.memory import rope_tables
from pyllama_kernels import blocks, oploop, portable, reference

KERNELS = pytest.mark.parametrize("kernels", [portable, reference], ids=["portable", "reference"])
F32 = np.float32

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(0, 33)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, F32)


def strided(*shape: int) -> np.ndarray:
    """Part of a wider array: neither its start nor its rows are aligned to anything."""
    *outer, last = shape
    return np.full((*outer, last + 5), np.nan, F32)[..., 2 : 2 + last]


def untouched(out: np.ndarray) -> bool:
    """Nothing was written beside a strided output."""
    whole = out.base
    return bool(np.isnan(whole[..., :2]).all() and np.isnan(whole[..., 2 + out.shape[-1] :]).all())


# --- float16


def test_every_half_has_its_value():
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = np.array([portable.half_to_float(np.uint32(half)) for half in bits], F32)
    expected = bits.view(np.float16).astype(F32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def halves_of(values: np.ndarray) -> np.ndarray:
    return np.array([portable.float_to_half(value) for value in values], np.uint16)


def numpy_halves(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).view(np.uint16)


def test_halves_of_floats_are_rounded_as_numpy_rounds():
    bits = np.random.default_rng(1).integers(0, 1 << 32, 50_000, np.uint64).astype(np.uint32)
    in_range = np.random.default_rng(2).integers(0x32000000, 0x48000000, 50_000, np.uint32)
    values = np.concatenate([bits, in_range, in_range | 0x80000000]).view(F32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(halves_of(values), numpy_halves(values))


def test_halves_at_and_beside_every_tie():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    ties = (halves[:-1] + halves[1:]) / 2  # exact: float32 has 13 more bits
    for values in (halves, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf))):
        np.testing.assert_array_equal(halves_of(values), numpy_halves(values))
        np.testing.assert_array_equal(halves_of(-values), numpy_halves(-values))


@pytest.mark.parametrize("value", [0.0, -0.0, 65519.99, 65520.0, 1e-8, 6e-8, np.inf, -np.inf])
def test_halves_of_special_values(value):
    values = np.array([value], F32)
    assert halves_of(values) == numpy_halves(values)


def test_a_half_of_nan_is_nan():
    for bits in (0x7FC00000, 0xFFC00000, 0x7F800001):
        half = halves_of(np.array([bits], np.uint32).view(F32))
        assert np.isnan(half.view(np.float16)).all()


# --- Q80

values32 = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=True)


@given(arrays(F32, st.tuples(st.integers(0, 3), st.just(32)), elements=values32))
@example(np.zeros((1, 32), F32))
@example(np.full((1, 32), 1e-44, F32))  # the scale's inverse is no float32
@example(np.linspace(-127, 127, 32, dtype=F32)[None] * F32(1.5))
def test_quantizing_gives_the_bytes_of_the_converter(x):
    assert_same_blocks(x)


def test_quantizing_many_blocks_gives_the_bytes_of_the_converter():
    rng = np.random.default_rng(0)
    x = normal(1, 100_000, 32) * np.exp(rng.uniform(-12, 12, (100_000, 1))).astype(F32)
    assert_same_blocks(x)


def assert_same_blocks(x: np.ndarray) -> None:
    expected = blocks.quantize_q80(x)
    for kernels in (portable, reference):
        packed = np.empty((len(x), 34), np.uint8)
        kernels.pack_q80(x, packed)
        np.testing.assert_array_equal(packed, expected)
        values, scales = np.empty((len(x), 32), np.int8), np.empty(len(x), F32)
        kernels.quantize(x, values, scales)
        np.testing.assert_array_equal(values, expected[:, 2:].view(np.int8))
        np.testing.assert_array_equal(scales, expected[:, :2].copy().view("<f2")[:, 0])


# --- matrices


def q40_value(row: np.ndarray, i: int) -> float:
    """Value `i` of one row of blocks, [blocks, 18]."""
    block, place = row[i // 32], i % 32
    (d,) = struct.unpack("<e", block[:2].tobytes())
    halves = int(block[2 + place % 16])
    return ((halves >> 4 if place >= 16 else halves & 15) - 8) * d


def q80_value(row: np.ndarray, i: int) -> float:
    (d,) = struct.unpack("<e", row[i // 32, :2].tobytes())
    (q,) = struct.unpack("<b", row[i // 32, 2 + i % 32].tobytes())
    return q * d


QUANTIZED = {
    "q40": (blocks.quantize_q40, 18, q40_value),
    "q80": (blocks.quantize_q80, 34, q80_value),
}


def assert_product(out, x, weight, bias):
    """`out` is x @ weight.T + bias to within the rounding of float32 sums."""
    exact = np.einsum("rn,mn->rm", x.astype(np.float64), weight.astype(np.float64))
    sizes = np.einsum("rn,mn->rm", np.abs(x, dtype=np.float64), np.abs(weight, dtype=np.float64))
    if bias.size:
        exact += bias
        sizes += np.abs(bias)
    error = np.abs(out - exact)
    assert (error <= 2e-6 * sizes + 1e-30).all(), error.max()


@KERNELS
@settings(max_examples=40)
@given(rows, st.integers(0, 70), st.integers(0, 40), st.booleans(), seeds)
@example(33, 64, 31, True, 0)
@example(1, 0, 3, True, 0)
@example(0, 5, 3, False, 0)
def test_matmul_f32(kernels, n_rows, n, m, with_bias, seed):
    x, weight = normal(seed, n_rows, n), normal(seed + 1, m, n)
    bias = normal(seed + 2, m if with_bias else 0)
    out = strided(n_rows, m)
    kernels.matmul_f32(x, weight, bias, out)
    assert_product(out, x, weight, bias)
    assert untouched(out)


@KERNELS
@pytest.mark.parametrize("kind", ["q40", "q80"])
@settings(max_examples=30)
@given(rows, st.integers(0, 5), st.integers(0, 20), st.booleans(), seeds)
@example(33, 3, 7, True, 0)
@example(2, 0, 3, True, 0)
@example(0, 2, 3, False, 0)
def test_matmul_of_blocks(kernels, kind, n_rows, n_blocks, m, with_bias, seed):
    quantize, size, value = QUANTIZED[kind]
    n = 32 * n_blocks
    weight = quantize(normal(seed, m, n)).reshape(m, n_blocks, size)
    bias = normal(seed + 1, m if with_bias else 0)
    values, scales = np.empty((n_rows, n), np.int8), np.empty((n_rows, n_blocks), F32)
    x = normal(seed + 2, n_rows, n)
    reference.quantize(x.reshape(-1, 32), values.reshape(-1, 32), scales.reshape(-1))
    out = strided(n_rows, m)
    getattr(kernels, f"matmul_{kind}")(values, scales, weight, bias, out)
    plain = np.array([[value(row, i) for i in range(n)] for row in weight]).reshape(m, n)
    assert_product(out, values * np.repeat(scales, 32, axis=1), plain, bias)
    assert untouched(out)


@pytest.mark.parametrize("kind", ["q40", "q80"])
def test_matmul_of_the_largest_blocks_does_not_overflow(kind):
    _, size, value = QUANTIZED[kind]
    weight = np.zeros((1, 2, size), np.uint8)
    weight[:, :, :2] = np.frombuffer(struct.pack("<e", 1.0), np.uint8)
    weight[:, :, 2:] = 0 if kind == "q40" else 0x80  # -8 and -128
    values, scales = np.full((1, 64), -128, np.int8), np.ones((1, 2), F32)
    out = strided(1, 1)
    getattr(portable, f"matmul_{kind}")(values, scales, weight, np.empty(0, F32), out)
    assert out[0, 0] == 64 * -128 * value(weight[0], 0)


# --- the rest of a layer


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
@given(rows, st.integers(1, 5), st.integers(0, 8), st.integers(0, 9), seeds)
def test_rope_is_a_turn_of_complex_numbers(kernels, n_rows, heads, pairs, rest, seed):
    seq_len, theta = 50, 10_000.0
    cos, sin = rope_tables(seq_len, 2 * pairs, theta)
    x = normal(seed, n_rows, heads + 2, 2 * pairs + rest)[:, 1 : 1 + heads]
    positions = np.random.default_rng(seed).integers(0, seq_len, n_rows)
    before, outside = x.copy(), x.base[:, 0].copy()
    kernels.rope(positions, cos, sin, x)
    turned = before[:, :, 0 : 2 * pairs : 2] + 1j * before[:, :, 1 : 2 * pairs : 2]
    for pair in range(pairs):
        angles = positions * theta ** (-pair / pairs)
        expected = turned[:, :, pair] * np.exp(1j * angles)[:, None]
        found = x[:, :, 2 * pair] + 1j * x[:, :, 2 * pair + 1]
        np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_array_equal(x[:, :, 2 * pairs :], before[:, :, 2 * pairs :])
    np.testing.assert_array_equal(x.base[:, 0], outside)


@KERNELS
def test_turned_products_depend_on_the_distance_alone(kernels):
    cos, sin = rope_tables(64, 16, 10_000.0)
    query, key = normal(1, 16), normal(2, 16)
    products = []
    for start in (0, 7, 40):
        x = np.stack([query, key])[:, None].copy()  # [rows, 1, 16]
        kernels.rope(np.array([start + 9, start]), cos, sin, x)
        products.append(float(x[0, 0].astype(np.float64) @ x[1, 0]))
    np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-5)


@KERNELS
@given(st.integers(0, 12), st.integers(1, 4), st.sampled_from((1, 5, 16)), seeds)
def test_store_writes_its_rows_and_no_others(kernels, n_rows, heads, head_dim, seed):
    n_slots, seq_len = 3, 10
    rng = np.random.default_rng(seed)
    places = rng.permutation(n_slots * seq_len)[:n_rows]
    slots, positions = places // seq_len, places % seq_len
    x = normal(seed, n_rows, heads + 1, head_dim)[:, 1:]
    cache = np.zeros((n_slots, heads + 1, seq_len, head_dim), F32)
    kernels.store(x, slots, positions, cache[:, 1:])
    expected = np.zeros_like(cache)
    for row in range(n_rows):
        for head in range(heads):
            expected[slots[row], 1 + head, positions[row]] = x[row, head]
    np.testing.assert_array_equal(cache, expected)


@KERNELS
@settings(max_examples=30)
@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from((1, 6, 16, 33)),
    st.sampled_from((0.1, 1.0, 100.0)),
    seeds,
)
def test_attention(kernels, n_rows, heads, group, first, head_dim, size, seed):
    n_slots, seq_len = 2, 12
    kv_heads = (first + heads - 1) // group + 1
    query = normal(seed, n_rows, heads + 1, head_dim)[:, 1:] * F32(size)
    query = np.ascontiguousarray(query)
    keys = normal(seed + 1, n_slots, kv_heads, seq_len, head_dim)
    values = normal(seed + 2, n_slots, kv_heads, seq_len, head_dim)
    rng = np.random.default_rng(seed)
    slots, positions = rng.integers(0, n_slots, n_rows), rng.integers(0, seq_len, n_rows)
    out = np.full((n_rows, heads + 2, head_dim), np.nan, F32)
    kernels.attention(query, keys, values, slots, positions, first, group, out[:, 1 : 1 + heads])
    for row in range(n_rows):
        for head in range(heads):
            source = slots[row], (first + head) // group
            scores = [
                float(query[row, head].astype(np.float64) @ keys[source][position])
                / math.sqrt(head_dim)
                for position in range(positions[row] + 1)
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            expected = sum(
                w / sum(weights) * values[source][position].astype(np.float64)
                for position, w in enumerate(weights)
            )
            np.testing.assert_allclose(out[row, 1 + head], expected, atol=2e-5 * max(1, size))
    assert np.isnan(out[:, [0, -1]]).all()


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
            expected[b] += [q80_value(part[b : b + 1], i) for i in range(32)]
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


# --- threads' shares


@given(st.integers(0, 10_000), st.integers(1, 33))
def test_shares_of_threads_tile_the_whole(total, n_threads):
    shares = [oploop.share(total, thread, n_threads) for thread in range(n_threads)]
    assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
    assert shares[-1][1] == total
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1

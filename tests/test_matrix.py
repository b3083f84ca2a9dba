"""Matrix products: the layout of what goes in, and what comes out on every kind of CPU.

Outputs are cut out of wider arrays, as the op loop does for a thread's share.
"""

import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllama_kernels import blocks, cpu, layout, ops, reference

F32 = np.float32
NO_BIAS = np.empty(0, F32)

seeds = st.integers(0, 2**32 - 1)
ROWS = (0, 1, 2, 4, 5, 8, 9, 16, 17, 20, 24, 33, 70)
rows = st.sampled_from(ROWS)


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


# --- weights in groups


def random_weights(seed: int, m: int, n_blocks: int) -> np.ndarray:
    """Q40 blocks with any nibbles and finite scales, [m, n_blocks, 18] uint8."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (m, n_blocks, 18), np.uint8)
    scales = rng.uniform(-1, 1, (m, n_blocks, 1)).astype(np.float16)
    found[..., :2] = scales.view(np.uint8)
    return found


sizes = st.integers(0, 40), st.integers(0, 4)


@given(*sizes, seeds)
def test_every_weight_lies_where_the_layout_says(m, n_blocks, seed):
    weights = random_weights(seed, m, n_blocks)
    packed = layout.pack_weights(weights)
    assert packed.shape == (-(-m // 16), n_blocks, 288)
    for row in range(m):
        for block in range(n_blocks):
            cell = packed[row // 16, block]
            scale = cell[2 * (row % 16) :][:2]
            np.testing.assert_array_equal(scale, weights[row, block, :2])
            nibbles = []
            for i in range(32):
                byte = int(cell[32 + 64 * (i % 16 // 4) + 4 * (row % 16) + i % 4])
                nibbles.append(byte >> 4 if i >= 16 else byte & 15)
            low_high = [n | h << 4 for n, h in zip(nibbles[:16], nibbles[16:], strict=True)]
            np.testing.assert_array_equal(low_high, weights[row, block, 2:])


@given(*sizes, seeds)
def test_weights_come_back_from_their_groups(m, n_blocks, seed):
    weights = random_weights(seed, m, n_blocks)
    unpacked = layout.unpack_weights(layout.pack_weights(weights))
    np.testing.assert_array_equal(unpacked[:m], weights)
    assert not unpacked[m:].any()


@given(st.integers(0, 40), st.integers(1, 4), seeds)
def test_weights_are_packed_in_place(m, n_blocks, seed):
    weights = random_weights(seed, m, n_blocks)
    room = np.zeros(layout.packed_rows(m) * n_blocks * 18, np.uint8)
    room[: weights.size] = weights.reshape(-1)
    spare = np.empty(n_blocks * 144, np.uint16)
    layout.pack_weights_in_place(room.view(np.uint16), n_blocks, spare)
    np.testing.assert_array_equal(room, layout.pack_weights(weights).reshape(-1))


# --- activations in tiles


def random_batch(seed: int, n_rows: int, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Values, [rows, n] int8, and scales, [rows, n / 32] float32."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (n_rows, 32 * n_blocks)).astype(np.int8)
    return values, rng.uniform(0, 2, (n_rows, n_blocks)).astype(F32)


def tiles(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    packed = np.zeros(layout.activation_bytes(len(values), values.shape[1]), np.uint8)
    layout.pack_activations(values, scales, packed)
    return packed


def test_a_row_alone_is_its_values_its_scale_and_its_offset():
    values, scales = np.arange(32, dtype=np.int8)[None], np.array([[0.5]], F32)
    expected = bytes(range(32)) + struct.pack("<fi", 0.5, -8 * 496)
    assert tiles(values, scales).tobytes() == expected


@given(rows, st.integers(0, 4), seeds)
def test_every_activation_lies_where_the_layout_says(n_rows, n_blocks, seed):
    values, scales = random_batch(seed, n_rows, n_blocks)
    packed = tiles(values, scales)
    for row in range(n_rows):
        first, place = row // 16 * 16, row % 16
        t = min(size for size in (1, 4, 8, 16) if size >= min(16, n_rows - first))
        for block in range(n_blocks):
            cell = packed[(first * n_blocks + block * t) * 40 :].tobytes()
            held = np.frombuffer(cell, np.int8, 32, 32 * place)
            expected = values[row, 32 * block : 32 * block + 32]
            np.testing.assert_array_equal(held, expected)
            (scale,) = struct.unpack_from("<f", cell, 32 * t + 4 * place)
            (offset,) = struct.unpack_from("<i", cell, 36 * t + 4 * place)
            assert (scale, offset) == (scales[row, block], -8 * sum(map(int, expected)))


@given(rows, st.integers(0, 4), seeds)
def test_a_batch_comes_back_from_its_tiles(n_rows, n_blocks, seed):
    values, scales = random_batch(seed, n_rows, n_blocks)
    found = layout.unpack_activations(tiles(values, scales), n_rows, 32 * n_blocks)
    np.testing.assert_array_equal(found, values * np.repeat(scales, 32, axis=1))


@pytest.mark.parametrize("n_rows", range(41))
@pytest.mark.parametrize("n_threads", [1, 3])
def test_quantizing_gives_the_bytes_of_the_reference(n_rows, n_threads):
    x = normal(n_rows, n_rows, 96) * F32(7)
    x[: n_rows // 2, :32] = 0
    expected = np.zeros(layout.activation_bytes(n_rows, 96), np.uint8)
    reference.quantize(x, expected)
    found = np.zeros_like(expected)
    for thread in range(n_threads):
        first, last = (3 * n_rows * part // n_threads for part in (thread, thread + 1))
        ops.quantize(x, first, last, found)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernels", [ops, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("n_rows", [2, 5, 12, 18, 27])
def test_what_a_tile_has_beyond_the_batch_is_scaled_to_zero(kernels, n_rows):
    """Leftovers, as these 0x01, would become denormal numbers, at which CPUs are slow."""
    packed = np.full(layout.activation_bytes(n_rows, 96), 0x01, np.uint8)
    blocks = () if kernels is reference else (0, 3 * n_rows)
    kernels.quantize(normal(0, n_rows, 96), *blocks, packed)
    rest = layout.unpack_activations(packed, layout.padded_rows(n_rows), 96)[n_rows:]
    np.testing.assert_array_equal(rest, 0)
    assert len(rest)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_smaller_batch_has_room_where_a_larger_one_has(n_rows, more):
    assert layout.activation_bytes(n_rows, 64) <= layout.activation_bytes(n_rows + more, 64)


# --- products


def q40_value(row: np.ndarray, i: int) -> float:
    """Value `i` of one row of blocks, [blocks, 18]."""
    block, place = row[i // 32], i % 32
    (d,) = struct.unpack("<e", block[:2].tobytes())
    halves = int(block[2 + place % 16])
    return ((halves >> 4 if place >= 16 else halves & 15) - 8) * d


def q80_value(row: np.ndarray, i: int) -> float:
    """Value `i` of one row of blocks, [blocks, 34]."""
    (d,) = struct.unpack("<e", row[i // 32, :2].tobytes())
    (q,) = struct.unpack("<b", row[i // 32, 2 + i % 32].tobytes())
    return q * d


def assert_product(out, x, weight, bias):
    """`out` is x @ weight.T + bias to within the rounding of float32 sums."""
    exact = np.einsum("rn,mn->rm", x.astype(np.float64), weight.astype(np.float64))
    sizes = np.einsum("rn,mn->rm", np.abs(x, dtype=np.float64), np.abs(weight, dtype=np.float64))
    if bias.size:
        exact += bias
        sizes += np.abs(bias)
    error = np.abs(out - exact)
    assert (error <= 2e-6 * sizes + 1e-30).all(), error.max()


@pytest.mark.parametrize("kernels", [ops, reference], ids=["compiled", "reference"])
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


@pytest.mark.parametrize("kernels", [ops, reference], ids=["compiled", "reference"])
@settings(max_examples=30)
@given(rows, st.integers(0, 4), st.integers(0, 20), st.booleans(), seeds)
@example(33, 3, 7, True, 0)
@example(2, 0, 3, True, 0)
def test_matmul_q80(kernels, n_rows, n_blocks, m, with_bias, seed):
    n = 32 * n_blocks
    weight = blocks.quantize_q80(normal(seed, m, n)).reshape(m, n_blocks, 34)
    bias = normal(seed + 1, m if with_bias else 0)
    values, scales = random_batch(seed, n_rows, n_blocks)
    out = strided(n_rows, m)
    kernels.matmul_q80(tiles(values, scales), n_rows, weight, bias, out)
    plain = np.array([[q80_value(row, i) for i in range(n)] for row in weight]).reshape(m, n)
    assert_product(out, values * np.repeat(scales, 32, axis=1), plain, bias)
    assert untouched(out)


def test_matmul_q80_of_the_largest_blocks_does_not_overflow():
    weight = np.zeros((1, 2, 34), np.uint8)
    weight[:, :, :2] = np.frombuffer(struct.pack("<e", 1.0), np.uint8)
    weight[:, :, 2:] = 0x80  # -128
    out = strided(1, 1)
    batch = tiles(np.full((1, 64), -128, np.int8), np.ones((1, 2), F32))
    ops.matmul_q80(batch, 1, weight, NO_BIAS, out)
    assert out[0, 0] == 64 * 128 * 128


# --- the Q40 product of every instruction set


def runs_here(name: str) -> bool:
    """Whether this CPU can run the product of an instruction set."""
    possible = {kind.name for kind in cpu.choose(cpu.PORTABLE).candidates if kind.possible}
    # The 256-bit form of its one instruction is also part of AVX-512.
    return name in possible or (name == "avx_vnni" and "avx512_vnni" in possible)


# AMX rounds to bf16, so that it agrees with nothing here.
NAMES = [name for name in (*cpu.NEEDS.get(cpu.host().machine, ()), cpu.PORTABLE) if name != "amx"]
HERE = [name for name in NAMES if runs_here(name)]
EVERY = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(name not in HERE, reason=f"the CPU cannot run {name}"),
                *([pytest.mark.slow] if name != HERE[0] else []),
            ],
        )
        for name in NAMES
    ],
)


def q40_product(isa, batch, n_rows, weight, bias, m):
    """`matmul_q40` of an instruction set into part of a wider array."""
    out = strided(n_rows, m)
    cpu.load(isa).matmul_q40(batch, n_rows, weight, bias, out)
    assert untouched(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("isa", [*HERE, cpu.REFERENCE])
@settings(max_examples=30)
@given(rows, st.integers(0, 4), st.integers(0, 50), st.booleans(), seeds)
@example(1, 1, 16, False, 0)
@example(4, 2, 16, True, 0)
@example(5, 3, 48, True, 0)
@example(9, 3, 48, False, 0)
@example(70, 1, 33, True, 0)
@example(0, 2, 3, False, 0)
@example(2, 0, 3, True, 0)
def test_matmul_q40(isa, n_rows, n_blocks, m, with_bias, seed):
    n = 32 * n_blocks
    weight = random_weights(seed, m, n_blocks)
    bias = normal(seed + 1, m if with_bias else 0)
    values, scales = random_batch(seed, n_rows, n_blocks)
    packed = layout.pack_weights(weight)
    out = q40_product(isa, tiles(values, scales), n_rows, packed, bias, m)
    plain = np.array([[q40_value(row, i) for i in range(n)] for row in weight]).reshape(m, n)
    assert_product(out, values * np.repeat(scales, 32, axis=1), plain, bias)


@EVERY
@pytest.mark.parametrize("n_rows", [1, 4, 8, 16])
@pytest.mark.parametrize("value", [-128, -127, 127])
@pytest.mark.parametrize("nibble", [0, 15])
def test_matmul_q40_of_the_largest_values_does_not_overflow(isa, n_rows, value, nibble):
    weight = np.full((16, 2, 18), 17 * nibble, np.uint8)
    weight[:, :, :2] = np.frombuffer(struct.pack("<e", 1.0), np.uint8)
    batch = tiles(np.full((n_rows, 64), value, np.int8), np.ones((n_rows, 2), F32))
    out = q40_product(isa, batch, n_rows, layout.pack_weights(weight), NO_BIAS, 16)
    np.testing.assert_array_equal(out, 64 * value * (nibble - 8))


@EVERY
@pytest.mark.parametrize("scale", [0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x8000])
def test_every_finite_scale_counts(isa, scale):
    """The smallest, subnormal and largest float16."""
    weight = np.full((16, 1, 18), 0x99, np.uint8)  # 1 everywhere
    weight[:, :, :2] = np.array([scale], "<u2").view(np.uint8)
    batch = tiles(np.ones((1, 32), np.int8), np.ones((1, 1), F32))
    out = q40_product(isa, batch, 1, layout.pack_weights(weight), NO_BIAS, 16)
    np.testing.assert_array_equal(out, 32 * float(np.uint16(scale).view(np.float16)))


def large(n_rows: int, n_blocks: int, m: int):
    """A batch, packed weights and a bias."""
    batch = tiles(*random_batch(1, n_rows, n_blocks))
    return batch, layout.pack_weights(random_weights(2, m, n_blocks)), normal(3, m)


def has_fma(isa: str) -> bool:
    return isa != cpu.PORTABLE or bool(cpu.features() & {"fma", "neon"})


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", ROWS)
def test_cpus_agree_to_the_last_bit(n_rows):
    batch, weight, bias = large(n_rows, 7, 45)
    found = [q40_product(isa, batch, n_rows, weight, bias, 45) for isa in HERE if has_fma(isa)]
    for one, other in pairwise(found):
        np.testing.assert_array_equal(one, other)


@EVERY
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_the_parts_of_threads_make_the_whole(isa, n_rows):
    m = 16 * 5 + 3
    batch, weight, bias = large(n_rows, 3, m)
    whole = q40_product(isa, batch, n_rows, weight, bias, m)
    for n_threads in (2, 3, 6, 7):
        parts = []
        for thread in range(n_threads):
            a, z = (6 * part // n_threads for part in (thread, thread + 1))
            start, stop = 16 * a, min(m, 16 * z)
            share = bias[start:stop]
            parts.append(q40_product(isa, batch, n_rows, weight[a:z], share, stop - start))
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@EVERY
def test_a_row_of_a_batch_is_the_row_alone(isa):
    """Also where a batch is so large that the kernel takes it in several goes."""
    n_rows, n_blocks, m = 230, 128, 20
    values, scales = random_batch(1, n_rows, n_blocks)
    _, weight, bias = large(1, n_blocks, m)
    whole = q40_product(isa, tiles(values, scales), n_rows, weight, bias, m)
    for count in (1, 3, 7, 12, 22):  # a tile of each size, and one after another
        for row in range(0, n_rows - count, 7):
            batch = tiles(values[row : row + count], scales[row : row + count])
            found = q40_product(isa, batch, count, weight, bias, m)
            np.testing.assert_array_equal(found, whole[row : row + count])

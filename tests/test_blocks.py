"""The block formats against scalar loops written from distributed-llama's formulas."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyllama_kernels import blocks
from pyllama_kernels.blocks import (
    BLOCK,
    dequantize_q40,
    dequantize_q80,
    quantize_q40,
    quantize_q80,
)

# Up to where the scale of a block still is a finite float16, with many equal and opposite values.
VALUES = st.one_of(
    st.floats(-500_000, 500_000, width=32),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, -1e-40, 1.4e-45, 7.5, -8.0]),
).map(lambda value: value + 0.0)  # no -0: the greatest of 0 and -0 may be either
SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 3).map(lambda n: n * BLOCK))
ROWS = arrays(np.float32, SHAPES, elements=VALUES)


def f32(value: float) -> float:
    """Rounds to float32, as each step of the formulas does."""
    return float(np.float32(value))


def inverse(d: float) -> float:
    """1 / d in float32; 0 for 0 and where float32 overflows."""
    return f32(1 / d) if abs(d) > 1 / 3.4028236e38 else 0.0


def scalar_q40(values: list[float]) -> bytes:
    low, high = min(values), max(values)
    d = f32((low if -low > high else high) / -8)
    q = [int(min(max(f32(f32(x * inverse(d)) + 8.5), 0), 15)) for x in values]
    return struct.pack("<e16B", d, *(q[j] | q[j + 16] << 4 for j in range(16)))


def scalar_q80(values: list[float]) -> bytes:
    d = f32(max(abs(x) for x in values) / 127)
    return struct.pack("<e32b", d, *(round(f32(x * inverse(d))) for x in values))


def scalar_dequantize_q40(block: bytes) -> list[float]:
    d, *q = struct.unpack("<e16B", block)
    return [((byte & 15) - 8) * d for byte in q] + [((byte >> 4) - 8) * d for byte in q]


def scalar_dequantize_q80(block: bytes) -> list[float]:
    d, *q = struct.unpack("<e32b", block)
    return [byte * d for byte in q]


@pytest.mark.parametrize(
    ("quantize", "scalar"), [(quantize_q40, scalar_q40), (quantize_q80, scalar_q80)]
)
@given(x=ROWS)
def test_quantize_is_the_scalar_formula(
    quantize: Callable[[np.ndarray], np.ndarray],
    scalar: Callable[[list[float]], bytes],
    x: np.ndarray,
) -> None:
    expected = b"".join(scalar(group.tolist()) for group in x.reshape(x.size // BLOCK, BLOCK))
    stored = quantize(x)
    assert stored.dtype == np.uint8
    assert stored.shape[:-1] == x.shape[:-1]
    assert stored.tobytes() == expected


@pytest.mark.parametrize(
    ("dequantize", "scalar", "size"),
    [(dequantize_q40, scalar_dequantize_q40, 18), (dequantize_q80, scalar_dequantize_q80, 34)],
)
@given(data=st.data())
def test_dequantize_is_the_scalar_formula(
    dequantize: Callable[[np.ndarray], np.ndarray],
    scalar: Callable[[bytes], list[float]],
    size: int,
    data: st.DataObject,
) -> None:
    stored = data.draw(st.binary(min_size=3 * size, max_size=3 * size))
    expected = [value for i in range(3) for value in scalar(stored[i * size : (i + 1) * size])]
    with np.errstate(invalid="ignore"):  # 0 times an infinite scale
        values = dequantize(np.frombuffer(stored, np.uint8).reshape(1, -1))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array([expected], np.float32))


def test_q40_by_hand() -> None:
    """The value of largest magnitude is -8, so d is 1 and each value is its half minus 8."""
    x = np.array([*range(-8, 8), *range(7, -9, -1)], np.float32)
    expected = bytes.fromhex("003c f0e1d2c3b4a5968778695a4b3c2d1e0f")
    assert quantize_q40(x).tobytes() == expected
    np.testing.assert_array_equal(dequantize_q40(quantize_q40(x)), x)


def test_q40_rounds_up_at_half_and_stops_at_seven() -> None:
    """With d = 1: 0.5 becomes 1, -0.5 becomes 0, and 7.9, which would be 16, stays at 15."""
    x = np.zeros(32, np.float32)
    x[:4] = -8, 0.5, -0.5, 7.9
    assert dequantize_q40(quantize_q40(x))[:5].tolist() == [-8, 1, 0, 7, 0]


def test_q40_takes_the_positive_value_of_a_tie() -> None:
    x = np.zeros(32, np.float32)
    x[:2] = -1, 1
    assert quantize_q40(x)[:2].tobytes() == struct.pack("<e", -0.125)


def test_q80_by_hand() -> None:
    """The greatest magnitude is 127, so d is 1; halves go to the even neighbour."""
    x = np.zeros(32, np.float32)
    x[:6] = -127, 0.5, 1.5, 2.5, -0.5, -1.5
    assert quantize_q80(x).tobytes() == bytes.fromhex("003c 81 00 02 02 00 fe") + bytes(26)


def test_zeros() -> None:
    x = np.zeros(64, np.float32)
    assert quantize_q40(x).tobytes() == (b"\x00\x80" + b"\x88" * 16) * 2
    assert quantize_q80(x).tobytes() == quantize_q80(-x).tobytes() == bytes(68)
    assert not dequantize_q40(quantize_q40(x)).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tiny", [1.4e-45, -1e-40, 1e-38])
def test_values_whose_scale_has_no_inverse(tiny: float) -> None:
    x = np.zeros(32, np.float32)
    x[3] = tiny
    assert quantize_q40(x).tobytes() == scalar_q40(x.tolist())
    assert quantize_q80(x).tobytes() == scalar_q80(x.tolist())
    assert not dequantize_q40(quantize_q40(x)).any()
    assert not dequantize_q80(quantize_q80(x)).any()


@pytest.mark.slow
@given(x=ROWS)
def test_round_trip_error_is_within_the_step(x: np.ndarray) -> None:
    """A step of Q40 is 1/8 of a block's greatest value, of Q80 1/127; float16 adds a little."""
    greatest = np.abs(x.reshape(-1, BLOCK)).max(axis=1, initial=0).repeat(BLOCK).reshape(x.shape)
    tiny = 1e-5  # where float16 has no full precision any more
    assert (np.abs(dequantize_q40(quantize_q40(x)) - x) <= greatest / 8 * 1.01 + tiny).all()
    assert (np.abs(dequantize_q80(quantize_q80(x)) - x) <= greatest / 127 * 0.6 + tiny).all()


@pytest.mark.parametrize(
    ("quantize", "dequantize"),
    [(quantize_q40, dequantize_q40), (quantize_q80, dequantize_q80)],
)
def test_long_and_strided_input(
    quantize: Callable[[np.ndarray], np.ndarray], dequantize: Callable[[np.ndarray], np.ndarray]
) -> None:
    """More blocks than are worked on at once, and views: each block is what it is alone."""
    x = np.random.default_rng(0).standard_normal((blocks._CHUNK // 2 + 3, 4 * BLOCK), np.float32)
    stored, parts = quantize(x), np.split(x, 4, axis=1)
    np.testing.assert_array_equal(np.concatenate([quantize(p) for p in parts], axis=1), stored)
    values, parts = dequantize(stored), np.split(stored, 4, axis=1)
    np.testing.assert_array_equal(np.concatenate([dequantize(p) for p in parts], axis=1), values)
    np.testing.assert_array_equal(quantize(x[:2].reshape(2, 2, -1)).reshape(2, -1), stored[:2])


def test_partial_blocks_are_refused() -> None:
    for quantize in (quantize_q40, quantize_q80):
        with pytest.raises(ValueError, match=r"shape \(2, 33\)"):
            quantize(np.zeros((2, 33), np.float32))
    for dequantize in (dequantize_q40, dequantize_q80):
        with pytest.raises(ValueError, match=r"shape \(35,\)"):
            dequantize(np.zeros(35, np.uint8))

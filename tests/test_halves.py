"""float16, in software and as the CPU converts it, against NumPy."""

import numpy as np
import pytest
from numba import njit

from pyllama_kernels import halves

F32 = np.float32


class Conversions:
    """Both conversions over arrays, as kernels use them."""

    def __init__(self, half_to_float, float_to_half) -> None:
        @njit
        def to_floats(bits, out):
            for i in range(bits.size):
                out[i] = half_to_float(bits[i])

        @njit
        def to_halves(values, out):
            for i in range(values.size):
                out[i] = float_to_half(values[i])

        self._to_floats, self._to_halves = to_floats, to_halves

    def floats(self, bits: np.ndarray) -> np.ndarray:
        out = np.empty(bits.size, F32)
        self._to_floats(bits, out)
        return out

    def halves(self, values: np.ndarray) -> np.ndarray:
        out = np.empty(values.size, np.uint16)
        self._to_halves(values, out)
        return out


@pytest.fixture(
    scope="module",
    params=[
        "software",
        pytest.param(
            "hardware",
            marks=pytest.mark.skipif(not halves.IN_HARDWARE, reason="the CPU has no conversions"),
        ),
    ],
)
def here(request) -> Conversions:
    if request.param == "software":
        return Conversions(halves.half_to_float_in_software, halves.float_to_half_in_software)
    return Conversions(halves.half_to_float, halves.float_to_half)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_every_half_has_its_value(here, kind):
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = here.floats(bits.astype(kind))
    expected = bits.view(np.float16).astype(F32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def numpy_halves(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).view(np.uint16)


def test_halves_of_floats_are_rounded_as_numpy_rounds(here):
    bits = np.random.default_rng(1).integers(0, 1 << 32, 50_000, np.uint64).astype(np.uint32)
    in_range = np.random.default_rng(2).integers(0x32000000, 0x48000000, 50_000, np.uint32)
    values = np.concatenate([bits, in_range, in_range | 0x80000000]).view(F32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(here.halves(values), numpy_halves(values))


def test_halves_at_and_beside_every_tie(here):
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F32)
    ties = (halves[:-1] + halves[1:]) / 2  # exact: float32 has 13 more bits
    for values in (halves, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(np.inf))):
        np.testing.assert_array_equal(here.halves(values), numpy_halves(values))
        np.testing.assert_array_equal(here.halves(-values), numpy_halves(-values))


@pytest.mark.parametrize("value", [0.0, -0.0, 65519.99, 65520.0, 1e-8, 6e-8, np.inf, -np.inf])
def test_halves_of_special_values(here, value):
    values = np.array([value], F32)
    assert here.halves(values) == numpy_halves(values)


def test_a_half_of_nan_is_nan(here):
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001], np.uint32)
    assert np.isnan(here.halves(bits.view(F32)).view(np.float16)).all()

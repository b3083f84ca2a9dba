"""Latent attention: values are transposed keys. Against the same steps in plain integers."""

import numpy as np
import pytest

from pyllama_kernels import latent, pages
from pyllama_kernels.pages import KEPT_Q80, PAGE

F32 = np.float32


def random_keys(rng: np.random.Generator, count: int, head_dim: int) -> np.ndarray:
    """Pages of Q80 keys whose blocks differ much in size; one position is all zeros."""
    size = np.exp(rng.uniform(-4, 4, (1, head_dim // 32, 1)))
    x = rng.standard_normal((PAGE * count, head_dim // 32, 32)) * size
    x[5] = 0
    kept = np.zeros((count, pages.page_bytes(KEPT_Q80, head_dim)), np.uint8)
    for position, row in enumerate(x.reshape(len(x), -1).astype(F32)):
        page, lane = divmod(position, PAGE)
        pages.write_position(kept[page], lane, row, KEPT_Q80, lanes_last=True)
    return kept


def one_scale(kept: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers [positions, m] as integers, and for each position the scale of them all."""
    blocks = kept.reshape(len(kept), -1, 34 * PAGE)[:, : m // 32]
    scales = blocks[:, :, : 2 * PAGE].copy().view("<f2").astype(F32)  # [pages, blocks, 16]
    whole = blocks[:, :, 2 * PAGE :].view(np.int8).reshape(*scales.shape[:2], 8, PAGE, 4)
    whole = whole.transpose(0, 3, 1, 2, 4).reshape(len(kept), PAGE, -1, 32).astype(np.int64)
    largest = np.maximum(scales.max(axis=1), F32(2.0**-24))
    inverse = (F32(1) / largest)[:, None]
    ratios = (scales * inverse * F32(32767)).astype(np.int64).transpose(0, 2, 1)[..., None]
    rounded = ((whole * 256 * ratios >> 16) + 64) >> 7
    return rounded.reshape(-1, m), largest.reshape(-1)


def weighted(weights: np.ndarray, whole: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """weights @ values, where 32 positions' weights, with the values' scales, have a scale."""
    total = np.zeros((len(weights), whole.shape[1]))
    for start in range(0, len(scales), 32):
        some = slice(start, start + 32)
        products = weights[:, some] * scales[some]
        top = np.maximum(products.max(axis=1, keepdims=True), F32(2.0**-100))
        rounded = np.rint(products * (F32(127) / top))
        total += rounded @ whole[some] * (top * F32(1 / 127))
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 12])  # pages; an odd number leaves half a pair
@pytest.mark.parametrize("queries", [1, 4, 6, 20])
def test_values_are_added_as_written(count, queries):
    rng = np.random.default_rng(100 * count + queries)
    head_dim, m, positions = 96, 64, 32 * ((count + 1) // 2)
    kept = random_keys(rng, count, head_dim)
    weights = np.zeros((queries, positions), F32)
    weights[:, : PAGE * count] = np.exp(rng.uniform(-12, 0, (queries, PAGE * count)))
    weights[0, :16] = 0
    totals = np.zeros(((queries + 3) // 4 * 4, m), F32)
    totals[:queries] = rng.standard_normal((queries, m))
    expected = totals[:queries].astype(np.float64)
    expected += weighted(weights[:, : PAGE * count], *one_scale(kept, m))
    scratch = np.zeros(latent.scratch_bytes(head_dim, queries, positions), np.uint8)
    latent.add_values(kept, m, weights, queries, totals, scratch.ctypes.data)
    np.testing.assert_allclose(totals[:queries], expected, rtol=1e-5, atol=1e-5)

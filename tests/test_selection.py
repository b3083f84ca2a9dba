"""The positions that sparse attention selects: by hand, and against the reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama_kernels import pages, reference, selection
from pyllama_kernels.pages import BLOCK_PAGES, KEPT_F16, KEPT_F32, KEPT_Q80, seq_blocks

F32 = np.float32


def backwards(n_blocks: int) -> np.ndarray:
    """A table of one sequence, whose blocks lie in the other order."""
    return np.arange(n_blocks)[None, ::-1].copy()


def kept_keys(x: np.ndarray, kind: int) -> np.ndarray:
    """[positions, head_dim] float32 as blocks of one sequence, the last block first."""
    count, head_dim = x.shape
    n_blocks = seq_blocks(count)
    held = np.zeros((n_blocks, 1, BLOCK_PAGES, pages.page_bytes(kind, head_dim)), np.uint8)
    seqs, positions = np.zeros(count, np.int64), np.arange(count)
    reference.store_keys(x[:, None], seqs, positions, backwards(n_blocks), kind, held)
    return held


def both(query, weights, keys, kind, positions, top_k, seq_len):
    """What the kernel and its reference implementation select."""
    seqs, positions = np.zeros(len(positions), np.int64), np.array(positions, np.int64)
    found = np.full((len(positions), seq_len), np.nan, F32)
    expected = found.copy()
    scratch = np.zeros(selection.select_scratch_bytes(*query.shape[1:]), np.uint8)
    common = query, weights, keys, kind, seqs, positions, backwards(len(keys)), top_k, 0.25
    selection.select(*common, found, scratch.ctypes.data, 0, len(positions))
    reference.select(*common, expected)
    return found, expected


@pytest.mark.parametrize("kind", [KEPT_F32, KEPT_F16, KEPT_Q80])
@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 299), min_size=1, max_size=5, unique=True),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 1 << 30),
)
def test_the_kernel_selects_what_its_reference_implementation_does(
    kind, positions, heads, top_k, seed
):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((len(positions), heads, 32), F32)
    weights = rng.standard_normal((len(positions), heads), F32)
    keys = kept_keys(rng.standard_normal((300, 32), F32), kind)
    found, expected = both(query, weights, keys, kind, positions, top_k, 300)
    np.testing.assert_array_equal(found, expected)
    for row, position in enumerate(positions):
        chosen = np.flatnonzero(found[row] == 0)
        assert len(chosen) == min(top_k, position + 1)
        assert chosen.max() <= position


def test_by_hand():
    """Scores of keys 1, 2, 3 ... are their products with 1; a negative product counts as 0."""
    keys = np.zeros((6, 32), F32)
    keys[:, 0] = [3, -5, 1, 4, -1, 2]
    query = np.zeros((1, 1, 32), F32)
    query[..., 0] = 1
    found, expected = both(query, np.ones((1, 1), F32), kept_keys(keys, KEPT_F32), 0, [5], 2, 6)
    np.testing.assert_array_equal(np.flatnonzero(found[0] == 0), [0, 3])
    np.testing.assert_array_equal(found, expected)
    # A negative weight turns the order round: the first of those that are cut off at 0 win.
    found, _ = both(query, -np.ones((1, 1), F32), kept_keys(keys, KEPT_F32), 0, [5], 2, 6)
    np.testing.assert_array_equal(np.flatnonzero(found[0] == 0), [1, 4])


def test_of_equal_scores_the_earlier_win():
    query, weights = np.zeros((1, 2, 32), F32), np.ones((1, 2), F32)
    found, expected = both(query, weights, kept_keys(np.ones((40, 32), F32), 0), 0, [39], 7, 48)
    np.testing.assert_array_equal(np.flatnonzero(found[0] == 0), np.arange(7))
    np.testing.assert_array_equal(found, expected)

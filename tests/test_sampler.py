"""Tokens are drawn as the flags say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyllama_dist.engine.sampler import Sampler, Sampling

from pyllama_dist.errors import FileError
from pyllama_kernels import reference, sampling

logit_arrays = arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-50, 50, width=32, allow_subnormal=False)
)


def logits_of(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def draws(sampling: Sampling, logits: np.ndarray, count: int) -> list[int]:
    sampler = Sampler(sampling, len(logits))
    return [sampler(logits) for _ in range(count)]


@given(
    st.sampled_from((1, 2, 15, 16, 17, 100, 3000)),
    st.sampled_from((0.01, 1.0, 5.0, 40.0)),
    st.booleans(),
    st.floats(0.05, 20),
    st.floats(0, 1),
    st.integers(0, 1 << 30),
)
def test_the_kernel_draws_what_its_twin_does(n, size, coarse, coldness, topp, seed):
    """From the same odds, but where the coin or the end of the nucleus fall between two tokens:
    there the kernel's float32 may take the other one.
    """
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n, np.float32) * np.float32(size)
    if coarse:
        logits = np.rint(logits)  # many are equally likely
    logits[rng.random(n) < 0.1] = -np.inf
    logits[rng.integers(n)] = 0
    odds = np.empty(-(-n // sampling.VECTOR) * sampling.VECTOR, np.float32)
    tokens, near = np.empty(n, np.int32), (1 - 3e-6, 1, 1 + 3e-6)
    for coin in rng.random(10):
        found = sampling.sample(logits, logits.max(), coldness, topp, coin, odds, tokens)
        allowed = {reference.draw(odds[:n], topp * a, coin * b) for a in near for b in near}
        assert found in allowed
    differences = (logits.astype(np.float64) - logits.max()) * coldness
    # Rounded, a difference of 87 is off by as much as that; below it the odds are 0.
    np.testing.assert_allclose(odds[:n], np.exp(differences), rtol=2e-5, atol=1e-37)


@given(logit_arrays, st.floats(0, 1), st.integers(0, 99))
def test_temperature_zero_takes_the_most_likely_token(logits, topp, seed):
    sampler = Sampler(Sampling(temperature=0, topp=topp, seed=seed), len(logits))
    assert logits[sampler(logits)] == logits.max()


@given(logit_arrays, st.floats(0.01, 10), st.floats(0, 1), st.integers(0, 99), st.data())
def test_padding_of_the_vocabulary_is_never_drawn(logits, temperature, topp, seed, data):
    known = data.draw(st.integers(1, len(logits)))
    logits[known:] = 1000
    for t in (temperature, 0):
        sampler = Sampler(Sampling(t, topp, seed), known)
        assert all(0 <= sampler(logits) < known for _ in range(5))


@given(logit_arrays, st.floats(0.01, 10), st.floats(0.01, 0.99), st.integers(0, 99))
def test_topp_draws_from_the_smallest_set_that_reaches_it(logits, temperature, topp, seed):
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    for token in draws(Sampling(temperature, topp, seed), logits, 5):
        more_likely = probabilities[probabilities > probabilities[token]].sum()
        assert more_likely < topp + 1e-9


@pytest.mark.parametrize(
    ("topp", "expected"),
    [
        (0.3, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.79, {2, 0}),
        (0.81, {2, 0, 3}),
        (0.96, {2, 0, 3, 1}),
        (1.0, {2, 0, 3, 1}),
        (0.0, {2, 0, 3, 1}),
    ],
)
def test_topp_keeps_just_as_many_tokens_as_it_takes(topp, expected):
    logits = logits_of([0.3, 0.05, 0.5, 0.15])
    assert set(draws(Sampling(1.0, topp, seed=1), logits, 500)) == expected


@given(logit_arrays, st.integers(0, 2**63))
def test_a_seed_draws_the_same_tokens_again(logits, seed):
    sampling = Sampling(1.0, 0.9, seed)
    assert draws(sampling, logits, 10) == draws(sampling, logits, 10)


def test_other_seeds_draw_other_tokens():
    logits = np.zeros(1000, np.float32)
    drawn = {tuple(draws(Sampling(1.0, 1.0, seed), logits, 5)) for seed in (1, 2, 3, None, None)}
    assert len(drawn) == 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_they_should(temperature):
    probabilities, count = np.array([0.4, 0.1, 0.3, 0.2]), 20_000
    drawn = draws(Sampling(temperature, 1.0, seed=7), logits_of(list(probabilities)), count)
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum()
    found = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / count))


def test_topp_leaves_the_odds_of_what_it_keeps():
    drawn = draws(Sampling(1.0, 0.65, seed=7), logits_of([0.4, 0.1, 0.3, 0.2]), 20_000)
    assert set(drawn) == {0, 2}
    assert abs(drawn.count(0) / len(drawn) - 4 / 7) < 0.015


@pytest.mark.parametrize("offset", [-1e30, 0, 1e30])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_extreme_logits_and_temperatures_do_no_harm(offset, temperature):
    logits = np.array([offset, offset, -3e38], np.float32)
    assert set(draws(Sampling(temperature, 0.9, seed=1), logits, 50)) <= {0, 1, 2}


def test_logits_stay_as_they_are():
    logits = logits_of([0.4, 0.1, 0.3, 0.2])
    before = logits.copy()
    draws(Sampling(seed=1), logits, 3)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("logits", [[0, np.nan, 1], [np.inf, 0], [-np.inf, -np.inf]])
def test_outputs_that_are_no_numbers_are_an_error(logits, temperature):
    with pytest.raises(FileError, match="weights are damaged"):
        draws(Sampling(temperature, seed=1), np.array(logits, np.float32), 1)

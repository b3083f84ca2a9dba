"""Tokens are drawn as the flags say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyllama_dist.engine.sampler import Sampler, Sampling
from pyllama_dist.errors import FileError, UsageError
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
    st.sampled_from((0, 0, 1, 2, 7, 50, 2999, 4000)),
    st.floats(0, 1),
    st.sampled_from((0.0, 0.0, 0.03, 0.5, 1.0)),
    st.integers(0, 1 << 30),
)
def test_the_kernel_draws_what_its_reference_does(
    n, size, coarse, inverse, top_k, top_p, min_p, seed
):
    """From the same weights, but where the uniform sample or the end of what is left fall between
    two tokens: there the kernel's float32 may take the other one.
    """
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n, np.float32) * np.float32(size)
    if coarse:
        logits = np.rint(logits)  # many are equally likely
    logits[rng.random(n) < 0.1] = -np.inf
    logits[rng.integers(n)] = 0
    weights = np.empty(-(-n // sampling.VECTOR) * sampling.VECTOR, np.float32)
    tokens, near = np.empty(n, np.int32), (1 - 3e-6, 1, 1 + 3e-6)
    for uniform in rng.random(10):
        left = top_k, top_p, min_p
        memory = weights, tokens
        found = sampling.sample(logits, logits.max(), inverse, *left, uniform, *memory)
        allowed = {
            reference.draw(weights[:n], top_k, top_p * a, min_p, uniform * b)
            for a in near
            for b in near
        }
        assert found in allowed
    differences = (logits.astype(np.float64) - logits.max()) * inverse
    # Rounded, a difference of 87 is off by as much as that; below it the weights are 0.
    np.testing.assert_allclose(weights[:n], np.exp(differences), rtol=2e-5, atol=1e-37)


@given(
    st.integers(1, 200),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_the_kernel_adjusts_logits_as_its_reference_does(
    n, repetition, presence, frequency, masked, seed
):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(n, np.float32)
    seen, biased = (rng.permutation(n)[: rng.integers(n + 1)].astype(np.int32) for _ in range(2))
    counts = rng.integers(0, 4, seen.size).astype(np.int32)
    bias = rng.standard_normal(biased.size).astype(np.float32)
    mask = rng.integers(0, 1 << 32, -(-n // 32) if masked else 0, np.uint32)
    found, expected = np.empty(n, np.float32), np.empty(n, np.float32)
    arguments = logits, seen, counts, repetition, presence, frequency, biased, bias, mask
    sampling.adjust(*arguments, found)
    reference.adjust(*arguments, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if masked:
        allowed = [bool(mask[i // 32] >> np.uint32(i % 32) & np.uint32(1)) for i in range(n)]
        np.testing.assert_array_equal(found != -np.inf, allowed)


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
        assert more_likely < topp + 1e-6  # tokens that differ by less are equal in float32


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


def test_topp_leaves_the_proportions_of_what_it_keeps():
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


CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27}  # by degrees of freedom: passed once in 1,000 times


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"topp": 1.0}, [0.4, 0.1, 0.3, 0.2]),
        ({"topp": 1.0, "top_k": 3}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"topp": 1.0, "top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"topp": 1.0, "min_p": 0.45}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"topp": 1.0, "min_p": 0.6}, [4 / 7, 0, 3 / 7, 0]),
        # Of three tokens, 4/9 and 3/9 reach 0.7 together.
        ({"topp": 0.7, "top_k": 3}, [4 / 7, 0, 3 / 7, 0]),
        ({"topp": 0.9, "top_k": 4, "min_p": 0.6}, [4 / 7, 0, 3 / 7, 0]),
        ({"topp": 1.0, "bias": {1: math.log(4)}}, [4 / 13, 4 / 13, 3 / 13, 2 / 13]),
    ],
)
def test_tokens_are_distributed_as_the_options_say(options, expected):
    count = 20_000
    how = Sampling(temperature=1.0, seed=11, **options)
    found = np.bincount(draws(how, logits_of([0.4, 0.1, 0.3, 0.2]), count), minlength=4)
    expected = np.array(expected)
    assert not found[expected == 0].any()
    some = expected > 0
    chi_square = ((found[some] - count * expected[some]) ** 2 / (count * expected[some])).sum()
    assert chi_square < CHI_SQUARE[some.sum() - 1]


def test_the_first_of_equally_likely_tokens_are_left():
    how = Sampling(temperature=1.0, topp=1.0, seed=1, top_k=3)
    assert set(draws(how, np.zeros(50, np.float32), 200)) == {0, 1, 2}


def test_what_was_said_is_less_likely():
    logits = np.array([2.0, 1.5, 1.2, -1.0], np.float32)

    def greedy(prompt, count, **options) -> list[int]:
        sampler = Sampler(Sampling(temperature=0, **options), 4)
        sampler.begin(prompt)
        return [sampler(logits) for _ in range(count)]

    assert greedy([0], 2) == [0, 0]
    assert greedy([0], 3, repetition_penalty=2.0) == [1, 2, 0]  # 2/2; then 1.5/2; then 1.2/2
    assert greedy([0], 3, presence_penalty=0.6) == [0, 1, 0]  # the prompt does not count
    assert greedy([0], 4, frequency_penalty=0.6) == [0, 1, 0, 2]


def test_a_mask_allows_some_tokens():
    sampler = Sampler(Sampling(temperature=1.0, topp=1.0, seed=3), 40)
    sampler.mask = np.array([1 << 5, 1 << 1], np.uint32)
    assert {sampler(np.zeros(40, np.float32)) for _ in range(100)} == {5, 33}
    sampler.mask = np.zeros(2, np.uint32)
    with pytest.raises(UsageError, match="allows no token"):
        sampler(np.zeros(40, np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"topp": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"bias": {1: math.nan}},
    ],
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError, match="cannot be"):
        Sampling(**wrong)


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(UsageError, match="50 is no token id from 0 to 49"):
        Sampler(Sampling(bias={50: 1.0}), 50)


def test_a_token_costs_one_uniform_sample(monkeypatch):
    sampler = Sampler(Sampling(temperature=1.0, topp=0.5, seed=5, top_k=3, min_p=0.1), 4)
    random = np.random.default_rng(5)
    monkeypatch.setattr(sampler, "_random", random)
    for _ in range(10):
        sampler(logits_of([0.4, 0.1, 0.3, 0.2]))
    again = np.random.default_rng(5)
    drawn = [again.random() for _ in range(11)]
    assert random.random() == drawn[-1]

"""Generation: what it reads, what it keeps in its cache, and why it ends."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama_dist.cluster.bring_up import bring_up
from pyllama_dist.config import FloatType
from pyllama_dist.engine import Engine
from pyllama_dist.errors import UsageError

PROMPT = (5, 9, 2, 100, 0, 9, 77, 31, 8, 8)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def make_engine(tiny, request):
    """Makes engines with a root that is alone."""

    def make(**limits) -> Engine:
        model = tiny(weights=FloatType.Q40)
        limits = {"max_rows": 4, "max_logits": 3, "seq_len": 32} | limits
        root = bring_up(model, lambda nodes: model.programs(1, **limits), n_threads=1)
        request.addfinalizer(root.close)
        return Engine(root)

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


def greedy(logits):
    return int(logits.argmax())


def generated(engine, prompt, **options):
    generation = engine.generate(prompt, greedy, options.pop("stop", ()), **options)
    return list(generation), generation


class Steps:
    """Counts the tokens that a root computes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        step = engine.root.step

        def counted(tokens, batch):
            self.tokens += tokens
            return step(tokens, batch)

        monkeypatch.setattr(engine.root, "step", counted)


def afresh(engine, tokens, count):
    """Greedy tokens, each from a text that is computed from its beginning."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(greedy(engine.logits(tokens)[-1]))
    return tokens[-count:]


def test_generation_continues_as_if_all_was_computed_afresh(make_engine):
    found, generation = generated(make_engine(), PROMPT, max_tokens=6)
    assert found == afresh(make_engine(), PROMPT, 6)
    assert generation.finish_reason == "length"
    assert generation.timings.prompt_tokens == len(PROMPT)
    assert generation.timings.cached_tokens == 0
    assert generation.timings.generated_tokens == 6


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 10])
def test_prompts_of_every_length_around_a_batch(make_engine, length):
    found, _ = generated(make_engine(), PROMPT[:length], max_tokens=2)
    assert found == afresh(make_engine(max_rows=1), PROMPT[:length], 2)


def test_a_conversation_goes_on_from_the_cache(engine, make_engine, monkeypatch):
    answer, _ = generated(engine, PROMPT, max_tokens=5)
    steps = Steps(engine, monkeypatch)
    longer = [*PROMPT, *answer, 3, 4]
    found, generation = generated(engine, longer, max_tokens=4)
    # The last token of the answer was given out but not computed.
    assert generation.timings.cached_tokens == len(PROMPT) + 4
    assert steps.tokens == [answer[-1], 3, 4, *found[:-1]]
    assert found == afresh(make_engine(), longer, 4)


def test_a_conversation_that_was_changed_is_computed_from_there(engine, make_engine, monkeypatch):
    generated(engine, PROMPT, max_tokens=5)
    steps = Steps(engine, monkeypatch)
    other = [*PROMPT[:6], 1, 2, 3]
    found, generation = generated(engine, other, max_tokens=4)
    assert generation.timings.cached_tokens == 6
    assert steps.tokens == [1, 2, 3, *found[:-1]]
    assert found == afresh(make_engine(), other, 4)


def test_the_same_prompt_again_computes_its_last_token_alone(engine, monkeypatch):
    first, _ = generated(engine, PROMPT, max_tokens=1)
    steps = Steps(engine, monkeypatch)
    again, generation = generated(engine, PROMPT, max_tokens=1)
    assert again == first
    assert generation.timings.cached_tokens == len(PROMPT) - 1
    assert steps.tokens == [PROMPT[-1]]


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.lists(st.integers(0, 3), min_size=1, max_size=5)),
        min_size=2,
        max_size=4,
    )
)
def test_what_is_cached_never_changes_an_answer(tiny, turns):
    model = tiny(weights=FloatType.Q40)
    programs = model.programs(1, max_rows=4, seq_len=32)
    with (
        bring_up(model, lambda nodes: programs, n_threads=1) as one,
        bring_up(model, lambda nodes: programs, n_threads=1) as other,
    ):
        engine, text = Engine(one), []
        for kept, added in turns:
            prompt = [*text[:kept], *added]
            found, _ = generated(engine, prompt, max_tokens=3)
            assert found == generated(Engine(other), prompt, max_tokens=3)[0]
            text = [*prompt, *found]


def test_a_prompt_must_say_something(engine):
    with pytest.raises(UsageError, match="empty"):
        engine.generate([], greedy, ())


@pytest.mark.parametrize("length", [32, 33, 100])
def test_a_prompt_must_fit_the_context(engine, length):
    with pytest.raises(UsageError, match=f"{length} tokens, the context 32"):
        engine.generate([1] * length, greedy, ())


@pytest.mark.parametrize("length", [1, 20, 31])
def test_the_context_ends_an_answer(engine, length):
    found, generation = generated(engine, [1] * length)
    # The token after the last position is still chosen.
    assert len(found) == 32 - length + 1
    assert generation.finish_reason == "length"


def test_a_stop_token_ends_an_answer_and_is_not_given_out(make_engine):
    free, _ = generated(make_engine(), PROMPT, max_tokens=8)
    last = free[5]
    found, generation = generated(make_engine(), PROMPT, stop={last, 1000})
    assert found == free[: free.index(last)]
    assert generation.finish_reason == "stop"
    assert generation.timings.generated_tokens == len(found)


def test_an_answer_may_be_empty(make_engine):
    first, _ = generated(make_engine(), PROMPT, max_tokens=1)
    found, generation = generated(make_engine(), PROMPT, stop=first)
    assert found == []
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_more_tokens_than_asked_for(engine, monkeypatch, count):
    steps = Steps(engine, monkeypatch)
    found, generation = generated(engine, PROMPT, max_tokens=count)
    assert len(found) == count
    assert generation.finish_reason == "length"
    assert len(steps.tokens) == len(PROMPT) + count - 1


def test_an_interruption_while_the_prompt_is_read_ends_it(engine, monkeypatch):
    steps = Steps(engine, monkeypatch)
    found, generation = generated(engine, PROMPT, interrupted=lambda: True)
    assert found == []
    assert generation.finish_reason == "interrupted"
    assert steps.tokens == list(PROMPT[:4])


def test_an_interruption_between_tokens_ends_an_answer(engine, make_engine):
    generation = engine.generate(PROMPT, greedy, (), interrupted=lambda: len(found) == 3)
    found = []
    for token in generation:
        found.append(token)
    assert len(found) == 3
    assert generation.finish_reason == "interrupted"
    assert generated(engine, [*PROMPT, *found], max_tokens=3)[0] == (
        afresh(make_engine(), [*PROMPT, *found], 3)
    )


def test_an_answer_that_nobody_waits_for_does_no_harm(engine, make_engine):
    generation = engine.generate(PROMPT, greedy, ())
    next(iter(generation))
    iter(generation).close()
    assert generation.finish_reason == "interrupted"
    assert generated(engine, PROMPT[:5], max_tokens=3)[0] == afresh(make_engine(), PROMPT[:5], 3)


def test_logits_of_a_text_are_those_of_its_beginnings(engine, make_engine):
    whole = engine.logits(PROMPT)
    assert whole.shape == (len(PROMPT), 101)
    assert whole.dtype == np.float32
    for length in (1, 4, 9):
        np.testing.assert_array_equal(make_engine().logits(PROMPT[:length]), whole[:length])
    assert engine.logits([1] * 32).shape == (32, 101)


@pytest.mark.parametrize("length", [0, 33])
def test_logits_of_too_few_or_too_many_tokens_are_refused(engine, length):
    with pytest.raises(UsageError, match=f"{length} tokens for a context of 32"):
        engine.logits([1] * length)


def test_logits_make_the_cache_forget_the_conversation(engine, make_engine):
    generated(engine, PROMPT, max_tokens=3)
    engine.logits([1, 2, 3])
    found, generation = generated(engine, PROMPT, max_tokens=3)
    assert generation.timings.cached_tokens == 0
    assert found == afresh(make_engine(), PROMPT, 3)


def test_what_an_answer_has_cost_leaves_out_those_before(engine):
    _, first = generated(engine, PROMPT, max_tokens=3)
    before = engine.root.node.spent.compute_seconds
    assert first.timings.spent.compute_seconds == before
    _, second = generated(engine, PROMPT, max_tokens=3)
    after = engine.root.node.spent.compute_seconds
    assert second.timings.spent.compute_seconds == pytest.approx(after - before)
    assert 0 < second.timings.spent.compute_seconds < after


def test_decoding_takes_the_time_of_choosing_tokens_too(engine):
    def slowly(logits):
        time.sleep(0.02)
        return greedy(logits)

    generation = engine.generate(PROMPT, slowly, (), max_tokens=5)
    for _ in generation:
        time.sleep(0.5)  # who reads the answer may take their time
    assert 5 * 0.02 <= generation.timings.decode_seconds < 5 * 0.5

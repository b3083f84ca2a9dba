"""Many generations on one root: each as if it were alone, and why each ends."""

import random
import threading
import time
from functools import partial

import numpy as np
import pytest

from pyllama_dist.config import FloatType
from pyllama_dist.engine.engine import Engine, Load
from pyllama_dist.engine.sampler import Sampler, Sampling
from pyllama_dist.engine.sequence import Request
from pyllama_dist.errors import NodeError, ProtocolError, UsageError
from pyllama_dist.executor.memory import block_bytes, planned_bytes
from pyllama_dist.program import Batch
from pyllama_dist.simulate import simulated_root
from pyllama_kernels.pages import KV_BLOCK
from tests.fake_root import FakeRoot

PROMPT = (5, 9, 2, 10, 0, 9, 7, 31, 8, 8)

pytestmark = pytest.mark.timeout(120)


def greedy(logits):
    return int(logits.argmax())


def request(prompt=PROMPT, sampler=greedy, **options) -> Request:
    return Request(prompt, sampler, **options)


def alone(prompt, count, sampler=greedy) -> list[int]:
    """What a prompt is continued with, from the definition of the fake root's logits."""
    root, tokens = FakeRoot(), list(prompt)
    for _ in range(count):
        tokens.append(sampler(root.logits_of(tokens)))
    return tokens[len(prompt) :]


@pytest.fixture
def root():
    return FakeRoot()


@pytest.fixture
def engine(root):
    with Engine(root, root.size) as engine:
        yield engine


def test_a_generation_continues_its_prompt(engine):
    stream = engine.submit(request(max_tokens=6))
    assert list(stream) == alone(PROMPT, 6)
    assert stream.finish_reason == "length"
    assert stream.timings.prompt_tokens == len(PROMPT)
    assert (stream.timings.cached_tokens, stream.timings.generated_tokens) == (0, 6)
    assert list(stream) == []


def test_generations_that_take_turns_are_independent(engine):
    """One's first token is asked for after the other was submitted."""
    one = engine.submit(request([1, 2, 3], max_tokens=5))
    other = engine.submit(request([7, 8, 9], max_tokens=5))
    found = list(zip(one, other, strict=True))
    assert found == list(zip(alone([1, 2, 3], 5), alone([7, 8, 9], 5), strict=True))


def test_one_thread_has_the_root(root, engine):
    streams = [engine.submit(request([i], max_tokens=3)) for i in range(4)]
    threads = [threading.Thread(target=list, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(root.threads) == 1
    assert root.threads.isdisjoint([threading.current_thread(), *threads])


def test_a_conversation_goes_on_from_the_cache(root, engine):
    answer = list(engine.submit(request(max_tokens=5)))
    before = root.computed
    longer = [*PROMPT, *answer, 3, 4]
    stream = engine.submit(request(longer, max_tokens=4))
    assert list(stream) == alone(longer, 4)
    # The last token of the answer was given out but not computed.
    assert stream.timings.cached_tokens == len(PROMPT) + 4
    assert root.computed - before == 3 + 3


def test_a_conversation_that_was_changed_is_computed_from_there(engine):
    list(engine.submit(request(max_tokens=5)))
    other = [*PROMPT[:6], 1, 2, 3]
    stream = engine.submit(request(other, max_tokens=4))
    assert list(stream) == alone(other, 4)
    assert stream.timings.cached_tokens == 6


@pytest.mark.parametrize("length", [1, 20, 31])
def test_the_context_ends_an_answer(engine, length):
    stream = engine.submit(request([1] * length))
    # The token after the last position is still chosen.
    assert len(list(stream)) == 32 - length + 1
    assert stream.finish_reason == "length"


def test_a_context_is_no_longer_than_the_cache():
    root = FakeRoot(n_blocks=3)
    with Engine(root, root.size) as engine:
        assert engine.seq_len == 12
        assert len(list(engine.submit(request([1])))) == 12


def test_a_stop_token_ends_an_answer_and_is_not_given_out(engine):
    free = alone(PROMPT, 8)
    stream = engine.submit(request(stop={free[5], 1000}))
    assert list(stream) == free[: free.index(free[5])]
    assert stream.finish_reason == "stop"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 32}, "32 tokens, the context 32"),
        ({"prompt": [1] * 100}, "100 tokens, the context 32"),
        ({"prompt": [1, 50]}, "50 is no token id from 0 to 49"),
        ({"prompt": [-1, 1]}, "-1 is no token id"),
        ({"max_tokens": 0}, "one at least"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(root, engine, wrong, said):
    with pytest.raises(UsageError, match=said):
        engine.submit(request(**wrong))
    assert root.steps == []


def test_a_cancelled_answer_ends_and_others_go_on(engine):
    gone, kept = engine.submit(request()), engine.submit(request([3], max_tokens=20))
    next(gone)
    gone.cancel()
    rest = list(gone)
    assert gone.finish_reason == "interrupted" or len(rest) == 22
    assert list(kept) == alone([3], 20)
    gone.cancel()  # too late, and no harm
    assert list(engine.submit(request([3], max_tokens=2))) == alone([3], 2)


def test_leaving_an_answer_cancels_it(root, engine):
    with engine.submit(request([1])) as stream:
        next(stream)
    list(stream)
    assert engine.between_steps(lambda: len(engine._scheduler.running)) == 0


def test_those_that_wait_can_be_cancelled(engine):
    streams = [engine.submit(request([i])) for i in range(10)]
    for stream in streams:
        stream.cancel()
    for stream in streams:
        list(stream)
    assert engine.between_steps(lambda: engine._scheduler.waiting) == []


def test_an_error_of_the_root_reaches_every_stream(root):
    root.fails_at = 3, NodeError("lost worker 10.0.0.9:9998")
    with Engine(root, root.size) as engine:
        streams = [engine.submit(request([i])) for i in range(6)]
        for stream in streams:
            with pytest.raises(NodeError, match=r"10\.0\.0\.9"):
                list(stream)
        for use in (
            lambda: engine.submit(request()),
            lambda: engine.logits([1]),
            lambda: engine.between_steps(lambda: 1),
        ):
            with pytest.raises(NodeError, match=r"10\.0\.0\.9"):
                use()
        assert engine.load == Load(0, 0, 0.0)


def test_an_error_of_a_sampler_ends_its_stream_alone(engine):
    def wrong(logits):
        raise UsageError("the mask allows no token")

    bad, good = engine.submit(request(sampler=wrong)), engine.submit(request(max_tokens=4))
    with pytest.raises(UsageError, match="mask"):
        list(bad)
    assert list(good) == alone(PROMPT, 4)


def test_closing_ends_what_is_open(root):
    started = threading.Event()

    def slowly(logits):
        started.set()
        time.sleep(0.01)
        return greedy(logits)

    engine = Engine(root, root.size)
    stream = engine.submit(request([1], sampler=slowly))
    assert started.wait(20)
    engine.close()
    list(stream)
    assert stream.finish_reason == "interrupted"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request())
    engine.close()


def test_an_interrupt_does_not_wait_for_a_step_that_hangs(root):
    """As one that waits for a node: in Python, for a moment each time."""
    inside = threading.Event()

    def hang(tokens, batch):
        inside.set()
        while True:
            time.sleep(0.01)

    root.step = hang

    def interrupted() -> None:
        with Engine(root, root.size) as engine:
            engine.submit(request())
            assert inside.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_logits_of_a_text_are_those_of_its_beginnings(root, engine):
    list(engine.submit(request(max_tokens=3)))
    found = engine.logits(PROMPT)
    assert found.dtype == np.float32
    for n, row in enumerate(found, start=1):
        np.testing.assert_array_equal(row, root.logits_of(list(PROMPT[:n])))
    assert engine.logits([1] * 32).shape == (32, 50)


@pytest.mark.parametrize("length", [0, 33])
def test_logits_of_too_few_or_too_many_tokens_are_refused(engine, length):
    with pytest.raises(UsageError, match=f"{length} tokens for a context of 32"):
        engine.logits([1] * length)


def test_logprobs_come_with_the_tokens(root, engine):
    sampler = Sampler(Sampling(temperature=0), 50)
    stream = engine.submit(request(sampler=sampler, max_tokens=3, logprobs=sampler.logprobs(4)))
    tokens = list(stream)
    assert [entry.token for entry in stream.logprobs] == tokens == alone(PROMPT, 3)
    row = root.logits_of(list(PROMPT)).astype(np.float64)
    expected = row - np.log(np.exp(row).sum())
    first = stream.logprobs[0]
    assert first.logprob == pytest.approx(expected.max())
    assert [token for token, _ in first.top] == np.argsort(-expected)[:4].tolist()
    assert [p for _, p in first.top] == pytest.approx(sorted(expected, reverse=True)[:4])


def crowd(engine, vocab: int, seed: int, expected) -> None:
    """16 sequences that come, go and are as long as chance will have it: each as it is alone."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(vocab) for _ in range(12)] for _ in range(2)]
    wanted, found = [], {}

    def read(number: int, stream, most: int | None) -> None:
        found[number] = []
        for token in stream:
            found[number].append(token)
            if len(found[number]) == most:
                stream.cancel()

    threads = []
    for number in range(16):
        shared = rng.choice(beginnings)[: rng.randrange(13)]
        prompt = [*shared, *(rng.randrange(vocab) for _ in range(rng.randrange(1, 8)))]
        sampling = Sampling(rng.choice([0, 0.9]), 0.9, seed=number)
        count = rng.randrange(1, 33 - len(prompt))
        wanted.append((prompt, count, sampling))
        stream = engine.submit(request(prompt, Sampler(sampling, vocab), max_tokens=count))
        most = rng.choice([None, None, rng.randrange(1, 6)])
        threads.append(threading.Thread(target=read, args=(number, stream, most)))
        threads[-1].start()
        time.sleep(rng.choice([0, 0, 0.002]))
    for thread in threads:
        thread.join(60)
    for number, (prompt, count, sampling) in enumerate(wanted):
        full = expected(prompt, count, Sampler(sampling, vocab))
        assert found[number] == full[: len(found[number])]
        assert found[number]
    assert not engine.between_steps(lambda: engine._scheduler.running)
    pool = engine._scheduler.pool
    assert pool.available == pool.n_blocks


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("n_blocks", [9, 40])
def test_each_of_a_crowd_gets_what_it_gets_alone(seed, n_blocks):
    root = FakeRoot(n_blocks=n_blocks, n_seqs=6, max_logits=6, max_rows=20)
    with Engine(root, root.size) as engine:
        crowd(engine, 50, seed, alone)


@pytest.mark.slow
@pytest.mark.parametrize("n_nodes", [1, 3])
def test_each_of_a_crowd_on_nodes_gets_what_it_gets_alone(tiny, n_nodes):
    model = tiny(weights=FloatType.F32)
    limits = {"max_rows": 40, "max_logits": 6, "n_seqs": 6, "n_blocks": 7, "seq_len": 64}
    programs = model.programs(n_nodes, **limits)

    def by_itself(prompt, count, sampler) -> list[int]:
        with simulated_root(model, programs) as root, Engine(root) as engine:
            return list(engine.submit(request(prompt, sampler, max_tokens=count)))

    with simulated_root(model, programs) as root, Engine(root) as engine:
        crowd(engine, 101, 5, by_itself)


@pytest.fixture
def real(tiny):
    model = tiny(weights=FloatType.Q40)
    with simulated_root(model, model.programs(1, seq_len=32)) as root:
        yield root


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 2], "2 tokens for a batch of 1 rows"),
        ([], "0 tokens for a batch of 1 rows"),
        ([101], "beyond the vocabulary of 101"),
        ([-1], "beyond the vocabulary"),
    ],
)
def test_a_root_checks_tokens(real, tokens, said):
    with pytest.raises(ProtocolError, match=said):
        real.step(tokens, Batch((0,), (0,), (0,)))


def test_what_an_answer_has_cost_leaves_out_those_before(real):
    with Engine(real) as engine:
        ask = partial(engine.submit, request(max_tokens=3))
        first = ask()
        list(first)
        before = real.node.spent.compute_seconds
        assert first.timings.spent.compute_seconds == before
        second = ask()
        list(second)
        after = real.node.spent.compute_seconds
        assert second.timings.spent.compute_seconds == pytest.approx(after - before)
        assert 0 < second.timings.spent.compute_seconds < after


@pytest.mark.slow
def test_the_cache_of_nodes_holds_what_conversations_have_and_no_more(tiny):
    """Eight of 500 tokens and one of 8,000 at once: not nine times 8,192 positions."""
    model = tiny(max_seq_len=8192)
    limits = {"max_rows": 256, "max_logits": 9, "n_seqs": 9, "n_blocks": 120, "seq_len": 8192}
    programs = model.programs(2, **limits)
    whole = model.programs(2, **limits | {"n_blocks": 9 * 8192 // KV_BLOCK})
    for some, all_ in zip(programs, whole, strict=True):
        spared = planned_bytes(all_) - planned_bytes(some)
        assert spared == (9 * 8192 // KV_BLOCK - 120) * block_bytes(some)
    found = []
    with simulated_root(model, programs) as root, Engine(root) as engine:

        def counting(row):
            running = engine._scheduler.running
            held = sum(one.chain.length for one in running)
            found.append((len(running), held, round(120 * engine.load.kv_used) * KV_BLOCK))
            return int(row.argmax())

        long = engine.submit(request([1] * 7700, counting, max_tokens=300))
        next(long)
        shorts = engine.submit_all(
            [request([2 + number, *([7] * 399)], counting, max_tokens=100) for number in range(8)]
        )
        assert [len(list(stream)) for stream in shorts] == [100] * 8
        assert len(list(long)) == 299
    all_at_once = [(held, taken) for running, held, taken in found if running == 9]
    held, taken = max(all_at_once)
    assert 11_000 <= held <= taken <= 1.05 * held


@pytest.mark.slow
def test_nodes_compute_a_shared_beginning_once(tiny):
    model = tiny(max_seq_len=2048)
    limits = {"max_rows": 256, "max_logits": 8, "n_seqs": 8, "seq_len": 2048, "n_blocks": 40}
    system = [i * 7 % 101 for i in range(1000)]
    with simulated_root(model, model.programs(2, **limits)) as root:
        with Engine(root) as engine:
            prompts = [[*system, number, number] for number in range(8)]
            streams = engine.submit_all([request(p, max_tokens=4) for p in prompts])
            found = [list(stream) for stream in streams]
            computed = sum(stream.timings.computed_tokens for stream in streams)
            assert computed <= 1000 + 8 * (2 + 3) + KV_BLOCK
        with Engine(root) as engine:
            assert list(engine.submit(request(prompts[5], max_tokens=4))) == found[5]

"""Whatever comes and goes: the budget is kept, nobody starves, and every block comes back."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pyllama_dist.engine.blocks import BlockPool
from pyllama_dist.engine.scheduler import BESIDE, Scheduler, Step
from pyllama_dist.engine.sequence import Request, Sequence, State
from pyllama_kernels.pages import KV_BLOCK
from tests.fake_root import FakeRoot
from tests.tiers import slow_but

pytestmark = pytest.mark.timeout(120)


def scheduler_of(root: FakeRoot) -> Scheduler:
    program = root.node.program
    return Scheduler(
        BlockPool(program.n_blocks, root.size),
        n_seqs=program.n_seqs,
        max_rows=program.max_rows,
        max_logits=program.max_logits,
    )


def sequence(number: int, prompt, max_tokens: int = 5, **options) -> Sequence:
    return Sequence.of(
        Request(prompt, lambda row: int(row.argmax()), max_tokens=max_tokens, **options), number
    )


def run(root: FakeRoot, scheduler: Scheduler, beside: int = BESIDE) -> Step | None:
    """One step, and what an engine does after it."""
    step = scheduler.plan(beside)
    if step is None:
        return None
    logits = root.step(step.tokens, step.batch)
    scheduler.settle()
    for one, row in zip(step.logits, logits, strict=True):
        one.tokens.append(int(row.argmax()))
        if len(one.tokens) == len(one.request.prompt) + one.request.max_tokens:
            scheduler.end(one)
    return step


def alone(root: FakeRoot, prompt, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(root.logits_of(tokens).argmax()))
    return tokens


class Machine(RuleBasedStateMachine):
    @initialize(
        n_seqs=st.integers(1, 5),
        n_blocks=st.integers(4, 20),
        size=st.sampled_from([1, 2, 4]),
        max_rows=st.sampled_from([1, 2, 5, 8, 32, 40]),
        max_logits=st.integers(1, 5),
    )
    def start(self, n_seqs, n_blocks, size, max_rows, max_logits):
        self.room = n_blocks * size
        self.root = FakeRoot(
            n_seqs=n_seqs,
            n_blocks=n_blocks,
            block_size=size,
            seq_len=self.room,
            max_rows=max_rows,
            max_logits=max_logits,
            vocab_size=3,  # texts often are alike
        )
        self.scheduler = scheduler_of(self.root)
        self.all: list[Sequence] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=60),
        max_tokens=st.integers(1, 12),
    )
    def arrive(self, prompt, max_tokens):
        prompt = prompt[: self.room - 1]
        new = sequence(len(self.all), prompt, min(max_tokens, self.room - len(prompt)))
        self.all.append(new)
        self.scheduler.add(new)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data):
        gone = data.draw(st.sampled_from(self.alive()))
        self.scheduler.end(gone)
        assert gone.state is State.DONE

    @rule()
    def step(self):
        alive = self.alive()
        step = run(self.root, self.scheduler)
        if not alive:
            assert step is None
            return
        served = [one for one, _ in step.rows]
        assert alive[0] in served  # the oldest goes on with each step: so nobody starves
        assert len(set(served)) == len(served)
        rows, most = len(step.tokens), self.root.node.program.max_rows
        assert rows == sum(count for _, count in step.rows) <= most
        if most >= 32:
            ends = set(step.logits)
            assert all(count % 16 == 0 for one, count in step.rows if one not in ends)

    @rule(count=st.integers(2, 10))
    def steps(self, count):
        for _ in range(count):
            self.step()

    @invariant()
    def blocks_and_chains_agree(self):
        pool, running = self.scheduler.pool, self.scheduler.running
        assert running == sorted(running, key=lambda one: one.number)
        uses = Counter(block for one in running for block in one.chain.blocks)
        tree = list(pool.blocks())
        for block in tree:
            assert block.references == uses[block]
            assert block.computed == len(block.tokens) <= pool.size
            assert not block.children or len(block.tokens) == pool.size
        known = {block.number for block in [*tree, *uses]}
        assert len(known) == len({*tree, *uses})
        assert pool.available == pool.n_blocks - len(uses)
        for one in running:
            held = [token for block in one.chain.blocks for token in block.tokens]
            assert held[: one.chain.length] == one.tokens[: one.chain.length]

    def alive(self) -> list[Sequence]:
        return [one for one in self.all if one.state is not State.DONE]

    def teardown(self):
        if not hasattr(self, "all"):
            return
        bound = sum(len(one.tokens) + one.request.max_tokens for one in self.alive())
        for _ in range(bound):  # each step brings the oldest at least one token further
            run(self.root, self.scheduler)
        assert not self.alive()
        assert self.scheduler.pool.available == self.scheduler.pool.n_blocks
        for one in self.all:
            expected = alone(self.root, one.request.prompt, one.request.max_tokens)
            assert one.tokens == expected[: len(one.tokens)]


@pytest.mark.parametrize("examples", slow_but([100], [100, 400]))
def test_the_machine(examples):
    machine = settings(max_examples=examples, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(Machine, settings=machine)


def test_those_that_decode_come_first_and_a_prompt_fills_the_rest():
    root = FakeRoot(n_blocks=200, seq_len=400, max_rows=64, max_logits=4)
    scheduler = scheduler_of(root)
    scheduler.add(sequence(0, [1], 50))
    run(root, scheduler)
    scheduler.add(sequence(1, range(100)))
    step = scheduler.plan()
    assert [(one.number, count) for one, count in step.rows] == [(0, 1), (1, 48)]
    assert step.logits == [step.rows[0][0]]


def test_a_prompt_takes_fewer_rows_while_others_decode():
    root = FakeRoot(n_blocks=300, seq_len=1000, max_rows=256, max_logits=4)
    scheduler = scheduler_of(root)
    scheduler.add(sequence(0, [1], 50))
    assert len(run(root, scheduler).tokens) == 1
    scheduler.add(sequence(1, range(600)))
    assert len(run(root, scheduler).tokens) == 1 + 64


def test_prompts_are_read_in_the_order_of_their_arrival():
    root = FakeRoot(n_blocks=100, seq_len=100, max_rows=32, max_logits=4)
    scheduler = scheduler_of(root)
    for number in range(3):
        scheduler.add(sequence(number, [number] * 40))
    order = [[one.number for one, _ in run(root, scheduler).rows] for _ in range(5)]
    assert order[0] == [0]
    assert [min(numbers) for numbers in order] == [0, 0, 0, 0, 0]
    assert order[1] == [0, 1]


def test_b3_a_short_prompt_does_not_wait_for_a_long_one():
    root = FakeRoot(n_blocks=500, seq_len=1000, max_rows=64, max_logits=4)
    scheduler = scheduler_of(root)
    scheduler.add(sequence(0, range(900)))
    run(root, scheduler)
    scheduler.add(sequence(1, [1] * 500))
    scheduler.add(sequence(2, [2] * 20))
    assert [(one.number, count) for one, count in run(root, scheduler).rows] == [(0, 64)]
    scheduler.end(scheduler.waiting[0])  # nobody overtakes one who waits
    assert [(one.number, count) for one, count in run(root, scheduler).rows] == [(2, 20), (0, 32)]


def test_b3_nor_where_a_step_has_room_for_one_prompt_only():
    root = FakeRoot(n_blocks=500, seq_len=1000, max_rows=64, max_logits=4)
    scheduler = scheduler_of(root)
    scheduler.add(sequence(0, [1], 50))
    run(root, scheduler)
    for number, length in ((1, 900), (2, 10), (3, 16)):
        scheduler.add(sequence(number, [number] * length, 1))
    steps = [run(root, scheduler, beside=16) for _ in range(5)]
    prompts = [[(one.number, count) for one, count in step.rows if one.number] for step in steps]
    assert prompts == [[(2, 10)], [(1, 16)], [(3, 16)], [(1, 16)], [(1, 16)]]


def test_what_a_long_prompt_leaves_is_half_of_what_is_left_to_it():
    """Not of the whole step: after another prompt that may be more than there is."""
    root = FakeRoot(n_blocks=500, seq_len=1000, max_rows=256, max_logits=4)
    scheduler = scheduler_of(root)
    for number, length in enumerate((200, 100, 16)):
        scheduler.add(sequence(number, [number] * length))
    step = run(root, scheduler)
    assert [(one.number, count) for one, count in step.rows] == [(0, 200), (2, 16), (1, 32)]


def test_groups_take_turns_to_start():
    root = FakeRoot(n_seqs=2, n_blocks=100, seq_len=100, max_rows=32, max_logits=4)
    scheduler = scheduler_of(root)
    for number, group in enumerate(["a", "a", "a", "b"]):
        scheduler.add(sequence(number, [number] * 4, 30, group=group))
    run(root, scheduler)
    assert [one.number for one in scheduler.running] == [0, 3]
    scheduler.end(scheduler.running[1])
    run(root, scheduler)
    assert [one.number for one in scheduler.running] == [0, 1]


def test_c7_a_salt_hides_what_is_cached():
    root = FakeRoot(n_blocks=100, block_size=4, seq_len=100, max_rows=32, max_logits=4)
    scheduler = scheduler_of(root)
    found = []
    for number, salt in enumerate(["one", "other", "one", ""]):
        scheduler.add(sequence(number, range(20), 1, salt=salt))
        found.append(run(root, scheduler).rows[0][0].timings.cached_tokens)
    assert found == [0, 0, 19, 0]


def test_without_blocks_the_newest_is_preempted_and_computed_again():
    root = FakeRoot(n_seqs=3, n_blocks=6, block_size=4, seq_len=24, max_rows=8, max_logits=3)
    scheduler = scheduler_of(root)
    all_ = [sequence(number, [number, 7, 7], 15) for number in range(3)]
    for one in all_:
        scheduler.add(one)
    while run(root, scheduler):
        pass
    assert all_[0].timings.preemptions == 0
    assert all_[-1].timings.preemptions > 0
    for one in all_:
        assert one.tokens == alone(root, one.request.prompt, 15)


def test_a_shared_beginning_is_computed_once():
    root = FakeRoot(
        n_seqs=8, n_blocks=100, block_size=KV_BLOCK, seq_len=2000, max_rows=256, max_logits=8
    )
    scheduler = scheduler_of(root)
    system = [i % 49 for i in range(1000)]
    all_ = [sequence(number, [*system, number, number], 4) for number in range(8)]
    for one in all_:
        scheduler.add(one)
    while run(root, scheduler):
        pass
    own = 8 * (2 + 4 - 1)
    assert (
        root.computed <= 1000 + own + KV_BLOCK
    )  # within the step of its end, whole blocks are shared
    for one in all_:
        assert one.tokens == alone(root, one.request.prompt, 4)


def test_memory_is_taken_for_what_is_held():
    root = FakeRoot(
        n_seqs=16, n_blocks=1000, block_size=KV_BLOCK, seq_len=8192, max_rows=256, max_logits=16
    )
    scheduler = scheduler_of(root)
    for number in range(8):
        scheduler.add(sequence(number, [number, *range(498)], 1000))
    scheduler.add(sequence(8, [9, *range(7998)], 1000))
    while not (len(scheduler.running) == 9 and all(s.state == "decode" for s in scheduler.running)):
        run(root, scheduler)
    taken = KV_BLOCK * (1000 - scheduler.pool.available)
    held = sum(one.chain.length for one in scheduler.running)
    assert 12_000 <= held <= taken <= 1.05 * held


def test_every_logit_of_a_prompt_can_be_asked_for():
    root = FakeRoot(n_blocks=8, max_rows=8, max_logits=3)
    scheduler = scheduler_of(root)
    scheduler.add(sequence(0, [1, 2, 3], 20))
    run(root, scheduler)
    asked = sequence(1, [1, 2, 3, 4, 5], prompt_logits=True)
    scheduler.add(asked)
    found = []
    while asked.remaining:
        step = scheduler.plan()
        logits = root.step(step.tokens, step.batch)
        scheduler.settle()
        found += [row.copy() for one, row in zip(step.logits, logits, strict=True) if one is asked]
        for one in step.logits:
            if one is not asked:
                one.tokens.append(0)
    assert asked.timings.cached_tokens == 0
    assert [row.tolist() for row in found] == [
        root.logits_of([1, 2, 3, 4, 5][:n]).tolist() for n in range(1, 6)
    ]

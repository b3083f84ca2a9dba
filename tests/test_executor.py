"""The compiled executor against the plain one, and with other threads and other batches."""

import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from msgspec.structs import replace

from pyllama_dist.config import Arch, FloatType
from pyllama_dist.errors import UsageError
from pyllama_dist.executor import make_executor
from pyllama_dist.executor.compiled import CompiledExecutor
from pyllama_dist.executor.interpreter import Interpreter
from pyllama_dist.executor.memory import Memory, planned_bytes
from pyllama_dist.ops import Add, Quantize, Rope, SiluMul
from pyllama_dist.program import Batch, Buffer, Program, Segment, weights
from pyllama_kernels import layout, team
from pyllama_kernels.attention import MOST
from pyllama_kernels.entries import ENTRIES
from pyllama_kernels.pages import KV_BLOCK, read_positions
from tests.tiers import slow_but

WEIGHTS = pytest.mark.parametrize(
    "float_type", [FloatType.F32, FloatType.Q40, FloatType.Q80], ids=lambda t: t.name
)
CACHES = pytest.mark.parametrize(
    "cache", [FloatType.F32, FloatType.F16, FloatType.Q80], ids=lambda t: t.name
)
ARCHS = pytest.mark.parametrize("arch", list(Arch))
TOKENS = (5, 9, 2, 100, 0, 9, 77, 31)


@contextmanager
def compiled(model, n_threads=1, **limits):
    with CompiledExecutor(model.programs(**limits)[0], n_threads) as executor:
        model.fill(executor.memory)
        yield executor


@contextmanager
def plain(model, **limits):
    with Interpreter(model.programs(**limits)[0]) as executor:
        model.fill(executor.memory)
        yield executor


def step(model, executor, tokens, batch):
    """One step of a node that is alone: the logits that the batch wants."""
    memory = executor.memory
    memory.pipes["x"].f32(0, len(tokens))[:] = model.embed(tokens)
    executor.begin(batch)
    for segment in range(len(memory.program.segments)):
        executor.run(segment)
    executor.end()
    return memory.pipes["logits"].f32(0, len(batch.logits)).copy()


def assert_close(found, expected, float_type=FloatType.F32):
    """Equal up to the order of sums; one rounding of an activation may fall to the other side."""
    atol = 1e-4 if float_type is FloatType.F32 else 5e-2
    np.testing.assert_allclose(found, expected, atol=atol * np.abs(expected).max(), rtol=0)


@ARCHS
@WEIGHTS
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_agrees_with_plain(tiny, run_of, arch, float_type, bias):
    model = tiny(arch=arch, weights=float_type, qkv_bias=bias)
    with compiled(model) as one, plain(model) as other:
        found = step(model, one, TOKENS, run_of(0, TOKENS))
        expected = step(model, other, TOKENS, run_of(0, TOKENS))
        assert_close(found, expected, float_type)
        for name in one.memory.caches:
            assert_close(kept(one, name), kept(other, name), float_type)


def kept(executor, name):
    """A cache as numbers, [n_blocks * kv_heads * positions, head_dim] float32."""
    (spec,) = (cache for cache in executor.memory.program.caches if cache.name == name)
    held = executor.memory.caches[name]
    pages = held.reshape(-1, held.shape[-1])
    return read_positions(pages, spec.head_dim, spec.float_type, lanes_last=name.startswith("k"))


@CACHES
def test_a_cache_is_kept_in_any_float_type(tiny, run_of, cache):
    model = tiny(head_dim=32)
    limits = {"cache": cache}
    with compiled(model, 2, **limits) as one, plain(model, **limits) as other:
        for start in (0, 8, 16):
            found, expected = (
                step(model, executor, TOKENS, run_of(start, TOKENS)) for executor in (one, other)
            )
            # A key may be rounded to the other side.
            assert_close(found, expected, FloatType.F32 if cache is FloatType.F32 else cache)
        for name in one.memory.caches:
            assert_close(kept(one, name), kept(other, name), cache)
            (size,) = {memory.memory.caches[name].shape[-1] for memory in (one, other)}
            assert size == 16 * cache.row_bytes(32)
    with plain(model) as exact:
        for start in (0, 8, 16):
            expected = step(model, exact, TOKENS, run_of(start, TOKENS))
    assert_close(found, expected, FloatType.F32 if cache is FloatType.F32 else cache)


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 50, "ffn_dim": 37, "n_heads": 3, "n_kv_heads": 1, "head_dim": 10, "rotary_dim": 4},
        {"n_heads": 1, "n_kv_heads": 1, "head_dim": 6, "rotary_dim": 0, "vocab_size": 1},
        {"n_heads": 6, "n_kv_heads": 6, "head_dim": 2, "rotary_dim": 2, "n_layers": 1},
    ],
    ids=str,
)
def test_compiled_agrees_with_plain_for_odd_sizes(tiny, run_of, sizes):
    model = tiny(**sizes)
    with compiled(model, n_threads=3) as one, plain(model) as other:
        tokens = [token % model.config.vocab_size for token in TOKENS]
        found = step(model, one, tokens, run_of(0, tokens))
        assert_close(found, step(model, other, tokens, run_of(0, tokens)))


@ARCHS
@WEIGHTS
@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_results_do_not_depend_on_the_number_of_threads(tiny, run_of, arch, float_type, n_threads):
    model = tiny(arch=arch, weights=float_type)
    with compiled(model) as one, compiled(model, n_threads) as several:
        batches = [(TOKENS, run_of(0, TOKENS)), ((3,), run_of(8, (3,))), ((4,), run_of(9, (4,)))]
        for tokens, batch in batches:
            found, expected = (step(model, e, tokens, batch) for e in (several, one))
            np.testing.assert_array_equal(found, expected)


@CACHES
def test_batches_and_decode_steps_are_the_same_on_any_number_of_threads(tiny, cache):
    """Over a context of several chunks, of three sequences."""
    model = tiny(weights=FloatType.Q40, head_dim=32, max_seq_len=640)
    limits = {"cache": cache, "max_rows": 40, "n_seqs": 3, "seq_len": 640}
    rng = np.random.default_rng(0)
    prompt, positions = rng.integers(0, 101, 40).tolist(), range(0, 600, 40)
    steps = [
        (prompt, Batch((seq,) * 40, tuple(range(start, start + 40)), (0, 39)))
        for seq, end in enumerate((600, 280, 40))
        for start in positions
        if start < end
    ]
    for n_rows in (1, 2, 3, 4):
        places = [(0, 600), (1, 280), (2, 40), (0, 601)][:n_rows]
        seqs, at = zip(*places, strict=True)
        steps.append((prompt[:n_rows], Batch(seqs, at, tuple(range(n_rows)))))
    with ExitStack() as stack:
        teams = [stack.enter_context(compiled(model, n, **limits)) for n in (1, 2, 3, 4)]
        for tokens, batch in steps:
            expected, *others = (step(model, executor, tokens, batch) for executor in teams)
            assert np.isfinite(expected).all()
            for found in others:
                np.testing.assert_array_equal(found, expected)


@CACHES
@pytest.mark.parametrize("n_kv_heads", slow_but([3], [2, 3, 5]))
@pytest.mark.parametrize("arch", [Arch.GLM4, Arch.QWEN3], ids=lambda a: a.name)
def test_threads_share_the_heads_of_a_short_context(tiny, run_of, arch, n_kv_heads, cache):
    """Where it is worth it: the other models here are too small."""
    sizes = {"n_kv_heads": n_kv_heads, "n_heads": 4 * n_kv_heads, "head_dim": 128, "n_layers": 1}
    model = tiny(arch=arch, weights=FloatType.Q40, **sizes)
    limits = {"cache": cache}
    with ExitStack() as stack:
        one, *others = (stack.enter_context(compiled(model, n, **limits)) for n in (1, 2, 3, 7))
        reference = stack.enter_context(plain(model, **limits))
        assert one._table["units"].max() == n_kv_heads
        for position in range(20):
            tokens = (position * 7 % 101,)
            expected = step(model, one, tokens, run_of(position, tokens))
            for several in others:
                found = step(model, several, tokens, run_of(position, tokens))
                np.testing.assert_array_equal(found, expected)
            close = step(model, reference, tokens, run_of(position, tokens))
            assert_close(expected, close, FloatType.Q40)


@pytest.mark.parametrize(("group", "shared"), [(MOST, True), (MOST + 1, False)])
def test_key_heads_are_shared_if_attention_takes_all_their_queries_at_once(tiny, group, shared):
    sizes = {"n_kv_heads": 2, "n_heads": 2 * group, "head_dim": 32, "n_layers": 1}
    with compiled(tiny(**sizes)) as executor:
        assert (executor._table["units"] == 2).any() == shared


@pytest.mark.parametrize(
    ("sizes", "n_rows"),
    [({"ffn_dim": 257 * 32}, 1), ({"ffn_dim": 13 * 32}, 70), ({"arch": Arch.GLM4_MOE}, 70)],
    ids=["row", "rows", "experts"],
)
def test_threads_round_what_they_activate(tiny, run_of, sizes, n_rows):
    """In whole blocks, which no number of threads here divides."""
    model = tiny(weights=FloatType.Q40, **sizes)
    tokens = tuple(i * 7 % 101 for i in range(n_rows))
    limits = {"max_rows": n_rows, "max_logits": n_rows, "seq_len": 80}
    with compiled(model, **limits) as one:
        assert ENTRIES["silu_mul"].address in one._table["entry"][one._table["fused"] == 2]
        expected = step(model, one, tokens, run_of(0, tokens))
    with plain(model, **limits) as reference:
        assert_close(expected, step(model, reference, tokens, run_of(0, tokens)), FloatType.Q40)
    for n_threads in (2, 3, 5):
        with compiled(model, n_threads, **limits) as several:
            for _ in range(20):  # a race need not show at once
                found = step(model, several, tokens, run_of(0, tokens))
                np.testing.assert_array_equal(found, expected)


def program_of(buffers: tuple[Buffer, ...], segments: tuple[Segment, ...]) -> Program:
    """A program of one node without weights, for five rows."""
    return Program(
        n_nodes=1,
        node=0,
        max_rows=5,
        max_logits=1,
        n_experts=0,
        n_active_experts=0,
        n_seqs=1,
        n_blocks=1,
        seq_len=8,
        pipes=(),
        buffers=buffers,
        caches=(),
        segments=segments,
    )


def test_what_is_rounded_head_by_head_waits_for_all_that_is_activated():
    """There a part needs others than its own: a worker may be sent any program."""

    def fused(heads, source="hidden"):
        buffers = tuple(Buffer(name, FloatType.F32, 64) for name in ("gate", "up", "hidden"))
        ops = (SiluMul("gate", "up", "hidden"), Quantize(source, "hidden_q80", heads))
        buffers = (*buffers, Buffer("hidden_q80", FloatType.Q80, 64))
        program = program_of(buffers, (Segment("activate", ops),))
        with CompiledExecutor(program, 1) as executor:
            return executor._table["fused"].tolist()

    assert fused(heads=1) == [2, 1]
    assert fused(heads=2) == [1, 1]
    assert fused(heads=1, source="up") == [1, 1]


def test_many_steps_in_a_row(tiny, run_of):
    model = tiny(weights=FloatType.Q40)
    with compiled(model, 2) as one, plain(model) as other:
        for position in range(32):
            tokens = (position * 7 % 101,)
            found = step(model, one, tokens, run_of(position, tokens))
            expected = step(model, other, tokens, run_of(position, tokens))
            assert_close(found, expected, FloatType.Q40)


@WEIGHTS
def test_a_prompt_at_once_is_a_prompt_token_by_token(tiny, run_of, float_type):
    model = tiny(weights=float_type)
    with compiled(model) as at_once, compiled(model) as one_by_one:
        expected = step(model, at_once, TOKENS, run_of(0, TOKENS))
        for position, token in enumerate(TOKENS):
            found = step(model, one_by_one, (token,), run_of(position, (token,)))
            np.testing.assert_array_equal(found[0], expected[position])


def test_sequences_do_not_disturb_each_other(tiny, run_of):
    model = tiny(weights=FloatType.Q40)
    first, second = (5, 9, 2, 100), (1, 1, 60)
    with compiled(model) as alone, compiled(model) as shared:
        step(model, shared, second, run_of(0, second, seq=1))
        found = step(model, shared, first, run_of(0, first, seq=0))
        np.testing.assert_array_equal(found, step(model, alone, first, run_of(0, first)))
        step(model, alone, second, run_of(0, second))
        found = step(model, shared, (8,), run_of(3, (8,), seq=1))
        np.testing.assert_array_equal(found, step(model, alone, (8,), run_of(3, (8,))))


@pytest.mark.parametrize("make", [compiled, plain], ids=["compiled", "plain"])
def test_rows_of_several_sequences_in_one_batch_are_separate_steps(tiny, run_of, make):
    model = tiny()
    prompts = [(5, 9, 2), (1, 60), (7,)]
    limits = {"n_seqs": 3}
    mixed_batch = Batch(seqs=(2, 0, 1), positions=(1, 3, 2), logits=(1, 2, 0))
    with make(model, **limits) as separate, make(model, **limits) as mixed:
        for executor in (separate, mixed):
            for seq, prompt in enumerate(prompts):
                step(model, executor, prompt, run_of(0, prompt, seq=seq))
        found = step(model, mixed, (42, 40, 41), mixed_batch)
        for seq, prompt in enumerate(prompts):
            tokens = (40 + seq,)
            expected = step(model, separate, tokens, run_of(len(prompt), tokens, seq=seq))
            assert_close(found[seq], expected[0])


@pytest.mark.parametrize("make", [compiled, plain], ids=["compiled", "plain"])
def test_logits_come_in_the_order_in_which_they_are_wanted(tiny, run_of, make):
    model = tiny()
    with make(model) as executor:
        every = step(model, executor, TOKENS, run_of(0, TOKENS))
        batch = Batch((0,) * 8, tuple(range(8)), (7, 0, 0))
        assert_close(step(model, executor, TOKENS, batch), every[[7, 0, 0]])
        nothing = Batch((0,) * 8, tuple(range(8)), ())
        assert step(model, executor, TOKENS, nothing).shape == (0, 101)


def test_a_step_works_after_one_that_was_given_up(tiny, run_of):
    model = tiny()
    batch = run_of(0, TOKENS)
    with compiled(model) as one, compiled(model, 3) as several:
        expected = step(model, one, TOKENS, batch)
        for ran in range(len(several.memory.program.segments) + 1):
            several.begin(batch)
            for segment in range(ran):
                several.run(segment)
            several.end()
            np.testing.assert_array_equal(step(model, several, TOKENS, batch), expected)


def kernel_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("kernel-")]


def test_closing_ends_the_threads(tiny, run_of):
    model = tiny()
    with compiled(model, 4) as executor:
        assert len(kernel_threads()) == 3
        step(model, executor, TOKENS, run_of(0, TOKENS))
        assert len(kernel_threads()) == 3
    assert not kernel_threads()
    executor.close()


def test_an_error_within_a_step_ends_the_threads_too(tiny, run_of):
    model = tiny()

    def broken_step():
        with compiled(model, 3) as executor:
            executor.begin(run_of(0, TOKENS))
            try:
                executor.run(0)
                raise LookupError
            finally:
                executor.end()

    with pytest.raises(LookupError):
        broken_step()
    assert not kernel_threads()


def test_a_part_that_was_taken_late_is_none():
    """A thread may be preempted for long, between any two instructions."""
    state = team.new_state(1)
    team.open_op(state, 7, 1, 2, 1)
    assert [team.take_part(state, 0)[3] for _ in range(3)] == [0, 1, 2]
    assert not team.are_last(state, 1, 2)
    assert team.are_last(state, 1, 2)
    team.open_op(state, 8, 1, 3, 1)
    assert team.take_part(state, 0) == (8, 1, 3, 0)
    team.wait_for_next(state, 0, 7, 0)  # returns at once: op 7 is over
    team.open_op(state, 9, 0, 0, 1)
    assert team.take_part(state, 0)[1] == 0  # nothing is open


def test_who_is_done_helps_others():
    state = team.new_state(3)
    team.open_op(state, 7, 2, 3, 3)  # no range for the third thread
    assert [team.find_range(state, thread, 3) for thread in range(3)] == [0, 1, 0]
    assert team.take_part(state, 0) == (7, 2, 3, 0)
    assert team.take_part(state, 2)[3] == 3
    for _ in range(2):
        team.take_part(state, 0)
    assert [team.find_range(state, thread, 3) for thread in range(3)] == [1, 1, 1]
    for _ in range(3):
        team.take_part(state, 1)
    assert [team.find_range(state, thread, 3) for thread in range(3)] == [0, 1, 2]  # nothing
    assert not team.are_last(state, 2, 6)
    assert team.are_last(state, 4, 6)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_nobody_waits_for_a_thread_that_does_not_come(tiny, run_of, n_threads, monkeypatch):
    model = tiny(weights=FloatType.Q40)
    batch = run_of(0, TOKENS)
    with compiled(model, 1) as alone:
        expected = step(model, alone, TOKENS, batch)
    with compiled(model, n_threads) as executor:
        monkeypatch.setattr(executor, "_enter", [])  # the others are never called
        np.testing.assert_array_equal(step(model, executor, TOKENS, batch), expected)
        monkeypatch.undo()


@pytest.mark.parametrize("n_threads", [2, 4])
def test_threads_that_come_too_late_do_no_harm(tiny, run_of, n_threads):
    """They enter when the step is over, or in the middle of a later one."""
    model = tiny(weights=FloatType.Q40)
    batch = run_of(0, TOKENS)
    with compiled(model, 1) as alone:
        expected = step(model, alone, TOKENS, batch)
    with compiled(model, n_threads) as executor:
        for i in range(100):
            for enter in executor._enter:
                for _ in range(i % 3):
                    enter.put(True)
            np.testing.assert_array_equal(step(model, executor, TOKENS, batch), expected)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_stay_for_a_step_that_follows_soon_and_then_leave(tiny, run_of, n_threads):
    model = tiny(weights=FloatType.Q40)
    batch = run_of(0, TOKENS)
    with compiled(model, 1) as alone:
        expected = step(model, alone, TOKENS, batch)
    with compiled(model, n_threads) as executor:
        for pause in (0, 0, 1e-4, 0.1, 0):
            time.sleep(pause)
            np.testing.assert_array_equal(step(model, executor, TOKENS, batch), expected)
        deadline = time.monotonic() + 10
        while any(
            team.is_inside(executor._state, thread) or not enter.empty()
            for thread, enter in enumerate(executor._enter, start=1)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("n_threads", [2, 5])
def test_segments_without_ops_do_not_confuse_the_team(n_threads):
    buffers = (Buffer("one", FloatType.F32, 1), Buffer("sum", FloatType.F32, 1))
    segments = (Segment("idle"), Segment("add", (Add("one", "sum"),))) * 40
    program = program_of(buffers, segments)
    with CompiledExecutor(program, n_threads) as executor:
        total = executor.memory.buffers["sum"]
        executor.memory.buffers["one"][:] = 1
        for _ in range(25):
            total[:] = 0
            executor.begin(Batch((0,) * 5, tuple(range(5)), ()))
            for segment in range(len(program.segments)):
                executor.run(segment)
            executor.end()
            np.testing.assert_array_equal(total, np.full((5, 1), 40))


def test_an_op_is_over_also_if_the_command_ends_with_its_number():
    """So it is where a segment without ops follows a sum: a thread was seen waiting for ever."""
    state = team.new_state(2)
    team.open_op(state, 7, 0, 0, 2)
    waiting = threading.Thread(target=team.wait_for_next, args=(state, 0, 7, 0), daemon=True)
    waiting.start()
    waiting.join(10)
    over = not waiting.is_alive()
    team.open_op(state, 8, 0, 0, 2)  # ends it in any case
    assert over


def test_the_ticket_of_the_first_range_is_written_last(monkeypatch):
    written = []
    monkeypatch.setattr(team, "atomic_store", lambda state, word, value: written.append(word))
    team.open_op.py_func(None, 7, 2, 3, 5)
    first, *others = reversed(written)
    assert first == team._TICKET
    assert len(written) == 6
    assert first not in others


@pytest.mark.slow
def test_who_opens_an_op_may_be_put_aside():
    """Others finish an op that has fewer ranges than threads before its tickets are all written."""
    narrow, wide = 4096, 32768  # in 2 ranges, and in 5
    buffers = tuple(
        Buffer(name, FloatType.F32, width)
        for name, width in (("a", narrow), ("b", narrow), ("c", wide), ("d", wide))
    )
    program = program_of(buffers, (Segment("add", (Add("a", "b"), Add("c", "d")) * 100),))
    with CompiledExecutor(program, 5) as executor:
        one, some, two, more = executor.memory.buffers.values()
        one[:], two[:] = 1, 2
        # With the tickets in another order a step in tens of thousands did not end.
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            some[:], more[:] = 0, 0
            executor.begin(Batch((0,), (0,), ()))
            executor.run(0)
            executor.end()
            np.testing.assert_array_equal(some[0], np.full(narrow, 100))
            np.testing.assert_array_equal(more[0], np.full(wide, 200))


# --- kernels and memory


def test_the_environment_chooses_the_kernels(tiny, monkeypatch):
    program = tiny().programs()[0]
    for asked, kind in (("portable", CompiledExecutor), ("reference", Interpreter)):
        monkeypatch.setenv("PYLLAMA_KERNELS", asked)
        with make_executor(program, 1) as executor:
            assert isinstance(executor, kind)
    monkeypatch.setenv("PYLLAMA_KERNELS", "fastest")
    with pytest.raises(UsageError, match="no kernels 'fastest'"):
        make_executor(program, 1)


def arrays_of(memory):
    """Everything that was allocated."""
    yield from (pipe.memory for pipe in memory.pipes.values())
    yield from memory.buffers.values()
    yield from memory.caches.values()
    yield from map(memory.matrix, weights(memory.program))
    for made in memory.constants.values():
        yield from made if isinstance(made, tuple) else (made,)


@WEIGHTS
@pytest.mark.parametrize("n_nodes", [1, 3])
@CACHES
def test_no_more_memory_is_taken_than_planned(tiny, float_type, n_nodes, cache):
    model = tiny(weights=float_type, head_dim=32)
    for program in model.programs(n_nodes, sync=FloatType.Q80, cache=cache, seq_len=37):
        with Interpreter(program) as executor:
            assert sum(array.nbytes for array in arrays_of(executor.memory)) <= (
                planned_bytes(program)
            )


@WEIGHTS
def test_weights_are_kept_as_kernels_read_them(tiny, float_type):
    model = tiny(weights=float_type)
    memory = Memory(model.programs(3)[1])
    model.fill(memory)
    for weight in weights(memory.program):
        expected = model.slice(weight.tensor, weight.rows, weight.cols)
        found = memory.matrix(weight)
        if weight.float_type is FloatType.Q40:
            found = layout.unpack_weights(found).reshape(-1, expected.shape[1])
            assert not found[len(expected) :].any()
        np.testing.assert_array_equal(found[: len(expected)], expected)


def test_memory_that_kernels_read_starts_at_cache_lines(tiny):
    memory = Memory(tiny(weights=FloatType.Q40).programs(3)[1])
    held = [*memory.buffers.values(), *memory.caches.values()]
    held += map(memory.matrix, weights(memory.program))
    assert all(array.ctypes.data % 64 == 0 for array in held)


def test_tables_of_rope_are_planned_for():
    program = Program(
        n_nodes=1,
        node=0,
        max_rows=1,
        max_logits=1,
        n_experts=0,
        n_active_experts=0,
        n_seqs=1,
        n_blocks=1,
        seq_len=1 << 24,
        pipes=(),
        buffers=(Buffer("q", FloatType.F32, 1 << 16),),
        caches=(),
        segments=(Segment("turn", (Rope("q", 1 << 16, 1 << 16, 1e4),)),),
    )
    assert planned_bytes(program) >= (1 << 24) * (1 << 16) * 4


# --- blocks


@CACHES
@pytest.mark.parametrize("arch", [Arch.GLM4, Arch.GLM_MOE_DSA], ids=lambda a: a.name)
def test_results_do_not_depend_on_where_blocks_lie_or_on_neighbours(tiny, arch, cache):
    """One sequence alone in blocks of its own, and among others in whatever blocks there are."""
    model = tiny(arch=arch, weights=FloatType.Q40, head_dim=32, max_seq_len=640)
    limits = {"cache": cache, "max_rows": 40, "seq_len": 640}
    rng = np.random.default_rng(7)
    prompts = rng.integers(0, 101, (3, 600)).tolist()
    order = rng.permutation(15).reshape(3, 5)
    table = tuple((seq, place, int(order[seq, place])) for seq in range(3) for place in range(5))
    found = []
    with compiled(model, 2, n_seqs=3, **limits) as shared:
        for seq, prompt in enumerate(prompts):
            for start in range(0, 600, 40):
                rows = tuple(range(start, start + 40))
                batch = Batch((seq,) * 40, rows, (), table if seq == start == 0 else ())
                step(model, shared, prompt[start : start + 40], batch)
        for at in (600, 601):
            batch = Batch((2, 0, 1), (at, at, at), (1, 2, 0))
            found.append(step(model, shared, (5, 6, 7), batch))
    for seq, (prompt, token) in enumerate(zip(prompts, (6, 7, 5), strict=True)):
        with compiled(model, 1, n_seqs=1, **limits) as alone:
            for start in range(0, 600, 40):
                batch = Batch((0,) * 40, tuple(range(start, start + 40)), ())
                step(model, alone, prompt[start : start + 40], batch)
            for logits, at in zip(found, (600, 601), strict=True):
                expected = step(model, alone, (token,), Batch((0,), (at,), (0,)))[0]
                np.testing.assert_array_equal(logits[seq], expected)


@CACHES
@pytest.mark.parametrize("make", slow_but([compiled], [compiled, plain]))
def test_a_sequence_goes_on_from_copies_of_anothers_blocks(tiny, run_of, make, cache):
    """A beginning is shared: its whole block as it is, the one that is begun as a copy."""
    cache_type = FloatType.F32 if cache is FloatType.F32 else FloatType.Q40
    model = tiny(head_dim=32, max_seq_len=300)
    limits = {"cache": cache, "max_rows": 140, "max_logits": 140, "seq_len": 300}
    prompt = [i * 7 % 101 for i in range(KV_BLOCK + 9)]
    with make(model, n_seqs=1, **limits) as alone:
        step(model, alone, prompt, run_of(0, prompt))
        first = step(model, alone, (8,), run_of(len(prompt), (8,)))
        other = step(model, alone, (9,), run_of(len(prompt), (9,)))
    with make(model, n_seqs=2, n_blocks=4, **limits) as shared:
        held = shared.memory
        held.table[:] = -1
        batch = run_of(0, prompt)
        step(model, shared, prompt, replace(batch, table=((0, 1, 0), (0, 0, 3))))
        before = [cache[0].copy() for cache in held.caches.values()]
        batch = Batch((0, 1), (len(prompt),) * 2, (0, 1), ((1, 0, 3), (1, 1, 2)), ((0, 2),))
        found = step(model, shared, (8, 9), batch)
        np.testing.assert_array_equal(held.table, [[3, 0, -1], [3, 2, -1]])
        assert not any(cache[1].any() for cache in held.caches.values())
        for old, (of_one, _, of_other, _) in zip(before, held.caches.values(), strict=True):
            # One more position each, and not the same.
            assert (old != of_one).any()
            assert (of_one != of_other).any()
    for logits, expected in zip(found, (first[0], other[0]), strict=True):
        if make is compiled:
            np.testing.assert_array_equal(logits, expected)
        else:  # a library's product of two rows is not that of one
            assert_close(logits, expected, cache_type)


def test_the_table_changes_before_blocks_are_copied(tiny):
    memory = Memory(tiny().programs(n_seqs=1, n_blocks=3, seq_len=32)[0])
    assert (memory.table == -1).all()
    for cache in memory.caches.values():
        cache[:] = np.arange(1, 4)[:, None, None, None]
    memory.set_batch(Batch((0,), (0,), (), ((0, 0, 2), (0, 0, 1)), ((0, 1), (1, 2))))
    assert memory.table.tolist() == [[1]]
    for cache in memory.caches.values():
        assert (cache == 1).all()

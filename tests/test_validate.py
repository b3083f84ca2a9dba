"""Programs and batches that would lead an op outside its memory are refused by name."""

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pyllama_dist.config import Arch, FloatType
from pyllama_dist.errors import ProtocolError
from pyllama_dist.executor.interpreter import Interpreter
from pyllama_dist.ops import (
    Add,
    Attention,
    Combine,
    Concat,
    Dispatch,
    ExpertMatmul,
    ExpertWeight,
    Gather,
    LayerNorm,
    Matmul,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    Select,
    SiluMul,
    Store,
)
from pyllama_dist.program import (
    AllReduce,
    Batch,
    Buffer,
    Cache,
    Pipe,
    Program,
    Segment,
    Sync,
    SyncKind,
    weights,
)
from pyllama_dist.validate import check_batch, check_program
from pyllama_kernels.pages import KV_BLOCK
from tests.tiers import slow_but

Q40, Q80, F32, F16 = FloatType.Q40, FloatType.Q80, FloatType.F32, FloatType.F16


@pytest.mark.parametrize("arch", list(Arch))
@pytest.mark.parametrize("weights_type", [F32, Q40, Q80])
@pytest.mark.parametrize("sync", [F32, Q80])
@pytest.mark.parametrize("n_nodes", slow_but([1, 3, 8], range(1, 9)))
def test_programs_of_models_are_accepted(tiny, arch, weights_type, sync, n_nodes):
    for program in tiny(arch=arch, weights=weights_type).programs(n_nodes, sync=sync):
        check_program(program)


@pytest.fixture(scope="module")
def program(tiny):
    """A worker's: it has every kind of op, memory and sync."""
    return tiny(weights=Q40).programs(3, sync=Q80)[1]


@dataclass(frozen=True)
class Change:
    """Other fields for the first op of a kind."""

    kind: type
    fields: dict[str, object]
    complaint: str

    def __call__(self, program: Program) -> Program:
        done = False

        def changed(op):
            nonlocal done
            if done or not isinstance(op, self.kind):
                return op
            done = True
            fields = {k: v(getattr(op, k)) if callable(v) else v for k, v in self.fields.items()}
            return replace(op, **fields)

        segments = tuple(
            replace(segment, ops=tuple(changed(op) for op in segment.ops))
            for segment in program.segments
        )
        assert done
        return replace(program, segments=segments)


def part(**fields):
    """Changes a weight."""
    return lambda weight: replace(weight, **fields)


BAD_OPS = [
    Change(RmsNorm, {"source": "nowhere"}, "nowhere does not exist"),
    Change(RmsNorm, {"target": "q"}, "differ in width"),
    Change(RmsNorm, {"target": "last"}, "other rows"),
    Change(RmsNorm, {"source": "y_q80"}, "not float32"),
    Change(RmsNorm, {"epsilon": math.nan}, "epsilon"),
    Change(RmsNorm, {"epsilon": math.inf}, "epsilon"),
    Change(RmsNorm, {"epsilon": -1e-6}, "epsilon"),
    Change(RmsNorm, {"weight": part(cols=(0, 63))}, "heads are not whole"),
    Change(RmsNorm, {"weight": part(cols=(0, 0))}, "heads are not whole"),
    Change(RmsNorm, {"weight": part(rows=(0, 2))}, "2 x 64, not 1 x 64"),
    Change(RmsNorm, {"weight": part(rows=(1, 0))}, "negative"),
    Change(RmsNorm, {"weight": part(float_type=Q80)}, "is Q80"),
    Change(Quantize, {"target": "y"}, "target is not Q80"),
    Change(Quantize, {"target": "z_q80"}, "widths differ"),
    Change(Quantize, {"target": "last_y_q80"}, "other rows"),
    Change(Quantize, {"source": "y_q80"}, "not float32"),
    Change(Quantize, {"source": "k.0"}, "k.0 does not exist"),
    Change(Matmul, {"source": "y"}, "does not go with"),
    Change(Matmul, {"source": "z_q80"}, "q_proj.weight is"),
    Change(Matmul, {"source": "last_y_q80"}, "other rows"),
    Change(Attention, {"query": "x"}, "must be a buffer"),
    Change(Matmul, {"source": "partials"}, "must be a buffer"),
    Change(Matmul, {"target": "k"}, "q_proj.weight is"),
    Change(Matmul, {"target": "y_q80"}, "not float32"),
    Change(Matmul, {"weight": part(float_type=F16)}, "F16 weights"),
    Change(Matmul, {"weight": part(float_type=F32)}, "does not go with"),
    Change(Matmul, {"weight": part(rows=(0, 1))}, "is 1 x 64"),
    Change(Matmul, {"weight": part(rows=(64, 0))}, "negative"),
    Change(Matmul, {"weight": part(cols=(0, 32))}, "x 32"),
    Change(Matmul, {"weight": part(cols=(0, 33))}, "x 33"),
    Change(Matmul, {"bias": part(cols=(0, 5))}, "1 x 5"),
    Change(Matmul, {"bias": part(rows=(0, 2))}, "q_proj.bias is 2 x"),
    Change(Matmul, {"bias": part(float_type=Q40)}, "q_proj.bias is Q40"),
    Change(Rope, {"target": "nowhere"}, "nowhere does not exist"),
    Change(Rope, {"target": "last"}, "no batch rows"),
    Change(Rope, {"head_dim": 17}, "not whole"),
    Change(Rope, {"rotary_dim": 7}, "odd"),
    Change(Rope, {"rotary_dim": 18}, "beyond the head"),
    Change(Rope, {"theta": math.nan}, "theta"),
    Change(Rope, {"theta": math.inf}, "theta"),
    Change(Rope, {"theta": 0.0}, "theta"),
    Change(Store, {"source": "q"}, "does not fill"),
    Change(Store, {"cache": "k"}, "cache k does not exist"),
    Change(Store, {"source": "last"}, "does not fill"),
    Change(Attention, {"query": "y_q80"}, "not float32"),
    Change(Attention, {"target": "y"}, "not as wide as values"),
    Change(Attention, {"target": "k"}, "not as wide as values"),
    Change(Attention, {"scale": math.nan}, "scale"),
    Change(Attention, {"selection": "y"}, "not seq_len wide"),
    Change(Attention, {"key_cache": "z"}, "cache z does not exist"),
    Change(Attention, {"first": 1 << 24}, "reach beyond"),
    Change(Attention, {"first": 3}, "6 query heads reach beyond 2 key heads"),
    Change(Attention, {"group": 1}, "reach beyond"),
    Change(SiluMul, {"up": "y"}, "differ in width"),
    Change(SiluMul, {"gate": "hidden_q80"}, "not float32"),
    Change(SiluMul, {"target": "y"}, "differ in width"),
    Change(Add, {"source": "q"}, "differ in width"),
    Change(Add, {"target": "partials"}, "not float32"),
    Change(Add, {"target": "last"}, "other rows"),
    Change(Gather, {"source": "last"}, "last has no batch rows"),
    Change(Gather, {"target": "y"}, "target has no logits rows"),
    Change(Gather, {"source": "q"}, "widths differ"),
]


@pytest.mark.parametrize(
    "change", BAD_OPS, ids=lambda c: f"{c.kind.__name__}-{next(iter(c.fields))}-{c.complaint}"
)
def test_an_op_that_does_not_fit_is_refused_by_name(program, change):
    where = rf"segment .+, op \d+ \({change.kind.__name__}\): .*"
    with pytest.raises(ProtocolError, match=where + change.complaint) as caught:
        check_program(change(program))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def largest_program(tiny):
    """A worker's, with experts, latent attention and an indexer."""
    return tiny(arch=Arch.GLM_MOE_DSA, weights=Q40).programs(3, sync=Q80)[1]


BAD_LATER_OPS = [
    Change(LayerNorm, {"target": "index_q"}, "differ in width"),
    Change(LayerNorm, {"epsilon": math.nan}, "epsilon"),
    Change(LayerNorm, {"bias": part(cols=(0, 31))}, "1 x 31"),
    Change(Concat, {"heads": 7}, "heads are not whole"),
    Change(Concat, {"second": "last"}, "widths differ"),
    Change(Store, {"source": "index_k"}, "does not fill"),
    Change(Attention, {"value_cache": "i.0"}, "caches differ"),
    Change(Attention, {"target": "q_a"}, "not as wide as values"),
    Change(Attention, {"selection": "route"}, "not seq_len wide"),
    Change(Select, {"query": "index_k"}, "heads and weights differ"),
    Change(Select, {"head_weights": "y"}, "heads and weights differ"),
    Change(Select, {"head_weights": "x"}, "must be a buffer"),
    Change(Select, {"target": "y"}, "not seq_len wide"),
    Change(Select, {"cache": "kv.0"}, "heads and weights differ"),
    Change(Select, {"scale": math.inf}, "scale"),
    Change(Route, {"target": "y"}, "differ in width"),
    Change(Route, {"active": 4}, "another number of experts"),
    Change(Route, {"groups": 3}, "groups are not whole"),
    Change(Route, {"groups": 8}, "more experts than there are"),
    Change(Route, {"active_groups": 5}, "more groups than there are"),
    Change(Route, {"active_groups": 1}, "more experts than there are"),
    Change(Route, {"scale": math.nan}, "scale"),
    Change(Route, {"bias": part(cols=(0, 7))}, "1 x 7"),
    Change(Dispatch, {"source": "q"}, "widths differ"),
    Change(Dispatch, {"target": "y"}, "no rows for experts"),
    Change(Dispatch, {"route": "scores"}, "not what a route before"),
    Change(ExpertMatmul, {"source": "y_q80"}, "no rows for experts"),
    Change(ExpertMatmul, {"target": "gate"}, "no rows for experts"),
    Change(ExpertMatmul, {"target": "expert_y"}, "gate_proj.weight is"),
    Change(ExpertMatmul, {"weight": part(count=9)}, "another number of experts"),
    Change(ExpertMatmul, {"weight": part(tensor="same")}, "in its name"),
    Change(ExpertMatmul, {"weight": part(cols=(0, 32))}, "x 32"),
    Change(ExpertMatmul, {"route": "scores"}, "not what a route before"),
    Change(Combine, {"source": "y"}, "no rows for experts"),
    Change(Combine, {"target": "expert_y"}, "no batch rows"),
    Change(Combine, {"route": "scores"}, "not what a route before"),
    Change(Matmul, {"heads": 5}, "heads are not whole"),
    Change(Quantize, {"heads": 3}, "whole blocks"),
]


@pytest.mark.parametrize(
    "change", BAD_LATER_OPS, ids=lambda c: f"{c.kind.__name__}-{next(iter(c.fields))}-{c.complaint}"
)
def test_an_op_of_a_later_model_that_does_not_fit_is_refused(largest_program, change):
    where = rf"segment .+, op \d+ \({change.kind.__name__}\): .*"
    with pytest.raises(ProtocolError, match=where + change.complaint):
        check_program(change(largest_program))


def test_rows_for_experts_need_a_choice(largest_program):
    """Quantizing them follows the plan that a route leaves."""
    segments = tuple(
        replace(segment, ops=tuple(op for op in segment.ops if not isinstance(op, Route)))
        for segment in largest_program.segments
    )
    with pytest.raises(ProtocolError, match="route"):
        check_program(replace(largest_program, segments=segments))


def with_memory(kind, **fields):
    """Changes the first pipe, buffer or cache."""

    def change(program: Program) -> Program:
        first, *rest = getattr(program, kind)
        return replace(program, **{kind: (replace(first, **fields), *rest)})

    return change


def with_sync(**fields):
    def change(program: Program) -> Program:
        first, *rest = program.segments
        return replace(program, segments=(replace(first, syncs=(Sync(**fields),)), *rest))

    return change


MANY_EXPERTS = ExpertMatmul(
    "y", "route", "y", ExpertWeight("experts.{}.weight", 4096, F32, (0, 0), (0, 0))
)
BAD_PROGRAMS = {
    "node 3 of 3 nodes": lambda p: replace(p, node=3),
    "node 1 of 257 nodes": lambda p: replace(p, n_nodes=257),
    "pipe partials has 3 regions": lambda p: replace(p, n_nodes=4),
    "segments, at most": lambda p: replace(p, segments=(Segment("idle"),) * 4097),
    "more than 65536 ops": lambda p: replace(
        p, segments=(Segment("long", (Add("y", "y"),) * 65537),)
    ),
    "heads of 65568, at most": with_memory("caches", head_dim=65568),
    "65537 rows, at most": lambda p: replace(p, max_rows=65537),
    "more than 1048576 weights": lambda p: replace(
        p, segments=(Segment("many", (MANY_EXPERTS,) * 257),)
    ),
    "pipe extra has rows for experts": lambda p: replace(
        p, pipes=(*p.pipes, Pipe("extra", F32, (32,), rows="experts"))
    ),
    "same name": lambda p: replace(p, buffers=(*p.buffers, p.buffers[0])),
    "have the same name": lambda p: replace(p, caches=(Cache("y", F32, 1, 1), *p.caches)),
    "pipe x has 2 regions": with_memory("pipes", widths=(64, 64)),
    "pipe x has 0 regions": with_memory("pipes", widths=()),
    "x is F16": with_memory("pipes", float_type=F16),
    "y is Q40": with_memory("buffers", float_type=Q40),
    "k.0 is Q40; caches are F32, F16, Q80": with_memory("caches", float_type=Q40),
    "k.0 is not whole blocks of 32": with_memory("caches", float_type=Q80, head_dim=16),
    "spare is not whole blocks": lambda p: replace(
        p, buffers=(*p.buffers, Buffer("spare", Q80, 33))
    ),
    "extra is not whole blocks": lambda p: replace(p, pipes=(*p.pipes, Pipe("extra", Q80, (31,)))),
    "syncs y, which is no pipe": with_sync(pipe="y", kind=SyncKind.WITH_ROOT),
    "x has no region for each": with_sync(pipe="x", kind=SyncKind.NODE_SLICES_EXCEPT_ROOT),
}


@pytest.mark.parametrize("complaint", BAD_PROGRAMS)
def test_a_program_that_does_not_add_up_is_refused(program, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        check_program(BAD_PROGRAMS[complaint](program))


@pytest.mark.parametrize(
    "other",
    [
        lambda c: replace(c, kv_heads=c.kv_heads * 2, head_dim=c.head_dim // 2),
        lambda c: replace(c, float_type=F16),
    ],
    ids=["shape", "float type"],
)
def test_caches_that_differ_are_refused(program, other):
    caches = tuple(other(c) if c.name == "v.0" else c for c in program.caches)
    with pytest.raises(ProtocolError, match=r"\(Attention\): caches differ"):
        check_program(replace(program, caches=caches))


BAD_SUMS = {
    "y, which is no pipe": AllReduce("y", "sum"),
    "pipe x has no region for each node": AllReduce("x", "sum"),
    "AllReduce: regions and target differ in width": AllReduce("logits", "sum"),
    "AllReduce: nowhere does not exist": AllReduce("partials", "nowhere"),
    "AllReduce: the target must be a buffer": AllReduce("partials", "x"),
    "AllReduce: y_q80 is not float32": AllReduce("partials", "y_q80"),
    "AllReduce: regions and target differ": AllReduce("partials", "q"),
    "AllReduce: partials, last: other rows": AllReduce("partials", "last"),
}


@pytest.mark.parametrize("complaint", BAD_SUMS)
def test_a_sum_that_does_not_add_up_is_refused(program, complaint):
    first, *rest = program.segments
    changed = replace(first, syncs=(BAD_SUMS[complaint],))
    with pytest.raises(ProtocolError, match=complaint):
        check_program(replace(program, segments=(changed, *rest)))


def test_a_sum_that_no_segment_takes_is_refused(program):
    last = replace(program.segments[-1], syncs=(AllReduce("partials", "sum"),))
    with pytest.raises(ProtocolError, match="no segment takes the sum"):
        check_program(replace(program, segments=(*program.segments[:-1], last)))


# Programs as they may come over the wire: any value of a field replaced by another of its type.


def leaves(value, path=()):
    """The paths to all values that are no containers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "type":
                yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path


def put(value, path, new):
    first, *rest = path
    copy = value.copy()
    copy[first] = put(value[first], rest, new) if rest else new
    return copy


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_is_accepted_runs(program, data):
    """One field of a good program changed: refused, or harmless."""
    plain = msgspec.to_builtins(program)
    path = data.draw(st.sampled_from(list(leaves(plain))))
    names = sorted({memory["name"] for kind in ("pipes", "buffers", "caches")
                    for memory in plain[kind]})  # fmt: skip
    small = st.integers(0, 130)
    plain = put(plain, path, data.draw(st.sampled_from(names) | small | st.just(1e-3)))
    try:
        changed = msgspec.convert(plain, Program)
        check_program(changed)
    except (msgspec.ValidationError, ProtocolError):
        return
    for weight in weights(changed):
        assert weight.nbytes >= 0
    with Interpreter(changed) as executor:
        rows = min(changed.max_rows, changed.seq_len, 3)
        logits = tuple(range(min(rows, changed.max_logits)))
        table = ((changed.n_seqs - 1, 0, changed.n_blocks - 1),)
        batch = Batch((changed.n_seqs - 1,) * rows, tuple(range(rows)), logits, table)
        check_batch(changed, batch, executor.memory.table)
        executor.begin(batch)
        with np.errstate(all="ignore"):
            for segment in range(len(changed.segments)):
                executor.run(segment)


# --- batches


NO_BLOCKS = -np.ones((3, 3), np.int64)
OWN_BLOCKS = np.arange(9).reshape(3, 3)
LONG = KV_BLOCK + 5  # a position in the second block of a sequence
# With the table before them: three sequences of three blocks.
GOOD_BATCHES = [
    (OWN_BLOCKS, Batch((0,), (0,), ())),
    (OWN_BLOCKS, Batch((1,), (3 * KV_BLOCK - 1,), (0,))),
    (OWN_BLOCKS, Batch((0,) * 8, tuple(range(8)), tuple(range(8)))),
    (OWN_BLOCKS, Batch((0, 1, 0, 1), (31, 31, 0, 0), (3, 0))),
    (OWN_BLOCKS, Batch((0, 0), (0, 1), (1,) * 8)),
    (OWN_BLOCKS, Batch((0,), (0,), (), copies=((0, 8), (8, 0)))),
    (NO_BLOCKS, Batch((2,), (5,), (), table=((2, 0, 8),))),
    (NO_BLOCKS, Batch((2,), (LONG,), (), table=((2, 1, 8), (2, 0, 0), (0, 2, 3)))),
    # The beginning is shared; each writes to a block of its own.
    (
        NO_BLOCKS,
        Batch((0, 2), (LONG, LONG), (), table=((0, 0, 4), (2, 0, 4), (0, 1, 1), (2, 1, 2))),
    ),
    (np.zeros((3, 3), np.int64), Batch((0, 1), (5, 6), ())),
]
BAD_BATCHES = {
    "batch of 0 sequences": (OWN_BLOCKS, Batch((), (), ())),
    "batch of 9 sequences": (OWN_BLOCKS, Batch((0,) * 9, tuple(range(9)), ())),
    "2 sequences and 1 positions": (OWN_BLOCKS, Batch((0, 0), (0,), ())),
    "1 sequences and 2 positions": (OWN_BLOCKS, Batch((0,), (0, 1), ())),
    "sequence 3 of 3": (OWN_BLOCKS, Batch((0, 3), (0, 0), ())),
    f"position {3 * KV_BLOCK} of": (OWN_BLOCKS, Batch((0, 0), (0, 3 * KV_BLOCK), ())),
    "kept in the same place": (OWN_BLOCKS, Batch((0, 1, 0), (5, 5, 5), ())),
    "kept in the same p.": (OWN_BLOCKS, Batch((0, 1), (5, 5), (), table=((1, 0, 0),))),
    "logits of 1 rows wanted": (OWN_BLOCKS, Batch((0, 0), (0, 1), (2,))),
    "logits of 9 rows wanted": (OWN_BLOCKS, Batch((0, 0), (0, 1), (0,) * 9)),
    "sequence 1 has no block for positions from 0, and a row at 7": (
        NO_BLOCKS, Batch((1,), (7,), (), table=((0, 0, 1), (1, 1, 2)))
    ),
    f"sequence 1 has no block for positions from {KV_BLOCK}, and a row at {LONG}": (
        NO_BLOCKS, Batch((1, 1), (7, LONG), (), table=((1, 0, 2),))
    ),
    "block 9 of 9 for sequence 0": (OWN_BLOCKS, Batch((0,), (0,), (), table=((0, 0, 9),))),
    "for sequence 3 of 3": (OWN_BLOCKS, Batch((0,), (0,), (), table=((3, 0, 0),))),
    "place 3 of 3": (OWN_BLOCKS, Batch((0,), (0,), (), table=((0, 3, 0),))),
    "block 9 to 0 of 9": (OWN_BLOCKS, Batch((0,), (0,), (), copies=((9, 0),))),
    "block 0 to 9 of 9": (OWN_BLOCKS, Batch((0,), (0,), (), copies=((0, 0), (0, 9)))),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_blocks(tiny):
    """Three sequences of three blocks."""
    return tiny(max_seq_len=512).programs(n_seqs=3, seq_len=3 * KV_BLOCK)[0]


@pytest.mark.parametrize(("table", "batch"), GOOD_BATCHES)
def test_batches_within_bounds_are_accepted(with_blocks, table, batch):
    before = table.copy()
    check_batch(with_blocks, batch, table)
    np.testing.assert_array_equal(table, before)


@pytest.mark.parametrize("complaint", BAD_BATCHES)
def test_batches_out_of_bounds_are_refused(with_blocks, complaint):
    table, batch = BAD_BATCHES[complaint]
    with pytest.raises(ProtocolError, match=complaint):
        check_batch(with_blocks, batch, table)


@pytest.mark.parametrize("field", ["table", "copies"])
@pytest.mark.parametrize("value", [-1, (1 << 24) + 1, 0.5, None, "0"])
def test_the_types_of_a_batch_bound_its_blocks(field, value):
    size = {"table": 3, "copies": 2}[field]
    fields = {"seqs": [0], "positions": [0], "logits": [0]}
    assert msgspec.convert(fields | {field: [[0] * size]}, Batch)
    for wrong in ([value] + [0] * (size - 1), [0] * (size - 1), [0] * (size + 1)):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields | {field: [wrong]}, Batch)


@pytest.mark.parametrize("field", ["seqs", "positions", "logits"])
@pytest.mark.parametrize("value", [-1, (1 << 24) + 1, 0.5, None])
def test_the_types_of_a_batch_bound_its_values(field, value):
    fields = {"seqs": [0], "positions": [0], "logits": [0]} | {field: [value]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, Batch)

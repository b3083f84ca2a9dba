"""Schedules of all-reduces: consistent between nodes, as cheap as they say, and the same sums."""

import threading
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama_dist.config import FloatType
from pyllama_dist.executor import make_executor
from pyllama_dist.net.collectives import (
    ALGORITHMS,
    AUTO,
    Cost,
    direct,
    recursive_doubling,
    reduce_scatter,
    star,
)
from pyllama_dist.net.collectives.choose import choose
from pyllama_dist.net.collectives.schedule import Reduce, Round, reads_reduced
from pyllama_dist.net.frames import MAX_DATA
from pyllama_dist.net.inproc import Hub
from pyllama_dist.node import Node
from pyllama_dist.program import REDUCED, AllReduce, Batch, Buffer, Pipe, Program, Segment
from pyllama_dist.simulate import simulated_root
from pyllama_dist.validate import check_program
from pyllama_kernels.blocks import dequantize_q80, quantize_q80
from tests.tiers import slow_but

pytestmark = pytest.mark.timeout(120)

COSTS = {
    "direct": direct.cost,
    "reduce-scatter": reduce_scatter.cost,
    "star": star.cost,
    "recursive-doubling": recursive_doubling.cost,
}
n_nodes_and_rows = {"n_nodes": st.integers(2, 13), "rows": st.integers(1, 30)}


def schedules(name: str, n_nodes: int, rows: int) -> list[tuple[Round | Reduce, ...]]:
    return [tuple(ALGORITHMS[name](node, n_nodes, rows)) for node in range(n_nodes)]


def simulate(plans: list[tuple[Round | Reduce, ...]], rows: int) -> list[Mapping[int, list[str]]]:
    """What each node's regions hold at the end: of each row, whose sum it is, as text."""
    n = len(plans)
    held = [{node: [str(node)] * rows, REDUCED: [""] * rows} for node in range(n)]
    for node in range(n):
        held[node] |= {other: [""] * rows for other in range(n) if other != node}
    for actions in zip(*(steps(plan) for plan in plans), strict=True):
        for node, (exchange, _) in enumerate(actions):
            for to, message in exchange.sends.items():
                assert actions[to][0].receives[node] == message
                assert any(part.first < part.last for part in message)
        moved = [
            (node, part, held[source][part.region][part.first : part.last])
            for node, (exchange, _) in enumerate(actions)
            for source, message in exchange.receives.items()
            for part in message
            if actions[source][0].sends[node] == message
        ]
        for node, part, texts in moved:
            held[node][part.region][part.first : part.last] = texts
        for node, (_, sums) in enumerate(actions):
            for action in sums:
                for row in range(action.first, action.last):
                    parts = [held[node][region][row] for region in range(n)]
                    held[node][REDUCED][row] = " ".join(parts)
    return held


def steps(plan: tuple[Round | Reduce, ...]) -> list[tuple[Round, list[Reduce]]]:
    """Each round, and what is summed after it."""
    found: list[tuple[Round, list[Reduce]]] = []
    for action in plan:
        if isinstance(action, Round):
            found.append((action, []))
        else:
            found[-1][1].append(action)
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
@given(**n_nodes_and_rows)
def test_every_node_ends_with_all_that_the_sum_needs(name, n_nodes, rows):
    plans = schedules(name, n_nodes, rows)
    reduced = {reads_reduced(plan) for plan in plans}
    assert len(reduced) == 1
    everything = " ".join(map(str, range(n_nodes)))
    for held in simulate(plans, rows):
        if reduced == {True}:
            assert held[REDUCED] == [everything] * rows
        else:
            assert all(held[node] == [str(node)] * rows for node in range(n_nodes))


@pytest.mark.parametrize("name", ALGORITHMS)
@given(**n_nodes_and_rows)
def test_an_algorithm_costs_what_its_formula_says(name, n_nodes, rows):
    for node, schedule in enumerate(schedules(name, n_nodes, rows)):
        assert Cost.of(schedule) == COSTS[name](node, n_nodes, rows)


def test_the_formulas_for_four_nodes():
    """Worked out by hand: rows that the busiest node sends, of 512, and messages of all nodes."""
    rows_sent = {name: cost(0, 4, 512).rows_sent for name, cost in COSTS.items()}
    assert rows_sent == {
        "direct": 1536, "reduce-scatter": 768, "star": 1536, "recursive-doubling": 1536
    }  # fmt: skip
    messages = {n: sum(c(i, 4, 512).messages_sent for i in range(4)) for n, c in COSTS.items()}
    assert messages == {"direct": 12, "reduce-scatter": 24, "star": 6, "recursive-doubling": 8}


# --- what is chosen


def test_auto_takes_what_suits_sizes_and_nodes():
    assert choose(AUTO, 4, 1, 4352, True) == "direct"
    assert choose(AUTO, 4, 256, 16384, True) == "reduce-scatter"
    assert choose(AUTO, 2, 256, 16384, True) == "direct"  # nothing to gain
    assert choose(AUTO, 64, 1, 4096, True) == "recursive-doubling"


@given(**n_nodes_and_rows, row_bytes=st.integers(34, 1 << 15))
def test_auto_never_rounds_twice(n_nodes, rows, row_bytes):
    """Or a row's result would depend on who else is in its batch."""
    name = choose(AUTO, n_nodes, rows, row_bytes, False)
    assert not any(map(reads_reduced, schedules(name, n_nodes, rows)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_asked_for_is_taken_unless_a_message_is_too_large(name):
    assert choose(name, 8, 3, 100, False) == name
    rows = MAX_DATA // 3 // 1000
    expected = "direct" if name == "recursive-doubling" else name
    assert choose(name, 8, rows, 1000, True) == expected


# --- sums of real nodes


def logits(tiny, n_nodes, sync, collective, runs, n_threads=1, **changes):
    model = tiny(**changes)
    programs = model.programs(n_nodes, sync=sync)
    with simulated_root(model, programs, n_threads, collective=collective) as root:
        found = []
        for start, tokens in runs:
            n = len(tokens)
            batch = Batch((0,) * n, tuple(range(start, start + n)), tuple(range(n)))
            found.append(root.step(tokens, batch).copy())
        return np.concatenate(found)


RUNS = [(0, (3, 1, 4, 1, 5, 9, 2)), (7, (6,)), (8, (5, 3))]  # fewer rows than nodes, and more


@pytest.mark.parametrize("collective", [*list(ALGORITHMS)[1:], AUTO])
@pytest.mark.parametrize("n_nodes", slow_but([3, 4], [2, 3, 4, 7]))
def test_f32_sums_have_the_same_bits_however_they_travel(tiny, n_nodes, collective):
    expected = logits(tiny, n_nodes, FloatType.F32, "direct", RUNS)
    found = logits(tiny, n_nodes, FloatType.F32, collective, RUNS, n_threads=2)
    assert (found == expected).all()


@pytest.mark.parametrize("n_nodes", [3, 4])
def test_q80_sums_that_are_rounded_once_have_the_same_bits(tiny, n_nodes):
    how = {"weights": FloatType.Q40}
    expected = logits(tiny, n_nodes, FloatType.Q80, "direct", RUNS, **how)
    for collective in ("recursive-doubling", AUTO):
        assert (logits(tiny, n_nodes, FloatType.Q80, collective, RUNS, **how) == expected).all()


def test_q80_sums_that_are_rounded_twice_have_the_same_bits_whatever_the_batch(tiny):
    how = {"weights": FloatType.Q40}
    expected = logits(tiny, 3, FloatType.Q80, "star", RUNS, **how)
    assert (logits(tiny, 3, FloatType.Q80, "reduce-scatter", RUNS, **how) == expected).all()
    once = logits(tiny, 3, FloatType.Q80, "direct", RUNS, **how)
    assert (once != expected).any()
    assert np.abs(once - expected).max() < 0.1 * np.abs(once).max()


WIDTH = 96


def program(node: int, n_nodes: int, float_type: FloatType) -> Program:
    """Nothing but a sum."""
    return Program(
        n_nodes=n_nodes,
        node=node,
        max_rows=16,
        max_logits=1,
        n_experts=0,
        n_active_experts=0,
        n_seqs=1,
        n_blocks=1,
        seq_len=16,
        pipes=(Pipe("partials", float_type, (WIDTH,) * n_nodes),),
        buffers=(Buffer("sum", FloatType.F32, WIDTH),),
        caches=(),
        segments=(Segment("send", (), (AllReduce("partials", "sum"),)), Segment("take")),
    )


def summed(float_type: FloatType, collective: str, parts: np.ndarray) -> np.ndarray:
    """What nodes make of their parts, [nodes, rows, width] float32: each node's sums, likewise."""
    n_nodes, rows, _ = parts.shape
    hub = Hub()
    meshes = [hub.mesh() for _ in range(n_nodes)]
    endpoints = [mesh.bind(range(node)) for node, mesh in enumerate(meshes)]
    for node, mesh in enumerate(meshes):
        mesh.connect({i: ("", endpoints[i][node]) for i in range(node + 1, n_nodes)})
    found = np.empty_like(parts)

    def work(node: int) -> None:
        mesh = meshes[node]
        mesh.greet(bytes(16), node, [str(i) for i in range(n_nodes)], 10)
        spec = program(node, n_nodes, float_type)
        check_program(spec)
        with make_executor(spec, 2) as executor:
            own = executor.memory.pipes["partials"].payload(node, rows)
            q80 = float_type is FloatType.Q80
            own[:] = quantize_q80(parts[node]) if q80 else parts[node].view(np.uint8)
            batch = Batch((0,) * rows, tuple(range(rows)), ())
            Node(spec, executor, mesh, 10.0, collective).step(1, batch)
            found[node] = executor.memory.buffers["sum"][:rows]

    threads = [threading.Thread(target=work, args=(node,)) for node in range(n_nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def sequential_sum(parts: np.ndarray) -> np.ndarray:
    """Node after node, in float32."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("collective", ALGORITHMS)
def test_f32_sums_are_those_of_the_formula_on_all_nodes(collective, rows):
    parts = np.random.default_rng(rows).standard_normal((3, rows, WIDTH), np.float32)
    expected = sequential_sum(parts)
    assert (summed(FloatType.F32, collective, parts) == expected).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("collective", ALGORITHMS)
def test_q80_sums_are_those_of_the_formula_on_all_nodes(collective, rows):
    parts = np.random.default_rng(rows).standard_normal((3, rows, WIDTH), np.float32)
    once = sequential_sum(dequantize_q80(quantize_q80(parts)))
    twice = dequantize_q80(quantize_q80(once))
    rounded_twice = collective in ("reduce-scatter", "star")
    found = summed(FloatType.Q80, collective, parts)
    assert (found == (twice if rounded_twice else once)).all()
    # Half a step of 127 to the block's largest value, and what a scale of 11 bits adds.
    largest = np.abs(once).reshape(-1, 32).max(axis=1, keepdims=True)
    error = np.abs(twice - once).reshape(-1, 32)
    assert (error <= largest * (0.5 / 127 + 2.0**-11)).all()

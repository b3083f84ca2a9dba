"""The comparison of layouts: what is measured in which order, and what it comes to."""

import importlib
import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from pyllama_dist.bench.measure import Test as Trial  # pytest takes Test for tests of its own
from pyllama_dist.config import FloatType
from pyllama_dist.errors import NodeError, UsageError
from pyllama_kernels.bandwidth import MemoryReader

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def measurer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("measurer")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    return module


@pytest.fixture
def nodes(measurer):
    return importlib.import_module("compare_nodes")


ECHO = """
import json, sys
for line in sys.stdin:
    order = json.loads(line)
    if "die" in order:
        sys.exit(3)
    if "spin" in order:
        sum(range(order["spin"]))
    print(json.dumps({"error": "no"} if "fail" in order else {"heard": order}), flush=True)
"""


def test_a_measurer_answers_until_it_ends(measurer):
    with measurer.running("echo", [sys.executable, "-c", ECHO]) as echo:
        assert echo.ask(load={"shape": "x"}) == {"heard": {"load": {"shape": "x"}}}
        with pytest.raises(NodeError, match="echo: no"):
            echo.ask(fail=1)
        with pytest.raises(NodeError, match=r"echo ended with 3: see .*compare-echo\.log"):
            echo.ask(die=1)
    assert not psutil.pid_exists(echo.pid)


WORKER = """
import orders

def halve(n):
    if n % 2:
        raise ValueError(f"{n} is odd")
    print("no answer")
    return {"half": n // 2}

orders.serve({"halve": halve}, ValueError)
"""


def test_orders_are_answered_and_what_they_raise_too(measurer):
    command = [sys.executable, "-c", WORKER]
    with measurer.running("worker", command, PYTHONPATH=str(BENCH)) as worker:
        assert worker.ask(halve={"n": 6}) == {"half": 3}
        with pytest.raises(NodeError, match="worker: 7 is odd"):
            worker.ask(halve={"n": 7})
        assert worker.ask(halve={"n": 8}) == {"half": 4}


def test_our_process_keeps_what_is_loaded_between_orders(nodes, tiny, monkeypatch):
    worker, readers = importlib.import_module("pyllama_worker"), []

    def make_reader(n_threads):
        readers.append(MemoryReader(n_threads, 1 << 20))
        return readers[-1]

    monkeypatch.setattr(worker, "config_of", lambda shape: tiny(weights=FloatType.Q40).config)
    monkeypatch.setattr(worker.machine, "memory_reader", make_reader)
    server = worker.Server()
    with pytest.raises(UsageError, match="nothing is loaded"):
        server.run(p=4)
    loaded = server.load("tiny", threads=1, seq_len=32)
    assert (loaded["model"], loaded["threads"], loaded["seq_len"]) == ("tiny", 1, 32)
    pp, tg = server.run(p=8), server.run(n=4, d=16)
    assert pp["tokens_per_second"] == pytest.approx(8 / pp["seconds"])
    assert tg["tokens_per_second"] == pytest.approx(4 / tg["seconds"])
    with pytest.raises(UsageError, match="one of them says how many tokens"):
        server.run(p=8, n=8)
    assert server.bandwidth(1)["gb_per_second"] > 0 < server.bandwidth(1)["gb_per_second"]
    server.unload()
    with pytest.raises(UsageError, match="nothing is loaded"):
        server.run(p=8)
    (reader,) = readers  # its memory did not go in between
    assert not hasattr(reader, "_buffer")  # and went with the model


def test_what_is_measured_and_its_children_are_no_others(measurer, monkeypatch):
    seconds = {"own": 10.0, "child": 20.0, "all": 100.0}

    class Process:
        def __init__(self, name):
            self.name = name

        def children(self, recursive):
            return [Process("child")] if self.name == "own" else []

        def cpu_times(self):
            used = seconds[self.name]
            return used, 0.0, used, 0.0, 0.0  # of children that ended: not counted

    class Times(tuple):
        idle = iowait = 0.0

    clock = iter([5.0, 7.0])
    monkeypatch.setattr(measurer.psutil, "Process", Process)
    monkeypatch.setattr(measurer.psutil, "cpu_times", lambda: Times((seconds["all"],)))
    monkeypatch.setattr(measurer.time, "perf_counter", lambda: next(clock))
    others = measurer.Others(["own"])
    seconds.update(own=12.0, child=21.0, all=104.0)
    assert others.cores() == 0.5  # of 4 seconds of CPU in 2 seconds, 3 were its own


def test_busy_processes_end_with_the_context(nodes):
    with nodes.busy(2) as pids:
        processes = [psutil.Process(pid) for pid in pids]
        deadline = time.monotonic() + 20
        while not all(process.cpu_times().user > 0.05 for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(set(pids)) == 2
    assert not any(process.is_running() for process in processes)


@pytest.mark.parametrize("text", ["2", "x1", "0x1", "2x0", "2x1x1", "ax1", ""])
def test_what_is_no_layout_is_refused(nodes, text):
    with pytest.raises(UsageError, match="is no layout: write NODESxTHREADS"):
        nodes.ClusterShape.parse(text)


def test_a_round_has_prompts_at_the_start_and_answers_at_each_depth(nodes):
    words = "--layouts 1x2,2x1 -p 8,16 -n 4 --depth 0,32 --busy 3"
    args = nodes.parse(words.split())
    names = [case.name for case in nodes.plan_cases(args)]
    tests = ["pp8", "pp16", "tg4", "tg4 @ d32"]
    assert names == [
        f"{layout}, {test}{beside}"
        for layout in ("1x2", "2x1")
        for test in tests
        for beside in ("", ", 3 busy beside")
    ]
    assert len(nodes.plan_cases(nodes.parse(["-p", "0"]))) == 4  # layouts; nothing twice


def test_a_layout_needs_what_its_nodes_need(nodes):
    one, two = nodes.ClusterShape(1, 2), nodes.ClusterShape(2, 1)
    weights = 827_965_440  # bytes of the matrices of glm-edge-1.5b
    assert weights < one.planned_bytes("glm-edge-1.5b", 128) < 1.2 * weights
    assert weights < two.planned_bytes("glm-edge-1.5b", 128) < 1.3 * weights


class FakeServer:
    """Notes what it is asked; each run is one token per second faster."""

    pid = 0

    def __init__(self, name, notes, rate):
        self.name, self.notes, self.rate = name, notes, rate

    def load(self):
        self.notes.append(f"{self.name} load")

    def unload(self):
        self.notes.append(f"{self.name} unload")

    def warm_up(self, test):
        self.notes.append(f"{self.name} warm {test.name}")

    def run(self, test):
        self.notes.append(f"{self.name} {test.name}")
        self.rate += 1
        return self.rate * test.tokens


@pytest.fixture
def measured(nodes, monkeypatch):
    """Measures with servers that are not there: their notes, and what was found last."""
    monkeypatch.setattr(
        nodes, "Others", lambda pids: type("Fake", (), {"cores": lambda self: len(pids) / 8})()
    )

    def run(args, stays=True):
        parsed, notes = nodes.parse(args.split()), []
        servers = {
            layout: FakeServer(str(layout), notes, 10 * (i + 1))
            for i, layout in enumerate(parsed.layouts)
        }
        *_, last = nodes.measure(parsed, servers, stays, lambda what: None)
        return notes, last

    return run


def test_every_second_round_goes_the_other_way_round(measured):
    notes, last = measured("--layouts 1x2,2x1 -p 8 -n 4 -r 3")
    forth = ["1x2 pp8", "1x2 tg4", "2x1 pp8", "2x1 tg4"]
    assert [note for note in notes if "warm" not in note] == [*forth, *reversed(forth), *forth]
    assert sorted(notes[:4]) == ["1x2 warm pp8", "1x2 warm tg4", "2x1 warm pp8", "2x1 warm tg4"]
    assert len(last["load"]) == 4
    assert all(len(result["tokens_per_second"]) == 3 for result in last["results"])
    json.dumps(last)


def test_ratios_are_those_of_the_same_round(measured):
    _, last = measured("--layouts 1x2,2x1 -p 0 -n 1 --depth 0,9 --busy 1 -r 1")
    told = {
        (result["nodes"], result["d"], result["busy"]): (
            result["median"],
            *(ratio and ratio["median"] for ratio in result["ratio_to"].values()),
            result["others_cores"],
        )
        for result in last["results"]
    }
    # Rates count from 11 for 1x2 and from 21 for 2x1; others are 1/8 for each process.
    assert told == {
        (1, 0, 0): (11, None, None, None, [0.125]),
        (1, 0, 1): (12, None, None, 12 / 11, [0.25]),
        (1, 9, 0): (13, None, 13 / 11, None, [0.125]),
        (1, 9, 1): (14, None, 14 / 12, 14 / 13, [0.25]),
        (2, 0, 0): (21, 21 / 11, None, None, [0.125]),
        (2, 0, 1): (22, 22 / 12, None, 22 / 21, [0.25]),
        (2, 9, 0): (23, 23 / 13, 23 / 21, None, [0.125]),
        (2, 9, 1): (24, 24 / 14, 24 / 22, 24 / 23, [0.25]),
    }


def test_what_does_not_fit_together_is_loaded_for_its_turn(measured):
    notes, _ = measured("--layouts 1x1,2x1 -p 0 -n 1 --depth 9 -r 1", stays=False)
    steps = ("load", "warm tg1 @ d9", "tg1 @ d9", "unload")
    assert notes == [f"{layout} {step}" for layout in ("1x1", "2x1") for step in steps]


def test_the_table_leaves_out_what_would_be_compared_with_itself(nodes, measured):
    _, last = measured("--layouts 1x2,2x1 -p 0 -n 1 -r 1")
    machine = {"cpu": "A CPU"}
    shown = nodes.table({"shape": "s", "kernels": "k", "machine": machine} | last)
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["1x2", "2x1"]
    assert cells[3] == ["11.00", "21.00"]
    assert cells[4] == ["", "1.91 (1.91–1.91)"]
    assert cells[5] == cells[6] == ["", ""]


def test_a_server_is_asked_as_serve_understands_it(nodes):
    asked = []

    class FakeMeasurer:
        pid = 1

        def ask(self, **order):
            asked.append(order)
            return {"tokens_per_second": 5}

    server = nodes.Server(FakeMeasurer(), nodes.ClusterShape(2, 1), "tiny", 64)
    server.load()
    assert server.run(Trial("pp", 8)) == 5
    server.warm_up(Trial("tg", 4, 32))
    server.unload()
    assert asked == [
        {"load": {"shape": "tiny", "nodes": 2, "threads": 1, "seq_len": 64}},
        {"run": {"p": 8, "n": 0, "d": 0}},
        {"run": {"p": 0, "n": 1, "d": 32}},
        {"unload": {}},
    ]

"""Compares ways to cut a model over nodes of this machine: same weights, same minutes.

    python bench/compare_nodes.py --layouts 1x2,2x1,4x1 --depth 0,4096 -p 512,4096 --busy 1

A layout is NODESxTHREADS. Every layout is a cluster of its own, with random weights; all stay up,
and sleep while another one is measured. If they do not fit into memory together, each is loaded for
its turn. A round measures everything once, every second round the other way round, so what slows
the machine down meets all; ratios are taken in each round, and then the median. With --busy each
measurement is made alone and beside processes that do nothing but compute. Linux only.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from measurer import Answer, Measurer, Others, Starting, result_file, running
from rich import box
from rich.console import Console
from rich.table import Table

from pyllama_dist.bench import machine
from pyllama_dist.bench.measure import Test, check_fits, plan_tests
from pyllama_dist.bench.shapes import config_of
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.errors import PyllamaError, UsageError
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.memory_use import memory_here

# It ends with the process that started it, however that ends.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100000))"
_SPARE = 0.9  # of the available memory may be planned: processes need more than their weights
_TABLE_WIDTH = 120


@dataclass(frozen=True)
class ClusterShape:
    """A cluster on this machine."""

    nodes: int
    threads: int  # of each node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.threads}"

    @classmethod
    def parse(cls, text: str) -> "ClusterShape":
        """Reads `2x1`.

        Raises:
            UsageError: it is no layout.
        """
        nodes, _, threads = text.partition("x")
        if not (nodes.isdecimal() and threads.isdecimal() and int(nodes) and int(threads)):
            raise UsageError(f"{text!r} is no layout: write NODESxTHREADS, as in 2x1")
        return cls(int(nodes), int(threads))

    def planned_bytes(self, shape: str, seq_len: int) -> int:
        """Memory that all its nodes need."""
        cluster = Cluster(local_workers=self.nodes - 1, max_seq_len=seq_len)
        return sum(map(planned_bytes, programs(config_of(shape), cluster)))


@dataclass(frozen=True)
class Case:
    """What is measured once in each round."""

    layout: ClusterShape
    test: Test
    busy: int  # processes beside it that compute

    @property
    def name(self) -> str:
        beside = f", {self.busy} busy beside" if self.busy else ""
        return f"{self.layout}, {self.test.name}{beside}"


class Server:
    """A layout's process: `pyllama_worker.py`."""

    def __init__(self, measurer: Measurer, layout: ClusterShape, shape: str, seq_len: int) -> None:
        self._measurer, self._shape, self._seq_len = measurer, shape, seq_len
        self._layout = layout
        self.pid = measurer.pid

    def load(self) -> Answer:
        """Brings the cluster up; says what it is."""
        return self._measurer.ask(
            load={
                "shape": self._shape,
                "nodes": self._layout.nodes,
                "threads": self._layout.threads,
                "seq_len": self._seq_len,
            }
        )

    def unload(self) -> None:
        self._measurer.ask(unload={})

    def run(self, test: Test) -> float:
        """Tokens per second of one run."""
        sizes = {"p": test.tokens, "n": 0} if test.kind == "pp" else {"p": 0, "n": test.tokens}
        return float(self._measurer.ask(run=sizes | {"d": test.depth})["tokens_per_second"])

    def warm_up(self, test: Test) -> None:
        """Fills the cache to the test's depth, and runs what it runs."""
        self.run(test if test.kind == "pp" else Test("tg", 1, test.depth))


@contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """Processes that compute until the context ends; their process ids."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes += [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass
class Found:
    """What the rounds have found of a case so far, a figure for each."""

    rates: list[float]  # tokens per second
    others: list[float]  # cores that neither the cluster nor the busy processes used


def measure_once(server: Server, case: Case, stays: bool) -> tuple[float, float]:
    """One run of a case.

    Args:
        server: the case's layout.
        case: what to measure.
        stays: whether the layout is loaded and warm; else it is loaded for this run.

    Returns:
        Tokens per second, and cores used by others.
    """
    if not stays:
        server.load()
        server.warm_up(case.test)
    try:
        with busy(case.busy) as pids:
            others = Others([server.pid, *pids])
            return server.run(case.test), others.cores()
    finally:
        if not stays:
            server.unload()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """What figures of the same rounds are to each other.

    >>> ratio([2, 9], [4, 6])
    {'median': 1.0, 'min': 0.5, 'max': 1.5}
    """
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def results(found: dict[Case, Found]) -> list[dict[str, Any]]:
    """Every figure, and what they come to, ready for JSON. The order of cases says who is first."""
    told = []
    for case, figures in found.items():
        test = case.test
        # The first case of those that differ from this one in one thing alone.
        bases = {
            "first_layout": next(c for c in found if c.test == test and c.busy == case.busy),
            "first_size": next(
                c
                for c in found
                if c.layout == case.layout and c.busy == case.busy and c.test.kind == test.kind
            ),
            "alone": next(c for c in found if c.layout == case.layout and c.test == test),
        }
        told.append(
            {
                "nodes": case.layout.nodes,
                "threads": case.layout.threads,
                "test": test.name,
                "p": test.tokens if test.kind == "pp" else 0,
                "n": test.tokens if test.kind == "tg" else 0,
                "d": test.depth,
                "busy": case.busy,
                "tokens_per_second": figures.rates,
                "median": median(figures.rates),
                "ratio_to": {
                    name: None if base == case else ratio(figures.rates, found[base].rates)
                    for name, base in bases.items()
                },
                "others_cores": figures.others,
            }
        )
    return told


def table(report: dict[str, Any]) -> Table:
    """What a reader wants to know first."""
    shown = Table(
        title=f"{report['shape']} ({report['kernels']}), {report['machine']['cpu']}",
        caption="Ratios are medians of the rounds' (from the least to the most)",
        box=box.MARKDOWN,
    )
    shown.add_column("layout", no_wrap=True)
    headings = "test", "busy", "t/s", ": first layout", ": first size", ": alone", "others"
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in report["results"]:
        ratios = [
            "" if r is None else f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})"
            for r in result["ratio_to"].values()
        ]
        shown.add_row(
            f"{result['nodes']}x{result['threads']}",
            result["test"],
            f"{result['busy'] or ''}",
            f"{result['median']:.2f}",
            *ratios,
            f"{median(result['others_cores']):.2f}",
        )
    return shown


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def layouts(text: str) -> list[ClusterShape]:
        return list(dict.fromkeys(map(ClusterShape.parse, text.split(","))))

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="glm-edge-1.5b", help="[default: glm-edge-1.5b]")
    default = "1x2,2x1,4x1,1x1"
    add("--layouts", type=layouts, default=layouts(default), help=f"[default: {default}]")
    add("-p", type=numbers, default=[512], help="tokens of prompts; 0: none [default: 512]")
    add("-n", type=numbers, default=[64], help="tokens of answers; 0: none [default: 64]")
    add("--depth", "-d", type=numbers, default=[0], help="of answers, N,N,... [default: 0]")
    add("--busy", type=int, default=0, help="busy processes beside every second measurement")
    add("-r", type=int, default=5, help="rounds [default: 5]")
    add("-o", type=Path, help="results as JSON [default: bench/results/DATE-CPU-nodes.json]")
    args = parser.parse_args(words)
    if args.r < 1 or args.busy < 0 or not plan_cases(args):
        parser.error("nothing to run: -p or -n says how many tokens, -r how often")
    return args


def plan_cases(args: argparse.Namespace) -> list[Case]:
    """All that a round measures: prompts from an empty cache, answers at each depth."""
    tests = [*plan_tests(args.p, [], [0]), *plan_tests([], args.n, args.depth)]
    loads = dict.fromkeys((0, args.busy))
    return [Case(*case) for case in product(args.layouts, dict.fromkeys(tests), loads)]


def measure(
    args: argparse.Namespace, servers: dict[ClusterShape, Server], stays: bool, starting: Starting
) -> Iterator[dict[str, Any]]:
    """Measures round after round, and yields what is known after each."""
    cases = plan_cases(args)
    if stays:
        for case in cases:
            if not case.busy:
                starting(f"warm-up: {case.name}")
                servers[case.layout].warm_up(case.test)
    found = {case: Found([], []) for case in cases}
    loads = [machine.load_average()]
    for number in range(args.r):
        for case in cases if number % 2 == 0 else reversed(cases):
            starting(f"round {number + 1} of {args.r}: {case.name}")
            rate, others = measure_once(servers[case.layout], case, stays)
            found[case].rates.append(rate)
            found[case].others.append(others)
        loads.append(machine.load_average())
        # Before the first round, and after each; the measured processes are in it.
        yield {"load": loads, "results": results(found)}


def main() -> None:
    args = parse()
    config = config_of(args.shape)
    tests = {case.test for case in plan_cases(args)}
    for test in tests:
        check_fits(test, config.max_seq_len)
    seq_len = max(test.positions for test in tests)
    needed = sum(layout.planned_bytes(args.shape, seq_len) for layout in args.layouts)
    stays = needed < _SPARE * memory_here().available
    path: Path = args.o or result_file("nodes")
    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status("loading") as status, ExitStack() as stack:
        servers = {}
        for layout in args.layouts:
            worker = Path(__file__).parent / "pyllama_worker.py"
            command: list[str | Path] = [sys.executable, worker]
            measurer = stack.enter_context(running(f"nodes-{layout}", command))
            servers[layout] = server = Server(measurer, layout, args.shape, seq_len)
            status.update(f"loading {layout}")
            loaded = server.load()
            if not stays:
                server.unload()
        report: dict[str, Any] = {
            "kind": "nodes",
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "machine": machine.facts(),
            "versions": machine.versions(),
            "shape": args.shape,
            "kernels": loaded["kernels"],
            "matrix_bytes": loaded["matrix_bytes"],
            "sync": loaded["sync"],
            "seq_len": loaded["seq_len"],
            "all_loaded": stays,
        }
        for known in measure(args, servers, stays, status.update):
            report |= known
            path.write_text(json.dumps(report, indent=1) + "\n")
    # Lines of a table that is wider than the terminal are still lines.
    out = Console()
    out.width = max(out.width, _TABLE_WIDTH)
    out.print(table(report))
    console.print(f"everything: {path}")


if __name__ == "__main__":
    try:
        main()
    except PyllamaError as error:
        print(f"compare_nodes: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

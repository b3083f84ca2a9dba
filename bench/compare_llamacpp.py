"""Compares pyllama-dist with llama.cpp: same shapes, same machine, same minutes.

    python bench/compare_llamacpp.py --shapes tinyllama-1.1b,glm-edge-1.5b --threads 1,2

Both run on random weights, as processes that stay. Each round measures one after the other, first
the one and then the other way round, so what slows the machine down meets both; the ratio is taken
in each round, and then the median. llama.cpp runs with flash attention and without, and the better
median counts. What memory gives is read right before and after each of our runs. Load averages
include the measured processes; "others" is what the rest used. Linux only.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from llamacpp_env import VERSION, prepare, python
from measurer import CACHE, Measurer, Others, Starting, result_file, running
from rich import box
from rich.console import Console
from rich.table import Table

from pyllama_dist.bench import machine
from pyllama_dist.bench.measure import Test, plan_tests
from pyllama_dist.bench.shapes import SHAPES, config_of
from pyllama_dist.errors import PyllamaError

HERE = Path(__file__).parent
ENV = CACHE / f"llamacpp-{VERSION}"
OURS, THEIRS, THEIRS_FLASH = "pyllama-dist", "llama.cpp", "llama.cpp with flash attention"

_TABLE_WIDTH = 120


def compare(
    test: Test,
    setting: Mapping[str, Any],
    rounds: int,
    ours: Measurer,
    theirs: Measurer,
    starting: Starting,
) -> dict[str, Any]:
    """Runs a test in turns.

    Args:
        test: what to run.
        setting: what is loaded, as from `load`.
        rounds: how often each runs, after a warm-up.
        ours: pyllama-dist.
        theirs: llama.cpp.
        starting: told what runs next.

    Returns:
        Every figure, and what they come to, ready for JSON.
    """

    def run(name: str, tokens: int = test.tokens) -> float:
        sizes = {"p": tokens, "n": 0} if test.kind == "pp" else {"p": 0, "n": tokens}
        sizes["d"] = test.depth
        if name == OURS:
            return float(ours.ask(run=sizes)["tokens_per_second"])
        return float(theirs.ask(run=sizes | {"flash": name == THEIRS_FLASH})["tokens_per_second"])

    def bandwidth() -> float:
        asked = {"threads": setting["threads"]}
        return float(ours.ask(bandwidth=asked)["gb_per_second"])

    what = f"{setting['shape']}, {setting['threads']} threads, {test.name}"
    names = [OURS, THEIRS, THEIRS_FLASH]
    rates: dict[str, list[float]] = {name: [] for name in names}
    loads, others, read = [machine.load_average()], [], []
    for name in names:
        starting(f"{what}: warm-up, {name}")
        run(name, test.tokens if test.kind == "pp" else 1)
    for number in range(rounds):
        rest = Others([ours.pid, theirs.pid])
        for name in names if number % 2 == 0 else reversed(names):
            starting(f"{what}: round {number + 1} of {rounds}, {name}")
            around = name == OURS and test.kind == "tg"
            before = bandwidth() if around else 0.0
            rates[name].append(run(name))
            if around:
                read.append((before + bandwidth()) / 2)
        others.append(rest.cores())
        loads.append(machine.load_average())
    best = max(THEIRS, THEIRS_FLASH, key=lambda name: median(rates[name]))
    ratios = [our / their for our, their in zip(rates[OURS], rates[best], strict=True)]
    gb_per_token = setting["matrix_bytes"][OURS] / 1e9
    shares = [our * gb_per_token / most for our, most in zip(rates[OURS], read, strict=False)]
    return {
        "test": test.name,
        "p": test.tokens if test.kind == "pp" else 0,
        "n": test.tokens if test.kind == "tg" else 0,
        "d": test.depth,
        "tokens_per_second": rates,
        "median": {name: median(rates[name]) for name in names},
        "compared_with": best,
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "memory_gb_per_second": read,  # by as many threads, around each of our runs of tg
        "memory_share": median(shares) if shares else None,
        "load": loads,  # before the first round, and after each
        "others_cores": others,  # in each round
    }


def load(
    shape: str, threads: int, seq_len: int, ours: Measurer, theirs: Measurer
) -> dict[str, Any]:
    """Loads a shape into both.

    Returns:
        What they say of it, ready for JSON.
    """
    both: dict[str, Any] = {"shape": shape, "threads": threads, "seq_len": seq_len}
    files = {"config": dict(SHAPES[shape]), "dir": str(CACHE / "gguf")}
    our, their = ours.ask(load=both), theirs.ask(load=both | files)
    return {
        "shape": shape,
        "threads": threads,
        "kernels": our["kernels"],
        "seq_len": our["seq_len"],
        "matrix_bytes": {OURS: our["matrix_bytes"], THEIRS: their["bytes_per_token"]},
        "buffers_mib": their["buffers_mib"],  # where llama.cpp keeps what, repacked or as it came
    }


def repacked(buffers: Mapping[str, float]) -> bool:
    """Whether llama.cpp has put weights in the order that its fastest kernels want.

    >>> repacked({"CPU_Mapped": 555.3, "CPU_REPACK": 554.9}), repacked({"CPU_Mapped": 555.3})
    (True, False)
    """
    return not buffers.keys() <= {"CPU", "CPU_Mapped"}


def table(report: Mapping[str, Any]) -> Table:
    """What a reader wants to know first."""
    kernels = ", ".join(sorted({result["kernels"] for result in report["results"]}))
    shown = Table(
        title=f"pyllama-dist ({kernels}) : llama.cpp, {report['machine']['cpu']}",
        caption="fa: with flash attention; %: of what memory gave as many threads around it",
        box=box.MARKDOWN,
    )
    shown.add_column("shape", no_wrap=True)
    columns = "threads", "test", "t/s", "llama.cpp", "ratio", "min–max", "GB/s", "%", "load"
    for heading in (*columns, "others"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for result in report["results"]:
        our, their = (result["median"][name] for name in (OURS, result["compared_with"]))
        ratio, sizes = result["ratio"], result["matrix_bytes"]
        read = f"{our * sizes[OURS] / 1e9:.1f} : {their * sizes[THEIRS] / 1e9:.1f}"
        shown.add_row(
            result["shape"],
            str(result["threads"]),
            result["test"],
            f"{our:.2f}",
            f"{their:.2f}" + (" fa" if result["compared_with"] == THEIRS_FLASH else ""),
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}–{ratio['max']:.2f}",
            read if result["n"] else "",
            f"{100 * result['memory_share']:.0f}" if result["n"] else "",
            f"{result['load'][0][0]:.1f}–{result['load'][-1][0]:.1f}",
            f"{median(result['others_cores']):.2f}",
        )
    return shown


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def names(text: str) -> list[str]:
        for name in text.split(","):
            config_of(name)
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", type=names, default=["tinyllama-1.1b", "glm-edge-1.5b"], help="A,B,...")
    add("--threads", "-t", type=numbers, default=[1, 2], help="N,N,... [default: 1,2]")
    add("-p", type=numbers, default=[512], help="tokens of prompts; 0: none [default: 512]")
    add("-n", type=numbers, default=[128], help="tokens of answers; 0: none [default: 128]")
    add("-d", type=numbers, default=[0], help="positions in the cache before [default: 0]")
    add("-r", type=int, default=5, help="rounds [default: 5]")
    add("--kernels", help="pyllama-dist's kernels, as PYLLAMA_KERNELS names them")
    add("--env", type=Path, default=ENV, help="where llama.cpp is, or is to be built")
    add("-o", type=Path, help="results as JSON [default: bench/results/DATE-CPU-llamacpp.json]")
    args = parser.parse_args(words)
    if args.r < 1 or not plan_tests(args.p, args.n, args.d):
        parser.error("nothing to run: -p or -n says how many tokens, -r how often")
    return args


def measure(
    args: argparse.Namespace,
    ours: Measurer,
    theirs: Measurer,
    report: dict[str, Any],
    starting: Starting,
) -> Iterator[None]:
    """Fills the report, and yields whenever there is more in it."""
    tests = plan_tests(args.p, args.n, args.d)
    seq_len = max(test.positions for test in tests)
    for shape in args.shapes:
        for threads in args.threads:
            starting(f"{shape}, {threads} threads: loading")
            setting = load(shape, threads, seq_len, ours, theirs)
            for test in tests:
                found = compare(test, setting, args.r, ours, theirs, starting)
                report["results"].append(setting | found)
                yield


def main() -> None:
    args = parse()
    console = Console(stderr=True)
    with console.status("building llama.cpp, unless that is done") as status, ExitStack() as stack:
        build = prepare(args.env)
        serve: list[str | Path] = [sys.executable, HERE / "pyllama_worker.py"]
        kernels = {"PYLLAMA_KERNELS": args.kernels} if args.kernels else {}
        ours = stack.enter_context(running(OURS, serve, **kernels))
        worker: list[str | Path] = [python(args.env), HERE / "llamacpp_worker.py"]
        theirs = stack.enter_context(running(THEIRS, worker))
        date = datetime.now().astimezone()
        report: dict[str, Any] = {
            "kind": "llamacpp",
            "date": date.isoformat(timespec="seconds"),
            "machine": machine.facts(),
            "versions": machine.versions(),
            "llamacpp": asdict(build) | theirs.ask(about={}),
            "results": [],
        }
        path: Path = args.o or result_file("llamacpp")
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in measure(args, ours, theirs, report, status.update):
            path.write_text(json.dumps(report, indent=1) + "\n")
    # Lines of a table that is wider than the terminal are still lines.
    out = Console()
    out.width = max(out.width, _TABLE_WIDTH)
    out.print(table(report))
    if any(not repacked(result["buffers_mib"]) for result in report["results"]):
        console.print("llama.cpp computes with weights as they are in the file: not its best way")
    console.print(f"everything: {path}")


if __name__ == "__main__":
    try:
        main()
    except PyllamaError as error:
        print(f"compare_llamacpp: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

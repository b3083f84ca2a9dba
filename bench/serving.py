"""Measures the server and the bare engine in turns: same weights, same minutes.

    python bench/serving.py users --shape glm-edge-1.5b      several users at once
    python bench/serving.py arrival --shape glm-edge-1.5b    a long prompt comes beside answers
    python bench/serving.py overhead                         what HTTP adds to one answer

The server is that of `pyllama-dist api`, asked over HTTP for streams by this process; the engine is
asked in its own. Both run in one process on the same nodes, one after the other, every second round
the other way round; ratios are taken in each round, and then the median. Figures have the names of
vLLM's `bench serve`: TTFT is the time to the first token, ITL that between two, TPOT that of each
token but the first. Output throughput counts the tokens of all users from the first request to the
last token. Linux only.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import click
import numpy as np
import serving_load
from measurer import Measurer, Others, result_file, running
from rich import box
from rich.console import Console
from rich.table import Table
from serving_load import Ask, Heard, Json, latencies, milliseconds, throughput
from serving_worker import BUILTIN_NAME, config_here

from pyllama_dist.bench import machine
from pyllama_dist.bench.measure import matrix_bytes
from pyllama_dist.cluster import MAX_SEQS, Cluster, programs
from pyllama_dist.cores import available_cores
from pyllama_dist.engine.engine import STEP_SECONDS
from pyllama_dist.errors import PyllamaError, UsageError
from pyllama_dist.ops import ExpertMatmul
from pyllama_dist.program import Program

Way = Literal["engine", "server"]
WAYS: tuple[Way, Way] = ("engine", "server")
Runs = Mapping[tuple[Way, int], Sequence[Sequence[Heard]]]  # of each way and number of users
_F = TypeVar("_F", bound=Callable[..., Any])
_PREFILL = 512  # tokens of the prompt that tells the rate of prefill
_SHORT = 16  # tokens of a short prompt
_BEFORE = 1.0  # seconds of answers before the long prompt comes
_BEHIND = 0.5  # seconds, after which a short prompt follows the long one
_TABLE_WIDTH = 160


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    shape: str
    layers: int | None
    threads: int
    seq_len: int
    parallel: int

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.shape if self.layers is None else f"{self.shape} ({self.layers} layers)"


class Model:
    """A model in a process of its own, which is asked in both ways."""

    def __init__(self, measurer: Measurer, setting: Setting) -> None:
        self.facts = measurer.ask(load=asdict(setting))
        self.others: list[float] = []  # cores that other processes took, in each run
        self._measurer, self._bias = measurer, self.facts["bias"]
        self._random = np.random.default_rng(0)

    def question(self, prompt: int, answer: int, at: float = 0.0) -> Ask:
        """One that no cache knows."""
        ids = self._random.integers(0, self.facts["vocab_size"], prompt)
        return Ask([int(id) for id in ids], answer, at)

    def ask(self, way: Way, asks: Sequence[Ask]) -> list[Heard]:
        """What each of the users hears."""
        others = Others([self._measurer.pid, os.getpid()])
        if way == "server":
            self._measurer.ask(serve={})
            heard = serving_load.ask(self.facts["url"], asks, self._bias)
        else:
            order = {"asks": [asdict(one) for one in asks], "bias": self._bias}
            heard = [Heard(**one) for one in self._measurer.ask(engine=order)["heard"]]
        self.others.append(others.cores())
        return heard


@contextmanager
def measuring(kind: str, setting: Setting, out: Path | None) -> Iterator[tuple[Model, Json]]:
    """A model, and a report, which is written when the context ends."""
    before = machine.load_average()
    worker = Path(__file__).parent / "serving_worker.py"
    with running(f"serving-{kind}", [sys.executable, worker]) as measurer:
        model = Model(measurer, setting)
        report: Json = {
            "kind": kind,
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "model": setting.name,
            **asdict(setting),
            **{name: model.facts[name] for name in ("kernels", "machine", "versions")},
        }
        yield model, report
    report["load"] = {"before": before, "after": machine.load_average()}
    report["others_cores"] = model.others
    path = out or result_file(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    others = f"others used {median(model.others):.2f} cores, {max(model.others):.2f} at most"
    click.echo(f"{others}; everything: {path}", err=True)


def in_turns(rounds: int, cases: Sequence[Any]) -> Iterator[Any]:
    """All cases in each round, in every second one the other way round."""
    for number in range(rounds):
        yield from cases if number % 2 == 0 else reversed(cases)


def ratio(found: Sequence[float], to: Sequence[float]) -> Json:
    """Of figures to others of the same rounds: the median, and how far it scatters."""
    ratios = [one / other for one, other in zip(found, to, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def gain_by_experts(program: Program, users: int) -> float:
    """How many times one user's tokens so many users can get, by what a step reads.

    A step reads a matrix once, whatever its rows, and of experts those that any row chose. Of E
    experts, of which each row chooses k, n rows choose E * (1 - (1 - k / E) ** n) on average:
    (1 - k / E) ** n is the chance that none of them chooses a given one, if their texts have
    nothing to do with each other and routers choose all equally often. So n users get at most n
    times the bytes of one user's step, over those of theirs. The KV cache is not counted.
    """
    expert = sum(
        op.weight.each[0].nbytes
        for segment in program.segments
        for op in segment.ops
        if isinstance(op, ExpertMatmul)
    )
    one, total, chosen = matrix_bytes(program), program.n_experts, program.n_active_experts
    more = total * (1 - (1 - chosen / total) ** users) - chosen if total else 0
    return users * one / (one + more * expert)


def options(command: _F) -> _F:
    """Those that all commands have."""
    for decorate in (
        click.option("--layers", type=click.IntRange(min=1), help="Of a shape, its first N only."),
        click.option("--threads", "-t", default=available_cores(), show_default=True),
        click.option("-o", "out", type=click.Path(path_type=Path), help="Results as JSON."),
    ):
        command = decorate(command)
    return command


def shape_option(default: str) -> Callable[[_F], _F]:
    return click.option("--shape", default=default, show_default=True, help=f"Or {BUILTIN_NAME}.")


def rounds_option(default: int) -> Callable[[_F], _F]:
    return click.option("-r", "rounds", type=click.IntRange(1), default=default, show_default=True)


@click.group(help=__doc__.splitlines()[0])
def main() -> None:
    """Has nothing to do before its commands."""


@main.command("users", help="Several users at once, each with a question of their own.")
@shape_option("glm-edge-1.5b")
@options
@click.option("--users", "-b", default="1,2,4,8,16", show_default=True)
@click.option("-p", "prompt", default=_SHORT, show_default=True, help="Tokens of a prompt.")
@click.option("-n", "answer", default=64, show_default=True, help="Tokens of an answer.")
@rounds_option(3)
def measure_users(
    shape: str,
    layers: int | None,
    threads: int,
    out: Path | None,
    users: str,
    prompt: int,
    answer: int,
    rounds: int,
) -> None:
    counts = sorted({1, *map(int, users.split(","))})
    if not 1 <= counts[0] <= counts[-1] <= MAX_SEQS:
        raise UsageError(f"--users {users}: from 1 to {MAX_SEQS} can be served at once")
    setting = Setting(shape, layers, threads, max(prompt + answer, _PREFILL + 1), counts[-1])
    runs: dict[tuple[Way, int], list[list[Heard]]] = defaultdict(list)
    prefill = []
    with measuring("users", setting, out) as (model, report):
        for way in WAYS:  # kernels are there afterwards
            model.ask(way, [model.question(prompt, 4) for _ in range(counts[-1])])
        cases = [(way, count) for count in counts for way in WAYS]
        for way, count in in_turns(rounds, cases):
            asks = [model.question(prompt, answer) for _ in range(count)]
            runs[way, count].append(model.ask(way, asks))
            if (way, count) == ("engine", 1):
                (read,) = model.ask("engine", [model.question(_PREFILL, 1)])
                prefill.append(_PREFILL / read.ttft)
        decode = [1 / heard.tpot for (heard,) in runs["engine", 1]]
        program = programs(
            config_here(shape, layers), Cluster(n_threads=threads, max_seq_len=setting.seq_len)
        )[0]
        report |= {
            "prompt": prompt,
            "answer": answer,
            "prefill_throughput": median(prefill),
            "decode_throughput": median(decode),
            "prefill_to_decode": ratio(prefill, decode),
            "results": [
                {
                    "users": count,
                    "ceiling": min(
                        median(prefill) / median(decode), gain_by_experts(program, count)
                    ),
                    **{way: of_users(runs, way, count) for way in WAYS},
                    "server_to_engine": ratio(
                        rates(runs, "server", count), rates(runs, "engine", count)
                    ),
                }
                for count in counts
            ],
        }
    show(users_table(report))


def rates(runs: Runs, way: Way, count: int) -> list[float]:
    """Tokens per second of all users, round by round."""
    return [throughput(heard)["output_throughput"] for heard in runs[way, count]]


def of_users(runs: Runs, way: Way, count: int) -> Json:
    """What so many users found: rates are medians of the rounds, times those of all answers."""
    told = [throughput(heard) for heard in runs[way, count]]
    return {
        **{name: median(one[name] for one in told) for name in told[0]},
        **latencies([one for heard in runs[way, count] for one in heard]),
        "to_one": ratio(rates(runs, way, count), rates(runs, way, 1)),
    }


@main.command("arrival", help="A long prompt comes while others are answered.")
@shape_option("glm-edge-1.5b")
@options
@click.option("-p", "prompt", default=4000, show_default=True, help="Tokens of the long prompt.")
@click.option("-n", "answer", default=256, show_default=True, help="Tokens of the answers beside.")
@click.option("--users", "-b", default=1, show_default=True, help="Who are answered meanwhile.")
@rounds_option(2)
def measure_arrival(
    shape: str,
    layers: int | None,
    threads: int,
    out: Path | None,
    prompt: int,
    answer: int,
    users: int,
    rounds: int,
) -> None:
    setting = Setting(shape, layers, threads, max(prompt, _SHORT + answer) + 3, users + 3)
    runs: dict[Way, list[list[Heard]]] = defaultdict(list)
    with measuring("arrival", setting, out) as (model, report):
        for way in WAYS:  # kernels are there afterwards
            model.ask(way, [model.question(min(prompt, _PREFILL), 2)])
        for way in in_turns(rounds, WAYS):
            asks = [
                *(model.question(_SHORT, answer) for _ in range(users)),
                model.question(_SHORT, 2, _BEFORE / 2),
                model.question(prompt, 2, _BEFORE),
                model.question(_SHORT, 2, _BEFORE + _BEHIND),
            ]
            runs[way].append(model.ask(way, asks))
        report |= {"prompt": prompt, "users": users, "step_ms": 1e3 * STEP_SECONDS}
        report["results"] = [{"way": way, **of_arrivals(runs[way])} for way in WAYS]
    show(arrival_table(report))


def of_arrivals(runs: Sequence[Sequence[Heard]]) -> Json:
    """What answers met while a long prompt was read, and how long prompts took.

    Raises:
        UsageError: an answer ended before, or had no token meanwhile.
    """
    gaps = []
    for *beside, _, long, _ in runs:
        if min(one.pieces[-1] for one in beside) < long.pieces[0]:
            raise UsageError("an answer ended before the long prompt was read; raise -n")
        gaps += [gap for one in beside for gap in one.gaps(long.sent, long.pieces[0])]
    if not gaps:
        raise UsageError("no token came while the long prompt was read; raise -p")
    found = milliseconds("itl", gaps)
    for place, name in ((-3, "before"), (-2, "long"), (-1, "behind")):
        found[f"ttft_{name}_ms"] = 1e3 * median(run[place].ttft for run in runs)
    p99 = float(np.percentile(gaps, 99))
    return {**found, "max_itl_ms": 1e3 * max(gaps), "p99_to_step": p99 / STEP_SECONDS}


@main.command("overhead", help="What HTTP adds to the first token, and to each.")
@shape_option(BUILTIN_NAME)
@options
@click.option("-n", "answer", default=256, show_default=True, help="Tokens of an answer.")
@rounds_option(50)
def measure_overhead(
    shape: str, layers: int | None, threads: int, out: Path | None, answer: int, rounds: int
) -> None:
    setting = Setting(shape, layers, threads, _SHORT + answer + 1, 1)
    found: dict[Way, list[Heard]] = defaultdict(list)
    with measuring("overhead", setting, out) as (model, report):
        for way in WAYS:
            model.ask(way, [model.question(_SHORT, min(4, answer))])
        for way in in_turns(rounds, WAYS):
            found[way] += model.ask(way, [model.question(_SHORT, answer)])
        step = median(one.tpot for one in found["engine"])
        report |= {way: latencies(found[way]) for way in WAYS}
        report["allowed_ms"] = 1e3 * max(0.03 * step, 0.0003)
        for name in ("ttft", "tpot"):
            pairs = zip(found["server"], found["engine"], strict=True)
            added = [getattr(served, name) - getattr(bare, name) for served, bare in pairs]
            report |= milliseconds(f"added_{name}", added)
    show(overhead_table(report))


def users_table(report: Json) -> Table:
    shown = table(
        report,
        f"A prompt of {_PREFILL} tokens is read at {report['prefill_throughput']:.1f} tokens/s, "
        f"{report['prefill_to_decode']['median']:.2f} times the rate of one answer: the ceiling of "
        "any number of users, where the weights of experts leave no lower one",
        *("users", "engine t/s", ": one", "server t/s", ": one", "ceiling", ": engine", "req/s"),
        *("TTFT 50/90/99 ms", "TPOT p50", "ITL 50/90/99 ms"),
    )
    for result in report["results"]:
        engine, server = result["engine"], result["server"]
        shown.add_row(
            str(result["users"]),
            f"{engine['output_throughput']:.1f}",
            f"{engine['to_one']['median']:.2f}",
            f"{server['output_throughput']:.1f}",
            told(server["to_one"]),
            f"{result['ceiling']:.2f}",
            told(result["server_to_engine"]),
            f"{server['request_throughput']:.2f}",
            percentiles(server, "ttft"),
            f"{server['p50_tpot_ms']:.1f}",
            percentiles(server, "itl"),
        )
    return shown


def arrival_table(report: Json) -> Table:
    shown = table(
        report,
        f"ITL of {report['users']} answers while a prompt of {report['prompt']} tokens is read; "
        f"TTFT of a short prompt before it, of it, and of a short one {_BEHIND} s behind",
        *("", "ITL 50/90/99 ms", "most", "p99 : step", "TTFT short, ms", "long", "short behind"),
    )
    for result in report["results"]:
        shown.add_row(
            result["way"],
            percentiles(result, "itl"),
            f"{result['max_itl_ms']:.0f}",
            f"{result['p99_to_step']:.2f}",
            *(f"{result[f'ttft_{name}_ms']:.0f}" for name in ("before", "long", "behind")),
        )
    return shown


def overhead_table(report: Json) -> Table:
    shown = table(
        report,
        f"Added: medians of pairs; allowed are {report['allowed_ms']:.3f} ms",
        *("", "engine ms", "server ms", "added ms"),
    )
    for name in ("ttft", "tpot"):
        shown.add_row(
            name.upper(),
            *(f"{report[way][f'p50_{name}_ms']:.3f}" for way in WAYS),
            f"{report[f'p50_added_{name}_ms']:.3f}",
        )
    return shown


def table(report: Json, caption: str, *columns: str) -> Table:
    cpu, kernels = report["machine"]["cpu"], report["kernels"]
    title = f"{report['model']} ({kernels}, {report['threads']} threads), {cpu}"
    shown = Table(title=title, caption=caption, box=box.MARKDOWN)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    return shown


def percentiles(found: Json, name: str) -> str:
    return " / ".join(f"{found[f'p{p}_{name}_ms']:.0f}" for p in (50, 90, 99))


def told(ratio: Json) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def show(shown: Table) -> None:
    out = Console()  # lines of a table that is wider than the terminal are still lines
    out.width = max(out.width, _TABLE_WIDTH)
    out.print(shown)


if __name__ == "__main__":
    try:
        main()
    except PyllamaError as error:
        print(f"serving: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""What a benchmark has found, as JSON, as CSV, and as a table in llama-bench's manner."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from statistics import fmean, median, stdev

from pyllama_dist.bench.measure import Result, Test
from pyllama_dist.bench.traffic import Traffic


@dataclass(frozen=True)
class ModelFacts:
    """The model of a run."""

    model: str
    arch: str
    weights: str  # number format of the matrices
    parameters: int  # of the matrices that a token is multiplied with: of experts, those chosen
    matrix_bytes: int  # of all nodes together: what is read for each token


@dataclass(frozen=True)
class Setting:
    """The configuration of a run."""

    kernels: str
    nodes: int
    nodes_here: int  # on this machine, the root included
    threads: int  # of each node here
    sync: str  # dtype of partial sums on the wire
    collective: str  # algorithm of the all-reduce
    seq_len: int
    max_rows: int  # of a batch


@dataclass(frozen=True)
class Report:
    """Everything that one run of the benchmark has found."""

    date: str  # ISO 8601
    model: ModelFacts
    setting: Setting
    results: Sequence[Result]
    traffic: Mapping[Test, Sequence[Traffic]]  # of one run: each node's, worked out
    bytes_here: int  # of the matrices: what the nodes on this machine read for each token
    peak_bytes: Sequence[int]  # memory of each node, the root first
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    load: Mapping[str, Sequence[float]]  # load averages, "before" and "after"


@dataclass(frozen=True)
class Figures:
    """What one test comes to. What is told of each node begins with the root."""

    test: str
    p: int
    n: int
    d: int
    users: int
    repetitions: int
    tokens_per_second: float  # mean, as llama-bench's; of all users together
    tokens_per_second_per_user: float
    stdev: float
    median: float
    gb_per_second: float | None  # of matrices read by the nodes here; a prompt is not bound by it
    memory_share: float | None  # of what their threads can read, measured after each run
    memory_gb_per_second: Sequence[float]
    compute_ms_per_token: Sequence[float]  # of each node
    sync_ms_per_token: Sequence[float]  # of each node, waiting for others included
    kb_sent_per_token: Sequence[float]  # of each node
    kb_received_per_token: Sequence[float]
    messages_per_token: Sequence[float]  # that each node sends


def as_json(report: Report) -> str:
    """One object with everything. GB are 10^9 bytes."""
    return json.dumps(
        {
            "kind": "bench",
            "date": report.date,
            **asdict(report.model),
            **asdict(report.setting),
            "tests": [
                asdict(figures(report, result)) | {"seconds": [run.seconds for run in result.runs]}
                for result in report.results
            ],
            "peak_bytes": report.peak_bytes,
            "machine": report.machine,
            "versions": report.versions,
            "load": report.load,
        },
        indent=1,
    )


def as_csv(report: Report) -> str:
    """A heading, and a line for each test."""
    common: dict[str, object] = {"date": report.date, "cpu": report.machine["cpu"]}
    common |= asdict(report.model) | asdict(report.setting)
    rows = [common | _flat(asdict(figures(report, result))) for result in report.results]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(report: Report) -> str:
    """A table for GitHub, and below it the facts that all its lines share."""
    model, setting, machine = report.model, report.setting, report.machine
    heading = ["model", "size", "params", "kernels", "nodes", "threads", "test", "t/s", "per user"]
    heading += ["median", "GB/s", "% of memory", "compute ms", "sync ms"]
    heading += ["kB sent", "kB received", "messages"]
    common = [
        f"{model.model} {model.weights.upper()}",
        _short(model.matrix_bytes, "MB", "GB"),
        _short(model.parameters, "M", "B"),
        setting.kernels,
        f"{setting.nodes}",
        f"{setting.threads}",
    ]
    lines = [heading, ["---"] * 6 + ["---:"] * (len(heading) - 6)]
    for result in report.results:
        found = figures(report, result)
        rate, share = found.gb_per_second, found.memory_share
        lines.append(
            [
                *common,
                found.test,
                f"{found.tokens_per_second:.2f} ± {found.stdev:.2f}",
                f"{found.tokens_per_second_per_user:.2f}",
                f"{found.median:.2f}",
                "" if rate is None else f"{rate:.2f}",
                "" if share is None else f"{100 * share:.0f}",
                _each(found.compute_ms_per_token, 2),
                _each(found.sync_ms_per_token, 2),
                _each(found.kb_sent_per_token),
                _each(found.kb_received_per_token),
                _each(found.messages_per_token),
            ]
        )
    features = machine["features"]
    read = [rate / 1e9 for result in report.results for rate in result.bandwidth]
    peak = ", ".join(f"{n / 1e6:.0f}" for n in report.peak_bytes)
    facts = [
        f"{machine['cpu']}, {machine['cores']} cores"
        + (f" ({', '.join(features)})" if isinstance(features, list) and features else ""),
        f"memory read: {median(read):.1f} GB/s ({min(read):.1f} to {max(read):.1f}) with "
        f"{setting.threads * setting.nodes_here} threads",
        f"peak memory of each node: {peak} MB",
        f"load: {report.load['before'][0]:.2f} before, {report.load['after'][0]:.2f} after",
        ", ".join(f"{name} {number}" for name, number in report.versions.items()),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {fact}" for fact in facts) + "\n"


def figures(report: Report, result: Result) -> Figures:
    """What the runs of a test come to."""
    test, runs = result.test, result.runs
    rates = [test.all_tokens / run.seconds for run in runs]
    tokens = test.all_tokens * len(runs)
    traffic = report.traffic[test]
    # A prompt is not bound by memory. A step reads matrices once for all users, but for experts.
    steps = [rate / test.users for rate in rates]
    read = [rate * report.bytes_here for rate in steps] if test.kind == "tg" else []
    most = [fmean(around) for around in pairwise(result.bandwidth)]  # of each run
    shares = [rate / limit for rate, limit in zip(read, most, strict=False)]
    return Figures(
        test=test.name,
        p=test.tokens if test.kind == "pp" else 0,
        n=test.tokens if test.kind == "tg" else 0,
        d=test.depth,
        users=test.users,
        repetitions=len(runs),
        tokens_per_second=fmean(rates),
        tokens_per_second_per_user=fmean(rates) / test.users,
        stdev=stdev(rates) if len(rates) > 1 else 0.0,
        median=median(rates),
        gb_per_second=median(read) / 1e9 if read else None,
        memory_share=median(shares) if shares else None,
        memory_gb_per_second=[rate / 1e9 for rate in result.bandwidth],
        compute_ms_per_token=[1e3 * node.compute_seconds / tokens for node in result.spent],
        sync_ms_per_token=[1e3 * node.sync_seconds / tokens for node in result.spent],
        kb_sent_per_token=[node.sent / 1e3 / test.all_tokens for node in traffic],
        kb_received_per_token=[node.received / 1e3 / test.all_tokens for node in traffic],
        messages_per_token=[node.messages / test.all_tokens for node in traffic],
    )


def _flat(fields: dict[str, object]) -> dict[str, object]:
    """Lists become one cell: their numbers with a space between."""
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in fields.items()
    }


def _each(figures: Sequence[float], digits: int = 1) -> str:
    """A figure of each node, the root first; nodes in a row that have the same are told once.

    >>> _each([9.25, 4.5, 4.5, 4.4]), _each([0.0])
    ('9.2, 2 × 4.5, 4.4', '0.0')
    """
    runs = [(text, len(list(same))) for text, same in groupby(f"{f:.{digits}f}" for f in figures)]
    return ", ".join(f"{count} × {text}" if count > 1 else text for text, count in runs)


def _short(count: int, million: str, billion: str) -> str:
    """A count with two decimals.

    >>> _short(828_112_896, "MB", "GB"), _short(1_472_200_704, "M", "B")
    ('828.11 MB', '1.47 B')
    """
    return f"{count / 1e9:.2f} {billion}" if count >= 1e9 else f"{count / 1e6:.2f} {million}"

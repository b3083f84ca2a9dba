"""Writes the results in bench/results/*.json into bench/README.md, between two marker comments.

    python bench/results_table.py

Reads the files of `pyllama-dist bench -o json` ("kind": "bench"), of `bench/compare_llamacpp.py`
("llamacpp"), of `bench/compare_nodes.py` ("nodes") and of the commands of `bench/serving.py`
("users", "arrival", "overhead"). Where two files measured the same thing on
the same kind of machine, the newer one counts.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- results -->", "<!-- /results -->"

Json = dict[str, Any]
Row = tuple[str, ...]


def _machine(file: Json) -> str:
    """The CPU as its maker calls it, and as LLVM does: clouds hide the first."""
    return f"{file['machine']['cpu']} ({file['machine']['llvm_cpu']})"


def bench_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """What a row is about, and what was found: of a file of `pyllama-dist bench`."""
    for test in file["tests"]:
        rate, share = test["gb_per_second"], test["memory_share"]
        nodes = f"{file['nodes']} × {file['threads']}"
        yield (
            (_machine(file), file["model"], file["kernels"], nodes, test["test"]),
            (
                f"{test['median']:.1f}",
                "" if rate is None else f"{rate:.1f}",
                "" if share is None else f"{100 * share:.0f}",
            ),
        )


def llamacpp_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """The same of a comparison with llama.cpp, with the better of its ways."""
    for result in file["results"]:
        rates, ratio = result["median"], result["ratio"]
        nodes = f"1 × {result['threads']}"
        yield (
            (_machine(file), result["shape"], result["kernels"], nodes, result["test"]),
            (
                f"{rates['pyllama-dist']:.1f}",
                f"{rates[result['compared_with']]:.1f}",
                _ratio(ratio),
                f"{100 * share:.0f}" if (share := result.get("memory_share")) else "",
            ),
        )


def nodes_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """The same of a comparison of layouts."""
    for result in file["results"]:
        layout = f"{result['nodes']} × {result['threads']}"
        beside = f", {result['busy']} busy beside" if result["busy"] else ""
        ratios = result["ratio_to"]
        yield (
            (
                _machine(file),
                file["shape"],
                file["kernels"],
                layout,
                result["test"] + beside,
            ),
            (
                f"{result['median']:.1f}",
                *(_ratio(ratios[to]) for to in ("first_layout", "first_size", "alone")),
            ),
        )


def users_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """The same of several users at once."""
    for result in file["results"]:
        engine, server = result["engine"], result["server"]
        yield (
            (*_served(file), str(result["users"])),
            (
                f"{engine['output_throughput']:.1f}",
                f"{engine['to_one']['median']:.2f}",
                f"{server['output_throughput']:.1f}",
                _ratio(server["to_one"]),
                f"{result['ceiling']:.2f}",
                *(_percentiles(server, name) for name in ("ttft", "itl")),
            ),
        )


def arrival_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """The same of a long prompt that comes beside answers."""
    for result in file["results"]:
        yield (
            (*_served(file), str(file["prompt"]), result["way"]),
            (
                _percentiles(result, "itl"),
                f"{result['max_itl_ms']:.0f}",
                f"{result['p99_to_step']:.2f}",
                *(f"{result[f'ttft_{name}_ms']:.0f}" for name in ("before", "behind", "long")),
            ),
        )


def overhead_rows(file: Json) -> Iterator[tuple[Row, Row]]:
    """The same of what HTTP adds."""
    for name in ("ttft", "tpot"):
        yield (
            (*_served(file), name.upper()),
            (
                *(f"{file[way][f'p50_{name}_ms']:.3f}" for way in ("engine", "server")),
                f"{file[f'p50_added_{name}_ms']:.3f}",
                f"{file['allowed_ms']:.3f}",
            ),
        )


def _served(file: Json) -> Row:
    return _machine(file), file["model"], file["kernels"], f"1 × {file['threads']}"


def _percentiles(found: Json, name: str) -> str:
    return " / ".join(f"{found[f'p{p}_{name}_ms']:.0f}" for p in (50, 90, 99))


def _ratio(found: Json | None) -> str:
    """Nothing, where something would be compared with itself."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else ""


KINDS: dict[str, tuple[Row, Row, Callable[[Json], Iterator[tuple[Row, Row]]]]] = {
    "bench": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "test"),
        ("tokens/s", "GB/s", "% of memory read"),
        bench_rows,
    ),
    "llamacpp": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "test"),
        ("pyllama-dist, tokens/s", "llama.cpp", "ratio", "% of memory read"),
        llamacpp_rows,
    ),
    "nodes": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "test"),
        ("tokens/s", ": first layout", ": first size", ": alone"),
        nodes_rows,
    ),
    "users": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "users"),
        (
            *("engine, tokens/s", ": one user", "server, tokens/s", ": one user", "ceiling"),
            *("TTFT 50/90/99 %, ms", "ITL 50/90/99 %, ms"),
        ),
        users_rows,
    ),
    "arrival": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "long prompt", "asked"),
        (
            *("ITL 50/90/99 %, ms", "most, ms", "p99 : step"),
            *("TTFT of a short prompt, ms", "behind the long one", "of the long one"),
        ),
        arrival_rows,
    ),
    "overhead": (
        ("machine", "model, Q40", "kernels", "nodes × threads", "median"),
        ("engine, ms", "server, ms", "added, ms", "allowed, ms"),
        overhead_rows,
    ),
}


def tables(files: Sequence[Json]) -> str:
    """A table of each kind of which there are results, as GitHub's Markdown."""
    texts = []
    for kind, (about, found, rows) in KINDS.items():
        newest: dict[Row, Row] = {}
        for file in sorted(files, key=lambda file: datetime.fromisoformat(file["date"])):
            if file["kind"] == kind:
                newest |= dict(rows(file))
        if newest:
            lines = [about + found, ("---",) * len(about) + ("---:",) * len(found)]
            lines += [key + newest[key] for key in sorted(newest, key=in_order)]
            texts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(texts)


def in_order(key: Row) -> list[list[tuple[str, int]]]:
    """Sorts pp512 before pp4096: numbers in a text count as numbers."""
    return [
        [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", part)]
        for part in key
    ]


def read(path: Path) -> Json:
    """A file of results."""
    try:
        file: Json = json.loads(path.read_text())
        if file["kind"] not in KINDS:
            raise ValueError(f"kind {file['kind']!r}")
        tables([file])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: no results that this script knows: {error!r}") from None
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "bench" / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    before, start, rest = args.readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{args.readme}: put {START} and {END} where the tables belong")
    text = tables([read(path) for path in sorted(args.results.glob("*.json"))])
    args.readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()

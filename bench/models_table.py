"""Writes what models weigh into pyllama_dist/models/README.md, between two marker comments.

    python bench/models_table.py

Of each shape that `pyllama-dist bench` knows: its sizes, and the memory of the node that holds
most: weights, buffers, and keys and values of 4096 positions together.
"""

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path

from pyllama_dist.bench.shapes import SHAPES, config_of
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import ModelConfig
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.sizes import model_sizes

README = Path(__file__).parents[1] / "pyllama_dist" / "models" / "README.md"
START, END = "<!-- models -->", "<!-- /models -->"
SEQ_LEN = 4096
NODES = (1, 2, 4, 8)
SPARE = 1.0  # GB of each machine for its system, Python and the kernels
MACHINES = {  # GB
    4: "Pi 4 or 5, 4 GB",
    8: "Pi 5, 8 GB",
    16: "Pi 5, 16 GB",
    32: "32 GB",
    64: "64 GB",
    128: "128 GB",
    256: "256 GB",
    512: "512 GB",
}
CHOICES = 2  # of machines named for a model

HEADING = ("model", "parameters (active)", "Q40 file", "GB on 1 node", "each of 2", "each of 4")
HEADING += ("each of 8", "runs on")


def table() -> str:
    """GitHub's Markdown: small models first, in one row those that weigh the same."""
    names: dict[tuple[str, ...], list[str]] = {}
    configs = {shape: config_of(shape) for shape in SHAPES}
    sizes = {shape: model_sizes(config, tied=tied(shape)) for shape, config in configs.items()}
    for shape in sorted(SHAPES, key=lambda shape: sizes[shape].parameters):
        active = billions(sizes[shape].active_parameters)
        config = configs[shape]
        config = replace(config, max_seq_len=min(config.max_seq_len, SEQ_LEN))
        memory = {nodes: gigabytes(config, nodes) for nodes in NODES}
        cells = (
            f"{billions(sizes[shape].parameters)} ({active})",
            f"{sizes[shape].file_bytes / 1e9:.1f} GB",
            *(f"{gb:.1f}" for gb in memory.values()),
            "; ".join(machines(memory)),
        )
        names.setdefault(cells, []).append(shape)
    lines = [HEADING, ("---",) + ("---:",) * (len(HEADING) - 2) + ("---",)]
    lines += [(", ".join(shapes), *cells) for cells, shapes in names.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tied(shape: str) -> bool:
    return bool(SHAPES[shape].get("tie_word_embeddings"))


def billions(count: int) -> str:
    return f"{count / 1e9:.1f} B"


@cache
def gigabytes(config: ModelConfig, nodes: int) -> float:
    """Memory of the node that needs most."""
    return max(map(planned_bytes, programs(config, Cluster(local_workers=nodes - 1)))) / 1e9


def machines(memory: dict[int, float]) -> list[str]:
    """The smallest machines that will do, as few of them as will: a choice or two."""
    found: dict[int, int] = {}  # nodes, by size
    for size in MACHINES:
        nodes = next((n for n, gb in memory.items() if gb + SPARE <= size), None)
        if nodes is not None and nodes < min(found.values(), default=NODES[-1] + 1):
            found[size] = nodes
    return [f"{nodes} × {MACHINES[size]}" for size, nodes in list(found.items())[:CHOICES]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=README)
    args = parser.parse_args()
    before, start, rest = args.readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{args.readme}: put {START} and {END} where the table belongs")
    args.readme.write_text(f"{before}{START}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()

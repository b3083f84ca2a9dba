"""`pyllama-dist inspect`."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyllama_dist.cli.options import BUILTIN, option
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import find_model, read_json

if TYPE_CHECKING:
    from pyllama_dist.cluster import Cluster
    from pyllama_dist.config import ModelConfig


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@option(
    "--shape", help="Instead of MODEL: a known one, as glm-4.7-flash, of which nothing is here."
)
@option(
    "--nodes",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Show what each of so many nodes holds.",
)
@option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    help="Positions of the context. [default: the model's, at most 8192]",
)
@option(
    "--kv-cache-type",
    type=click.Choice(["f32", "f16", "q80"]),
    help="How keys and values are kept. [default: q80; f32 where the weights are]",
)
@option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: Path | None,
    shape: str | None,
    nodes: int,
    max_seq_len: int | None,
    kv_cache_type: str | None,
    list_tensors: bool,
    as_json: bool,
) -> None:
    """Show what is in MODEL, what it weighs, and what each node would hold of it.

    MODEL is a directory made by `convert`, a .m file, or a checkpoint's directory or config.json,
    whose weights need not be there: it is shown as it would be in Q40. Default: the built-in.
    Active parameters are those of the matrices that a token is multiplied with. The memory of a
    node is all that grows with the model; the embedding stays in the root's file.
    """
    from pyllama_dist.cluster import Cluster
    from pyllama_dist.config import FloatType

    if shape is not None and model is not None:
        raise UsageError("--shape and MODEL are two models; give one of them")
    subject = _from_path(model or BUILTIN) if shape is None else _from_shape(shape)
    cluster = Cluster(
        local_workers=nodes - 1,
        cache=FloatType[kv_cache_type.upper()] if kv_cache_type else None,
        max_seq_len=max_seq_len,
    )
    found = _found(subject, cluster)
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found, list_tensors)


@dataclass(frozen=True)
class _Subject:
    """What is looked at."""

    name: str
    config: "ModelConfig"
    size: int | None = None  # bytes of the .m file, if there is one
    tied: bool = False


def _from_shape(shape: str) -> _Subject:
    from pyllama_dist.bench.shapes import fields_of

    return _from_fields(shape, fields_of(shape))


def _from_path(path: Path) -> _Subject:
    from pyllama_dist.formats.dllama.model_file import ModelFile
    from pyllama_dist.models import ARCHITECTURES

    file = find_model(path)
    if path.is_dir() and not file.exists() and (path / "config.json").exists():
        file = path / "config.json"
    if file.suffix == ".json":
        return _from_fields(str(file), read_json(file))
    with ModelFile.open(file, ARCHITECTURES) as opened:
        return _Subject(str(file), opened.config, opened.size)


def _from_fields(name: str, fields: Mapping[str, object]) -> _Subject:
    """What `convert` would make of a `config.json`."""
    from pyllama_dist.config import FloatType
    from pyllama_dist.formats.dllama import header
    from pyllama_dist.formats.dllama.model_file import tensor_bytes
    from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS

    model_type = fields.get("model_type")
    known = next((each for kind, each in CHECKPOINTS.items() if kind == model_type), None)
    if known is None:
        raise FileError(
            f"{name}: model_type {model_type!r} is not supported, only {', '.join(CHECKPOINTS)}; "
            f"choose another checkpoint"
        )
    try:
        config = known.config_from_hf(fields, FloatType.Q40)
        header.encode(config)
    except (FileError, ValueError) as error:
        raise FileError(f"{name}: {error}") from None
    try:
        for tensor in ARCHITECTURES[config.arch].tensors(config):
            tensor_bytes(tensor)
    except ValueError as error:
        raise FileError(f"{name}: {error}; convert the checkpoint with --weights f32") from None
    return _Subject(name, config, tied=bool(fields.get("tie_word_embeddings")))


def _found(subject: _Subject, cluster: "Cluster") -> dict[str, Any]:
    """Everything, as it is printed with --json."""
    from pyllama_dist.formats.dllama.model_file import tensor_bytes
    from pyllama_dist.models import ARCHITECTURES
    from pyllama_dist.sizes import model_sizes, node_sizes

    config = subject.config
    sizes = model_sizes(config, cache=cluster.cache, tied=subject.tied)
    tensors = [
        {
            "name": tensor.name,
            "type": tensor.float_type.name.lower(),
            "shape": list(tensor.shape),
            "bytes": tensor_bytes(tensor),
        }
        for tensor in ARCHITECTURES[config.arch].tensors(config)
    ]
    by_type: Counter[str] = Counter()
    for tensor in tensors:
        by_type[str(tensor["type"])] += int(str(tensor["bytes"]))
    return {
        "path": subject.name,
        "bytes": subject.size,
        "config": asdict(config) | {"weights": config.weights.name.lower()},
        "sizes": asdict(sizes) | {"cache": sizes.cache.name.lower()},
        "nodes": [asdict(node) for node in node_sizes(config, cluster)],
        "bytes_by_type": by_type,
        "tensors": tensors,
    }


def _show(found: Mapping[str, Any], list_tensors: bool) -> None:
    """Prints tables."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console, sizes, nodes = Console(), found["sizes"], found["nodes"]
    table = Table(title=found["path"], show_header=False)
    for row in _flat(found["config"]):
        table.add_row(*row)
    table.add_section()
    table.add_row("parameters", f"{sizes['parameters']:,}")
    table.add_row("active parameters", f"{sizes['active_parameters']:,}")
    table.add_row("tensors", f"{len(found['tensors']):,}, {sizes['file_bytes']:,} bytes")
    for name, nbytes in found["bytes_by_type"].items():
        table.add_row(f"of which {name}", f"{nbytes:,} bytes")
    table.add_row("read of weights for each token", f"{sizes['token_bytes']:,} bytes")
    kept = f"{sizes['kept_values']:,} numbers, {sizes['kept_bytes']:,} bytes as {sizes['cache']}"
    table.add_row("kept for each position", kept)
    console.print(table)

    title = f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {nodes[0]['seq_len']} positions"
    parts = [key for key, (start, stop) in nodes[0]["shard"].items() if stop > start]
    amounts = {"weights": "weight_bytes", "cache": "cache_bytes", "in all": "memory_bytes"}
    table = Table("node", title=title, box=None, collapse_padding=True)
    for name in (*parts, *amounts):
        table.add_column(name, justify="right", no_wrap=True)
    for i, node in enumerate(nodes):
        cut = (f"{stop - start}" for start, stop in (node["shard"][part] for part in parts))
        held = (decimal(node[key]) for key in amounts.values())
        table.add_row(str(i), *cut, *held)
    console.print(table)
    if list_tensors:
        table = Table("tensor", "type", "shape", "bytes")
        for tensor in found["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            table.add_row(tensor["name"], tensor["type"], shape, f"{tensor['bytes']:,}")
        console.print(table)


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts of a configuration, those of its parts like experts.count."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", text) for name, text in _flat(value))
        elif isinstance(value, tuple):  # of an indexer: one for each layer
            yield key, f"{sum(value)} of {len(value)}"
        elif value is not None:
            yield key, str(value)

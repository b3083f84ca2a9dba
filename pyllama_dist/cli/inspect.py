"""`pyllama-dist inspect`."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import click

from pyllama_dist.cli.options import BUILTIN, option


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: Path | None, list_tensors: bool, as_json: bool) -> None:
    """Show what is in MODEL: a directory made by `convert`, or a .m file. Default: the built-in."""
    from pyllama_dist.formats.model_file import ModelFile, tensor_bytes
    from pyllama_dist.models import ARCHITECTURES

    path = model or BUILTIN
    path = path / "model.m" if path.is_dir() else path
    with ModelFile.open(path, ARCHITECTURES) as file:
        config, tensors, size = file.config, list(file.tensors.values()), file.size
    facts = {
        key: value.name.lower() if key == "weights" else value
        for key, value in dataclasses.asdict(config).items()
    }
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        sizes[tensor.float_type.name.lower()] += tensor_bytes(tensor)
    rows = [(t.name, t.float_type.name.lower(), list(t.shape), tensor_bytes(t)) for t in tensors]
    if as_json:
        found = {
            "path": str(path),
            "bytes": size,
            "config": facts,
            "bytes_by_type": sizes,
            "tensors": [
                dict(zip(("name", "type", "shape", "bytes"), row, strict=True)) for row in rows
            ],
        }
        click.echo(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=str(path), show_header=False)
    for key, value in facts.items():
        table.add_row(key, str(value))
    table.add_row("tensors", str(len(tensors)))
    table.add_row("size", f"{size:,} bytes")
    for name, nbytes in sizes.items():
        table.add_row(f"of which {name}", f"{nbytes:,} bytes")
    kv_bytes = 2 * 4 * config.n_layers * config.kv_dim
    table.add_row("cache for each position", f"{kv_bytes:,} bytes")
    console.print(table)
    if list_tensors:
        table = Table("tensor", "type", "shape", "bytes")
        for name, kind, shape, nbytes in rows:
            table.add_row(name, kind, " x ".join(map(str, shape)), f"{nbytes:,}")
        console.print(table)

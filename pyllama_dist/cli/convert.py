"""`pyllama-dist convert`."""

from pathlib import Path

import click

from pyllama_dist.cli.options import option, progress_bar
from pyllama_dist.config import FloatType


@click.command("convert")
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@option(
    "--weights",
    type=click.Choice(["q40", "q80", "f32"]),
    default="q40",
    show_default=True,
    help="Format of the matrices.",
)
def command(checkpoint_dir: Path, out_dir: Path, weights: str) -> None:
    """Make a model from a Hugging Face checkpoint.

    OUT_DIR will hold model.m, tokenizer.json, chat_template.jinja and generation_config.json.
    """
    from rich.filesize import decimal

    from pyllama_dist.formats.convert import convert
    from pyllama_dist.models import ARCHITECTURES

    with progress_bar("convert") as progress:
        report = convert(
            checkpoint_dir, out_dir, FloatType[weights.upper()], ARCHITECTURES, progress
        )
    for warning in report.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(
        f"{out_dir}: {report.config.arch}, {report.n_tensors} tensors, "
        f"{decimal(report.checkpoint_bytes)} became {decimal(report.model_bytes)} "
        f"({', '.join(report.files)})"
    )

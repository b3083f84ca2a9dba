"""`pyllama-dist convert`."""

from pathlib import Path

import click

from pyllama_dist.cli.options import option, progress_bar
from pyllama_dist.config import FloatType
from pyllama_dist.errors import UsageError


@click.command("convert")
@click.argument("checkpoint")
@click.argument("out_dir", type=click.Path(path_type=Path))
@option(
    "--weights",
    type=click.Choice(["q40", "q80", "f32"]),
    default="q40",
    show_default=True,
    help="Format of the matrices.",
)
@option("--revision", help="Branch, tag or commit of a repository. [default: main]")
def command(checkpoint: str, out_dir: Path, weights: str, revision: str | None) -> None:
    """Make a model from a Hugging Face checkpoint, or from a GGUF file.

    CHECKPOINT is a directory, a file, or OWNER/NAME: a repository to fetch first.
    OUT_DIR will hold model.m, tokenizer.json, tokenizer_config.json, chat_template.jinja and
    generation_config.json; those of an earlier conversion are moved aside.
    """
    from rich.filesize import decimal

    from pyllama_dist.formats.convert import convert
    from pyllama_dist.models import CHECKPOINTS

    source = _source(checkpoint, revision)
    with progress_bar("convert") as progress:
        report = convert(source, out_dir, FloatType[weights.upper()], CHECKPOINTS, progress)
    for warning in report.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(
        f"{out_dir}: {report.config.arch}, {report.n_tensors} tensors, "
        f"{decimal(report.checkpoint_bytes)} became {decimal(report.model_bytes)} "
        f"({', '.join(report.files)})"
    )


def _source(checkpoint: str, revision: str | None) -> Path:
    """Where the checkpoint lies, once it is fetched if need be."""
    from pyllama_dist.formats.huggingface.hub import fetch_checkpoint, is_repo_name

    if Path(checkpoint).exists() or not is_repo_name(checkpoint):
        if revision is not None:
            raise UsageError(f"{checkpoint}: --revision is for a repository; leave it out")
        return Path(checkpoint)
    click.echo(f"{checkpoint} is no directory here: fetching it from Hugging Face", err=True)
    with progress_bar("fetch") as progress:
        return fetch_checkpoint(checkpoint, revision or "main", progress).path

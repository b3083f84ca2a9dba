"""`pyllama-dist tokenize`."""

import json
from pathlib import Path

import click

from pyllama_dist.cli import options
from pyllama_dist.cli.options import BUILTIN, option, tokenizer_option
from pyllama_dist.errors import UsageError


@click.command("tokenize")
@option(
    "--model", type=click.Path(path_type=Path), help="Directory made by `convert`, or a .m file."
)
@tokenizer_option
@click.argument("text", type=options.text)
@option("--chat", is_flag=True, help="As the message of a user, in the model's template.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: Path | None, tokenizer: Path | None, text: str, chat: bool, as_json: bool
) -> None:
    """Show the tokens of TEXT: their ids and what each stands for."""
    from pyllama_dist.model_dir import ModelPaths

    paths = ModelPaths.find(model or BUILTIN, tokenizer)
    cutter, template = paths.text()
    if chat:
        if template is None:
            raise UsageError(f"{paths.tokenizer} has no chat template; leave out --chat")
        ids = cutter.encode_template(template.render([{"role": "user", "content": text}]))
    else:
        ids = cutter.encode(text)
    pieces = cutter.tokens(ids)
    if as_json:
        click.echo(json.dumps({"ids": ids, "pieces": pieces}))
        return
    for token, piece in zip(ids, pieces, strict=True):
        click.echo(f"{token:>8}  {piece}")

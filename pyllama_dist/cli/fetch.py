"""`pyllama-dist fetch`."""

import dataclasses
import json

import click

from pyllama_dist.cli.options import option, progress_bar


@click.command("fetch")
@click.argument("repo")
@option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@option("--file", "name", metavar="NAME", help="Only this file, such as one in GGUF.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(repo: str, revision: str, name: str | None, as_json: bool) -> None:
    """Fetch a checkpoint from Hugging Face, and print where it lies.

    REPO is OWNER/NAME. Only what `convert` needs is fetched, into the cache that the libraries of
    Hugging Face share.
    """
    from rich.filesize import decimal

    from pyllama_dist.formats.huggingface.hub import fetch_checkpoint, fetch_file

    with progress_bar("fetch") as progress:
        if name is None:
            fetched = fetch_checkpoint(repo, revision, progress)
        else:
            fetched = fetch_file(repo, name, revision, progress)
    if as_json:
        found = dataclasses.asdict(fetched) | {"repo": repo, "path": str(fetched.path)}
        found["bytes"] = found.pop("size")
        click.echo(json.dumps(found))
        return
    count = f"{len(fetched.files)} file{'s' if len(fetched.files) > 1 else ''}"
    click.echo(f"{repo}: commit {fetched.commit}, {count}, {decimal(fetched.size)}", err=True)
    click.echo(fetched.path)

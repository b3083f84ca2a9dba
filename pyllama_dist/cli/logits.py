"""`pyllama-dist logits`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from pyllama_dist.cli.options import (
    BUILTIN,
    SpaceSeparated,
    cluster_options,
    make_cluster,
    option,
    progress_bar,
)
from pyllama_dist.errors import UsageError
from pyllama_dist.files import find_model


@click.command("logits", cls=SpaceSeparated)
@cluster_options
@option("--tokens", required=True, metavar="ID,ID,...", help="The sequence.")
@option("--out", required=True, type=click.Path(path_type=Path), help="File to write, .npy.")
def command(model: Path | None, tokens: str, out: Path, **cluster_settings: Any) -> None:
    """Write the logits of a sequence of tokens: float32 [tokens, vocab], as NumPy's .npy."""
    import numpy as np

    from pyllama_dist.cluster import open_root
    from pyllama_dist.engine.engine import Engine
    from pyllama_dist.formats.atomic_write import atomic_write
    from pyllama_dist.formats.dllama.model_file import ModelFile
    from pyllama_dist.models import ARCHITECTURES

    cluster = make_cluster(**cluster_settings)
    with ExitStack() as stack:
        path = find_model(model or BUILTIN)
        file = stack.enter_context(ModelFile.open(path, ARCHITECTURES))
        ids = _ids(tokens, file.config.vocab_size)
        with progress_bar("weights") as progress:
            root = stack.enter_context(open_root(file, cluster, progress))
        logits = stack.enter_context(Engine(root)).logits(ids)
    try:
        with atomic_write(out) as target:
            header = np.lib.format.header_data_from_array_1_0(logits)
            np.lib.format.write_array_header_1_0(target, header)
            target.write(logits.data)  # np.save would not say why it cannot
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    click.echo(f"{out}: float32 {list(logits.shape)}")


def _ids(text: str, vocab_size: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or int(part) >= vocab_size]
    if wrong:
        raise UsageError(f"--tokens: {wrong[0]!r} is no token id from 0 to {vocab_size - 1}")
    return [int(part) for part in parts]

"""Options that several commands share. Each also reads its `PYLLAMA_DIST_...` variable."""

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from pyllama_dist.cluster import Cluster
from pyllama_dist.config import FloatType
from pyllama_dist.errors import UsageError
from pyllama_dist.net.collectives import ALGORITHMS, AUTO
from pyllama_dist.net.transport import Address
from pyllama_kernels.pages import KV_BLOCK

_F = TypeVar("_F", bound=Callable[..., Any])

BUILTIN = Path(__file__).parents[1] / "builtin"


def text(value: str) -> str:
    """The type of options that are text for a model: bytes that are no UTF-8 become U+FFFD.

    Python hands such bytes over as lone surrogates, which no tokenizer takes.
    """
    return os.fsencode(value).decode(errors="replace")


def option(flag: str, *names: str, **settings: Any) -> Callable[[_F], _F]:
    """A click option that also reads `PYLLAMA_DIST_<FLAG>`."""
    name = flag.partition("/")[0].removeprefix("--")  # of --think/--no-think the first
    variable = "PYLLAMA_DIST_" + name.replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, **settings)


class SpaceSeparated(click.Command):
    """A command whose `--workers` takes several values after one flag, as distributed-llama's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the flag before each value, which is how click wants it."""
        return super().parse_args(ctx, list(_repeat("--workers", args)))


def _repeat(flag: str, args: Sequence[str]) -> Iterator[str]:
    """Writes `--flag a b` as `--flag a --flag b`.

    >>> list(_repeat("--w", ["--w", "a", "b", "--n", "1"]))
    ['--w', 'a', '--w', 'b', '--n', '1']
    """
    taking = first = False
    for arg in args:
        if arg == flag:
            taking = first = True
        elif arg.startswith("-"):
            taking = False
        elif taking and not first:
            yield flag
        else:
            first = False
        yield arg


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes of `4G`, `512M` or `1000000`."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,15})([kMGT]?)i?B?", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size like 512M or 4G", ctx, param)
    return int(found[1]) << 10 * " kMGT".index(found[2] or " ")


def cluster_options(command: _F) -> _F:
    """The options that say which nodes run a model, and how."""
    for decorate in reversed(
        [
            option(
                "--model",
                type=click.Path(path_type=Path),
                help="Directory made by `convert`, or a .m file. [default: a small built-in model]",
            ),
            option(
                "--workers",
                multiple=True,
                metavar="HOST:PORT...",
                help="Workers on other machines.",
            ),
            option(
                "--local-workers",
                type=click.IntRange(0, 255),
                default=0,
                help="Workers to start on this machine, and to end with the root.",
            ),
            option(
                "--nthreads",
                type=click.IntRange(1, 1024),
                help="Threads of each node on this machine. [default: the cores, shared out]",
            ),
            option(
                "--buffer-float-type",
                type=click.Choice(["q80", "f32"]),
                default="q80",
                show_default=True,
                help="How partial sums travel between nodes.",
            ),
            option(
                "--collective",
                type=click.Choice([AUTO, *ALGORITHMS]),
                default=AUTO,
                show_default=True,
                help="How nodes add up partial sums. auto: by their number and what is sent.",
            ),
            option(
                "--kv-cache-type",
                type=click.Choice(["f32", "f16", "q80"]),
                help="How keys and values are kept. [default: q80; f32 where the weights are]",
            ),
            option(
                "--max-seq-len",
                type=click.IntRange(min=1),
                help="Positions of the context. [default: the model's, at most 8192]",
            ),
            option(
                "--kv-blocks",
                type=click.IntRange(min=1),
                help=f"Blocks of the KV cache, of {KV_BLOCK} positions, which all sequences share. "
                "[default: enough for one context]",
            ),
            option(
                "--kv-memory",
                callback=_bytes,
                metavar="SIZE",
                help="Instead of --kv-blocks: memory of the KV cache on all nodes, as 512M or 4G.",
            ),
            option(
                "--timeout",
                type=click.FloatRange(min=0.1, max=86400),
                default=60.0,
                show_default=True,
                help="Seconds that nodes wait for each other in a step.",
            ),
        ]
    ):
        command = decorate(command)
    return command


def tokenizer_option(command: _F) -> _F:
    """The option that says which tokenizer a model takes."""
    return option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="A .t file or tokenizer.json. [default: the one beside the model]",
    )(command)


def make_cluster(
    workers: Sequence[str],
    local_workers: int,
    nthreads: int | None,
    buffer_float_type: str,
    collective: str,
    kv_cache_type: str | None,
    max_seq_len: int | None,
    kv_blocks: int | None,
    kv_memory: int | None,
    timeout: float,
) -> Cluster:
    """The cluster that `cluster_options` describe.

    Raises:
        UsageError: a worker's address is none.
    """
    addresses = tuple(Address.parse(worker) for worker in workers)
    twice = [str(address) for address in addresses if addresses.count(address) > 1]
    if twice:
        raise UsageError(f"--workers names {twice[0]} twice; a worker is one node")
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout {timeout} is no number of seconds")
    if kv_blocks is not None and kv_memory is not None:
        raise UsageError("--kv-blocks and --kv-memory both size the KV cache; give one of them")
    return Cluster(
        workers=addresses,
        local_workers=local_workers,
        n_threads=nthreads,
        sync=FloatType[buffer_float_type.upper()],
        cache=FloatType[kv_cache_type.upper()] if kv_cache_type else None,
        max_seq_len=max_seq_len,
        kv_blocks=kv_blocks,
        kv_memory=kv_memory,
        timeout=timeout,
        collective=collective,
        notice=lambda text: click.echo(text, err=True),
    )


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; it is told bytes done so far and bytes in all."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=None)

    def progress(done: int, total: int) -> None:
        bar.start()  # only now: what comes before may have something to say
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        bar.stop()

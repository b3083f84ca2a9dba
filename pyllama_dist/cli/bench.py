"""`pyllama-dist bench`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from pyllama_dist.bench.measure import Test
    from pyllama_dist.bench.random_model import RandomModel
    from pyllama_dist.formats.dllama.model_file import ModelFile

_SHORT = {"-m": "--model", "-t": "--nthreads"}


class _LlamaBench(SpaceSeparated):
    """A command that knows llama-bench's short names of the options that all commands share."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Writes them out."""
        return super().parse_args(ctx, [_SHORT.get(arg, arg) for arg in args])


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """The numbers of `512,1024`."""
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of numbers like 512,1024", ctx, param)
    return [int(part) for part in parts]


_LIST: dict[str, Any] = {"callback": _sizes, "metavar": "N,N,...", "show_default": True}


@click.command("bench", cls=_LlamaBench)
@cluster_options
@option("--shape", help="Instead of --model: random weights, in the shape of glm-edge-1.5b, ...")
@option("--layers", type=click.IntRange(min=1), help="With --shape: its first N layers only.")
@option("--n-prompt", "-p", default="512", **_LIST, help="Tokens of prompts; 0: none.")
@option("--n-gen", "-n", default="128", **_LIST, help="Tokens of answers; 0: none.")
@option("--n-depth", "-d", default="0", **_LIST, help="Positions in the cache before.")
@option("--users", "-b", default="1", **_LIST, help="Who do the same at once.")
@option("--repetitions", "-r", type=click.IntRange(min=1), default=5, show_default=True)
@option("--output", "-o", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True)
def command(
    model: Path | None,
    shape: str | None,
    layers: int | None,
    n_prompt: list[int],
    n_gen: list[int],
    n_depth: list[int],
    users: list[int],
    repetitions: int,
    output: str,
    **cluster_settings: Any,
) -> None:
    """Measure what a model does on these machines, in llama-bench's words.

    pp512 is a prompt of 512 tokens, read in batches; tg128 is 128 tokens, one after the other, the
    most likely one next; "x 8" says that 8 users do it at once, each with a text of their own: t/s
    is that of all, beside it that of each; "@ d4096" says how many positions the cache held before.
    t/s is the mean of the repetitions ± their standard deviation, after a warm-up that does not
    count. GB/s is what the nodes of this machine read of the matrices, and its share of what as
    many threads read from memory right after each repetition; of experts, those count that are
    chosen for one token. Milliseconds of computing and of exchanging (waiting for others included)
    and kB of the exchanges are those of each node, for each token, the root first. -m and -t are
    short for --model and --nthreads; an unknown --shape is answered with those that there are. Of a
    shape too large for these machines --layers takes a part, from which the rest can be worked out.
    """
    from datetime import UTC, datetime

    from pyllama_dist.bench import machine, report
    from pyllama_dist.bench.measure import blocks_of, check_fits, measure, plan_tests
    from pyllama_dist.bench.session import open_session
    from pyllama_dist.cluster import MAX_SEQS
    from pyllama_dist.memory_use import resident_bytes

    if shape is not None and model is not None:
        raise UsageError("--shape and --model are two models; give one of them")
    if layers is not None and shape is None:
        raise UsageError("--layers cuts a shape; give one with --shape")
    tests = plan_tests(n_prompt, n_gen, n_depth, users)
    if not tests:
        raise UsageError("nothing to measure: -p or -n, and -b, must be more than 0")
    if max(users) > MAX_SEQS:
        raise UsageError(f"-b {max(users)}: {MAX_SEQS} sequences run at once, no more")
    cluster = make_cluster(**cluster_settings)
    seq_len = cluster.max_seq_len or max(test.positions for test in tests)
    cluster = replace(cluster, max_seq_len=seq_len)
    if cluster.kv_blocks is None and cluster.kv_memory is None:
        cluster = replace(cluster, kv_blocks=max(map(blocks_of, tests)))
    before = machine.load_average()
    with ExitStack() as stack:
        name, source = stack.enter_context(_source(model, shape, layers))
        for test in tests:
            check_fits(test, min(seq_len, source.config.max_seq_len))
        with progress_bar("weights") as progress:
            session = stack.enter_context(open_session(name, source, cluster, progress))
        threads = session.setting.threads * session.setting.nodes_here
        peak = [resident_bytes(peak=True)]  # before the buffer of the next line
        with (
            machine.memory_reader(threads) as reader,
            _test_bar(len(tests) * (1 + repetitions)) as starting,
        ):
            results = measure(session.bench, tests, repetitions, reader.bytes_per_second, starting)
        peak[0] = max(peak[0], resident_bytes())
        peak += session.bench.peak_bytes()
    found = report.Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=session.model,
        setting=session.setting,
        results=results,
        traffic={test: session.traffic(test) for test in tests},
        bytes_here=session.bytes_here,
        peak_bytes=peak,
        machine=machine.facts(),
        versions=machine.versions(),
        load={"before": before, "after": machine.load_average()},
    )
    write = {"md": report.as_markdown, "json": report.as_json, "csv": report.as_csv}[output]
    click.echo(write(found).rstrip("\n"))


@contextmanager
def _source(
    model: Path | None, shape: str | None, layers: int | None
) -> Iterator[tuple[str, "ModelFile | RandomModel"]]:
    """What is to be measured, and its name."""
    from pyllama_dist.bench.random_model import RandomModel
    from pyllama_dist.bench.shapes import config_of, with_layers
    from pyllama_dist.formats.dllama.model_file import ModelFile
    from pyllama_dist.models import ARCHITECTURES

    if shape is not None:
        config = config_of(shape)
        if layers is None:
            yield shape, RandomModel(config)
        else:
            name = f"{shape} ({layers} of {config.n_layers} layers)"
            yield name, RandomModel(with_layers(config, layers))
        return
    path = find_model(model or BUILTIN).resolve()
    with ModelFile.open(path, ARCHITECTURES) as file:
        yield path.parent.name if path.name == "model.m" else path.stem, file


@contextmanager
def _test_bar(runs: int) -> Iterator[Callable[["Test", int], None]]:
    """A bar on a terminal, nothing elsewhere; it is told what starts."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=runs)
    started = 0

    def starting(test: "Test", run: int) -> None:
        nonlocal started
        what = f"{test.name}, run {run}" if run else f"{test.name}, warm-up"
        bar.update(task, completed=started, description=what)
        started += 1

    with bar:
        yield starting

"""Sixteen sequences at once, against each of them alone: `python bench/crowd.py --schedules 200`.

On real nodes over ZeroMQ. In each schedule sequences arrive, are cancelled and end as a seed will
have it; each one's tokens must be those that it gets alone, greedily and with a seed of its own.
"""

import random
import threading
import time
from contextlib import ExitStack

import click

from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.cluster import Cluster, open_root
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sampler import Sampler, Sampling
from pyllama_dist.engine.sequence import Request
from pyllama_dist.engine.stream import Stream
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES

SEQUENCES = 16


def read(stream: Stream, most: int | None, found: list[int]) -> None:
    for token in stream:
        found.append(token)
        if len(found) == most:
            stream.cancel()


def run(engine: Engine, vocab: int, seed: int) -> tuple[int, int]:
    """One schedule; how many sequences differ, and how many tokens came."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(vocab) for _ in range(200)] for _ in range(2)]
    asked, results, threads = [], [], []
    for number in range(SEQUENCES):
        shared = rng.choice(beginnings)[: rng.randrange(200)]
        prompt = [*shared, *(rng.randrange(vocab) for _ in range(rng.randrange(1, 40)))]
        sampling = Sampling(rng.choice([0, 0.9]), 0.9, seed=number)
        asked.append((prompt, sampling, rng.randrange(1, 40)))
        stream = engine.submit(Request(prompt, Sampler(sampling, vocab), max_tokens=asked[-1][2]))
        results.append([])
        most = rng.choice([None, None, rng.randrange(1, 10)])
        threads.append(threading.Thread(target=read, args=(stream, most, results[-1])))
        threads[-1].start()
        time.sleep(rng.choice([0, 0, 0.005, 0.02]))
    for thread in threads:
        thread.join()
    wrong = 0
    for (prompt, sampling, count), found in zip(asked, results, strict=True):
        alone = list(engine.submit(Request(prompt, Sampler(sampling, vocab), max_tokens=count)))
        wrong += not found or found != alone[: len(found)]
    return wrong, sum(map(len, results))


@click.command()
@click.option("--schedules", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the first schedule.")
@click.option("--nodes", default=3, show_default=True)
@click.option("--kv-blocks", default=12, show_default=True)
def main(schedules: int, seed: int, nodes: int, kv_blocks: int) -> None:
    """Compares sequences in a crowd with the same sequences alone."""
    cluster = Cluster(local_workers=nodes - 1, n_threads=1, max_seq_len=256, kv_blocks=kv_blocks)
    with ExitStack() as stack:
        model = stack.enter_context(ModelFile.open(BUILTIN / "model.m", ARCHITECTURES))
        root = stack.enter_context(open_root(model, cluster, lambda done, total: None))
        engine = stack.enter_context(Engine(root))
        wrong = tokens = 0
        for schedule in range(seed, seed + schedules):
            differ, came = run(engine, model.config.vocab_size, schedule)
            wrong, tokens = wrong + differ, tokens + came
            if differ:
                click.echo(f"schedule {schedule}: {differ} sequences differ")
    click.echo(f"{schedules} schedules, {tokens} tokens, {wrong} sequences differ")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()

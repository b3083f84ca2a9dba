"""Brings up what is to be measured: a model or a shape, on a cluster."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyllama_dist.bench.measure import Bench, matrix_bytes
from pyllama_dist.bench.random_model import RandomModel
from pyllama_dist.bench.report import Model, Setting
from pyllama_dist.cluster import Cluster, open_root, programs
from pyllama_dist.executor import kernels
from pyllama_dist.formats.model_file import ModelFile


@dataclass(frozen=True)
class Session:
    """A cluster that is ready, and what it is."""

    bench: Bench
    model: Model
    setting: Setting
    bytes_here: int  # of the matrices: what the nodes on this machine read for each token


@contextmanager
def open_session(
    name: str,
    source: ModelFile | RandomModel,
    cluster: Cluster,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Session]:
    """A root whose workers are ready to be measured; everything ends with the context.

    Args:
        name: what reports call the model.
        source: its weights.
        cluster: the nodes.
        progress: told the bytes of weights placed so far and those of all nodes together.

    Raises:
        UsageError: the model cannot be cut like that, or does not fit this machine.
        NodeError: a worker cannot be reached, refuses, or is lost.
    """
    config = source.config
    sizes = [matrix_bytes(program) for program in programs(config, cluster)]
    # Workers of this machine come right after the root.
    here = 1 + cluster.local_workers + sum(worker.is_loopback for worker in cluster.workers)
    with open_root(source, cluster, progress) as root:
        program = root.node.program
        matrices = (t for t in source.tensors.values() if len(t.shape) > 1)
        yield Session(
            Bench(root, config.vocab_size),
            Model(
                model=name,
                arch=config.arch,
                weights=config.weights.name.lower(),
                parameters=sum(
                    math.prod(t.shape) for t in matrices if t.name != "embed_tokens.weight"
                ),
                matrix_bytes=sum(sizes),
            ),
            Setting(
                kernels=kernels(),
                nodes=len(sizes),
                nodes_here=here,
                threads=cluster.threads,
                sync=cluster.sync.name.lower(),
                seq_len=program.seq_len,
                max_rows=program.max_rows,
            ),
            bytes_here=sum(sizes[:here]),
        )

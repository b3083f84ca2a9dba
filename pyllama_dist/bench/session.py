"""Brings up the model or shape to be measured, on a cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pyllama_dist.bench.measure import Bench, Test, batches, matrix_bytes
from pyllama_dist.bench.random_model import RandomModel
from pyllama_dist.bench.report import ModelFacts, Setting
from pyllama_dist.bench.traffic import Traffic, traffic
from pyllama_dist.cluster import Cluster, open_root, programs
from pyllama_dist.engine.engine import Engine
from pyllama_dist.executor import kernels
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.program import Program
from pyllama_dist.sizes import model_sizes


@dataclass(frozen=True)
class BenchSession:
    """A cluster that is ready, and what it is."""

    bench: Bench
    model: ModelFacts
    setting: Setting
    bytes_here: int  # of the matrices: what the nodes on this machine read for each token
    programs: Sequence[Program]  # one for each node, the root's first

    def traffic(self, test: Test) -> list[Traffic]:
        """What each node sends and receives in one run of a test."""
        return traffic(self.programs, batches(test, self.programs[0]), self.setting.collective)


@contextmanager
def open_session(
    name: str,
    source: ModelFile | RandomModel,
    cluster: Cluster,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[BenchSession]:
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
    made = programs(config, cluster)
    sizes = list(map(matrix_bytes, made))
    # Workers of this machine come right after the root.
    here = 1 + cluster.local_workers + sum(worker.is_loopback for worker in cluster.workers)
    with open_root(source, cluster, progress) as root, Engine(root) as engine:
        program = root.node.program
        yield BenchSession(
            Bench(engine),
            ModelFacts(
                model=name,
                arch=config.arch,
                weights=config.weights.name.lower(),
                parameters=model_sizes(config).active_parameters,
                matrix_bytes=sum(sizes),
            ),
            Setting(
                kernels=kernels(),
                nodes=len(sizes),
                nodes_here=here,
                threads=cluster.threads,
                sync=cluster.sync.name.lower(),
                collective=cluster.collective,
                seq_len=program.seq_len,
                max_rows=program.max_rows,
            ),
            bytes_here=sum(sizes[:here]),
            programs=made,
        )

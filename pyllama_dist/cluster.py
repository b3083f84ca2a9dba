"""Brings up a root with its workers, here or elsewhere, and takes everything down again."""

import logging
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Protocol

from pyllama_dist.config import FloatType, ModelConfig
from pyllama_dist.cores import available_cores, cpus_of_nodes, keep, kept_to
from pyllama_dist.errors import NodeError, UsageError
from pyllama_dist.executor import prepare
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.memory_use import memory_here
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.models.plan import Plan, shares
from pyllama_dist.net.transport import Address, Dialer
from pyllama_dist.partition import max_nodes
from pyllama_dist.program import Program, weights
from pyllama_dist.root import Root, WeightSource

log = logging.getLogger("pyllama_dist")

MAX_NODES = 256
MAX_ROWS = 256  # rows of a batch while a prompt is read: each weight is fetched once for all
MAX_LOGITS = 8  # rows of a batch whose logits can be asked for
DEFAULT_SEQ_LEN = 8192  # the cache of a longer context is taken only when asked for

_START_SECONDS = 120.0  # for a worker on this machine; compiling kernels comes before
_END_SECONDS = 3.0


class Model(WeightSource, Protocol):
    """Weights and what they belong to: a `.m` file."""

    @property
    def config(self) -> ModelConfig:
        """What the file's header says."""


@dataclass(frozen=True)
class Cluster:
    """What a user asks for."""

    workers: tuple[Address, ...] = ()
    local_workers: int = 0
    n_threads: int | None = None  # of each node on this machine; None: share out the cores
    sync: FloatType = FloatType.Q80
    cache: FloatType | None = None  # of keys and values; None: what suits the model
    max_seq_len: int | None = None
    timeout: float = 60.0
    notice: Callable[[str], None] = field(default=lambda text: None)

    @property
    def n_nodes(self) -> int:
        """Root and workers."""
        return 1 + len(self.workers) + self.local_workers

    @property
    def threads(self) -> int:
        """Threads of each node on this machine."""
        return self.n_threads or max(1, available_cores() // (1 + self.local_workers))


def programs(config: ModelConfig, cluster: Cluster) -> list[Program]:
    """The program of each node.

    Raises:
        UsageError: the model cannot be cut for so many nodes, or not be synchronised in Q80.
    """
    most, n = max_nodes(config.n_heads, config.value_dim, config.weights.block), cluster.n_nodes
    if n > min(most, MAX_NODES):
        raise UsageError(
            f"{n} nodes, and this model has query heads for at most {most}; use fewer workers "
            f"({MAX_NODES - 1} at most)"
        )
    if cluster.sync is FloatType.Q80 and n > 1 and config.dim % 32:
        raise UsageError(
            f"a model of dim {config.dim} has no whole Q80 blocks; add --buffer-float-type f32"
        )
    if cluster.cache is FloatType.Q80 and _odd(config):
        raise UsageError(
            f"heads of {_odd(config)[0]} values are no whole Q80 blocks; use --kv-cache-type f16"
        )
    seq_len = min(config.max_seq_len, cluster.max_seq_len or DEFAULT_SEQ_LEN)
    plan = Plan(
        shares(config, n),
        sync=cluster.sync,
        cache=_cache_type(config) if cluster.cache is None else cluster.cache,
        max_rows=MAX_ROWS,
        max_logits=MAX_LOGITS,
        n_slots=1,
        seq_len=seq_len,
    )
    return [ARCHITECTURES[config.arch].build(config, plan, node) for node in range(n)]


def _cache_type(config: ModelConfig) -> FloatType:
    """How keys and values are kept if nobody says: as activations are, where heads allow it."""
    if config.weights is FloatType.F32:
        return FloatType.F32
    return FloatType.F16 if _odd(config) else FloatType.Q80


def _odd(config: ModelConfig) -> list[int]:
    """Widths of what is kept that are no whole blocks of Q80."""
    widths = [config.head_dim]
    if config.latent:
        widths = [config.latent.kv_rank, config.latent.rope_dim]
    if config.indexer:
        widths.append(config.indexer.head_dim)
    return [width for width in widths if width % FloatType.Q80.block]


@contextmanager
def open_root(
    model: Model, cluster: Cluster, progress: Callable[[int, int], None]
) -> Iterator[Root]:
    """A root whose workers are ready; at the end everything that was started is ended.

    Args:
        model: a model file, or another source of weights that knows its configuration.
        cluster: the nodes.
        progress: told the bytes of weights placed so far and those of all nodes together.

    Raises:
        UsageError: the model cannot be cut like that, or does not fit this machine.
        NodeError: a worker cannot be reached, refuses, or is lost.
    """
    plans = programs(model.config, cluster)
    here = plans[: 1 + cluster.local_workers]
    needed, available = sum(map(planned_bytes, here)), memory_here().available
    if needed > available:
        raise UsageError(
            f"the nodes on this machine need {needed / 1e9:.2f} GB, {available / 1e9:.2f} GB are "
            f"available; use workers on other machines, or a lower --max-seq-len"
        )
    total = sum(weight.nbytes for program in plans for weight in weights(program))
    n_threads = cluster.threads
    placed = 0

    def count(nbytes: int) -> None:
        nonlocal placed
        placed += nbytes
        progress(placed, total)

    prepare(cluster.notice)
    with ExitStack() as stack:
        own, *others = cpus_of_nodes(1 + cluster.local_workers, n_threads)
        local = stack.enter_context(_local_workers(others, n_threads))
        dialer = stack.enter_context(_dialer()) if cluster.n_nodes > 1 else None
        with kept_to(own):  # as ZeroMQ's thread is from here on, which starts with the first socket
            root = Root(
                model,
                plans,
                n_threads=n_threads,
                cpu=own,
                timeout=cluster.timeout,
                dialer=dialer,
                # Lower nodes connect to higher ones: those on this machine reach the others.
                workers=sorted((*local, *cluster.workers), key=lambda a: not a.is_loopback),
                progress=count,
            )
        yield stack.enter_context(root)


@contextmanager
def _dialer() -> Iterator[Dialer]:
    from pyllama_dist.net.zeromq import ZmqDialer

    dialer = ZmqDialer()
    try:
        yield dialer
    finally:
        dialer.close()


@contextmanager
def _local_workers(cpus: Sequence[int | None], n_threads: int) -> Iterator[Sequence[Address]]:
    """Workers on this machine, in processes of their own, each on a free port of the loopback.

    Args:
        cpus: for each worker the CPU that it keeps to; None: any.
        n_threads: threads of each.
    """
    with ExitStack() as stack:
        started = [stack.enter_context(_local_worker(cpu, n_threads)) for cpu in cpus]
        yield [_address(process, errors) for process, errors in started]


@contextmanager
def _local_worker(
    cpu: int | None, n_threads: int
) -> Iterator[tuple["subprocess.Popen[str]", IO[str]]]:
    """One worker. It ends when its standard input closes: also if this process is killed."""
    command = [sys.executable, "-m", "pyllama_dist", "worker", "--attached"]
    command += ["--host", "127.0.0.1", "--port", "0", "--nthreads", str(n_threads)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # ^C is for the root, which then ends its workers
        )
        keep(process.pid, cpu)
        try:
            yield process, errors
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: "subprocess.Popen[str]", errors: IO[str]) -> Address:
    """Where a worker listens: the first line that it prints."""
    if process.stdout is None:
        raise TypeError("a worker without a pipe")
    ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line.strip().isdecimal():
        errors.seek(0)
        said = errors.read().strip().splitlines()
        raise NodeError(f"a local worker did not start: {said[-1] if said else 'it said nothing'}")
    return Address("127.0.0.1", int(line))

"""Connect, plan, load: from addresses to a root whose nodes are ready."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import numpy as np

from pyllama_dist.cluster.connect import connect
from pyllama_dist.cluster.load import Progress, WeightSource, load
from pyllama_dist.cluster.local_workers import local_workers
from pyllama_dist.cluster.plan import Cluster, check_request, plan
from pyllama_dist.config import ModelConfig
from pyllama_dist.cores import cpus_of_nodes, kept_to
from pyllama_dist.executor import make_executor, prepare
from pyllama_dist.net.collectives import AUTO
from pyllama_dist.net.messages import NodeInfo, Phase
from pyllama_dist.net.transport import ROOT, Address, Dialer
from pyllama_dist.node import Node
from pyllama_dist.node_info import node_info
from pyllama_dist.program import Program
from pyllama_dist.root import Root
from pyllama_dist.validate import check_program
from pyllama_dist.workers import Workers

Planner = Callable[[Mapping[str, NodeInfo]], Sequence[Program]]


class ModelSource(WeightSource, Protocol):
    """A model's weights and configuration: a `.m` file."""

    @property
    def config(self) -> ModelConfig:
        """What the file's header says."""


def bring_up(
    source: WeightSource,
    planner: Planner,
    *,
    n_threads: int,
    cpu: int | None = None,
    timeout: float = 60.0,
    collective: str = AUTO,
    dialer: Dialer | None = None,
    workers: Sequence[Address] = (),
    progress: Progress = lambda done, total: None,
) -> Root:
    """A root whose nodes are ready. If it fails, nothing is left, and it can be tried again.

    Args:
        source: the model file.
        planner: makes the programs, the root's first, from what all nodes have, by name.
        n_threads: threads of this node.
        cpu: the CPU that its steps keep to; None: any.
        timeout: seconds that each round of an exchange may take.
        collective: how sums travel.
        dialer: how workers are reached; None if there are none.
        workers: their addresses, in the order of nodes.
        progress: told the bytes of weights placed so far and those of all nodes together.

    Raises:
        UsageError: the planner cannot do what was asked for.
        NodeError: a worker cannot be reached, refuses, or is lost; with address and phase.
    """
    with ExitStack() as undo:
        session = undo.enter_context(Workers())
        with session.blaming():
            nodes = {ROOT: node_info(n_threads)}
            if workers:
                if dialer is None:
                    raise TypeError("workers without a dialer")
                nodes |= connect(session, dialer, workers)
            programs = planner(nodes)
            check_program(programs[0])  # our own: compiled ops trust whatever they get
            executor = undo.enter_context(make_executor(programs[0], n_threads))
            load(session, executor, source, programs, timeout, collective, progress)
        session.phase = Phase.READY
        node = Node(programs[0], executor, session.mesh, timeout, collective)
        embedding = source.raw("embed_tokens.weight").view(np.float32)  # mapped, not read
        root = Root(node, session, embedding, cpu)
        undo.pop_all()  # from here on the root closes them
        return root


@contextmanager
def open_root(model: ModelSource, cluster: Cluster, progress: Progress) -> Iterator[Root]:
    """A root whose workers are ready; at the end everything that was started is ended.

    Args:
        model: a model file, or another source of weights that knows its configuration.
        cluster: the nodes.
        progress: told the bytes of weights placed so far and those of all nodes together.

    Raises:
        UsageError: the model cannot be cut like that.
        NodeError: a worker cannot be reached, refuses, or is lost, or a node lacks memory.
    """
    check_request(model.config, cluster)
    n_threads = cluster.threads
    prepare(cluster.notice)
    with ExitStack() as stack:
        own, *others = cpus_of_nodes(1 + cluster.local_workers, n_threads)
        local = stack.enter_context(local_workers(others, n_threads))
        dialer = stack.enter_context(_dialer()) if cluster.n_nodes > 1 else None
        with kept_to(own):  # as ZeroMQ's thread is from here on, which starts with the first socket
            root = bring_up(
                model,
                partial(plan, model.config, cluster),
                n_threads=n_threads,
                cpu=own,
                timeout=cluster.timeout,
                collective=cluster.collective,
                dialer=dialer,
                # Lower nodes connect to higher ones: those on this machine reach the others.
                workers=sorted((*local, *cluster.workers), key=lambda a: not a.is_loopback),
                progress=progress,
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

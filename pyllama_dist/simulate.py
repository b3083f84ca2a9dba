"""A whole cluster within one process: workers are threads, the network is a queue.

For tests, and to step through all nodes of a step with one debugger.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from pyllama_dist.cluster.bring_up import bring_up
from pyllama_dist.cluster.load import WeightSource
from pyllama_dist.net.collectives import AUTO
from pyllama_dist.net.inproc import Hub, InprocListener
from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.program import Program
from pyllama_dist.root import Root
from pyllama_dist.worker import serve


@contextmanager
def simulated_root(
    source: WeightSource,
    programs: Sequence[Program],
    n_threads: int = 1,
    timeout: float = 10.0,
    collective: str = AUTO,
) -> Iterator[Root]:
    """A root with a worker thread for each further program; all end with the context.

    Args:
        source: the model file.
        programs: one for each node, the root's first.
        n_threads: threads of each node.
        timeout: seconds that each round of an exchange may take.
        collective: how sums travel.
    """
    hub = Hub()
    listeners = [hub.listen() for _ in programs[1:]]
    threads = [
        threading.Thread(target=_serve, args=(listener, n_threads), name=f"worker-{i}", daemon=True)
        for i, listener in enumerate(listeners, start=1)
    ]
    for thread in threads:
        thread.start()
    try:
        with bring_up(
            source,
            lambda nodes: programs,
            n_threads=n_threads,
            timeout=timeout,
            collective=collective,
            dialer=hub,
            workers=[Address("inproc", listener.port) for listener in listeners],
        ) as root:
            yield root
    finally:
        for listener in listeners:
            listener.close()
        for thread in threads:
            thread.join(timeout)


def _serve(listener: InprocListener, n_threads: int) -> None:
    with suppress(LostError):  # the listener was closed
        serve(listener, n_threads)

"""Every node sends its partial sums to every other one, and each adds all of them up.

One round, so the least latency. With n nodes and B bytes of partial sums each node

- sends n - 1 messages, (n - 1) B bytes;
- receives as many.

The sum is no part of it: it is the first op of the next segment, by all threads.
"""

from collections.abc import Iterator

from pyllama_dist.net.collectives.schedule import Action, Cost, Part, Round, others


def schedule(node: int, n_nodes: int, rows: int) -> Iterator[Action]:
    """All regions, as they are."""
    yield Round(
        {other: (Part(node, 0, rows),) for other in others(node, n_nodes)},
        {other: (Part(other, 0, rows),) for other in others(node, n_nodes)},
    )


def cost(node: int, n_nodes: int, rows: int) -> Cost:
    """The same for every node."""
    return Cost(1, n_nodes - 1, n_nodes - 1, (n_nodes - 1) * rows, (n_nodes - 1) * rows)

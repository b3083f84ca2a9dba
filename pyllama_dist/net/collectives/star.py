"""All send their partial sums to the root, which adds them up and sends the sum to all.

Two rounds, and the fewest messages of all: 2 (n - 1) together, where `direct` has n (n - 1). All
bytes go through the root. With n nodes and B bytes of partial sums

- the root receives n - 1 messages, (n - 1) B bytes, then sends as many;
- a worker sends one message, B bytes, then receives one.
"""

from collections.abc import Iterator

from pyllama_dist.net.collectives.schedule import Action, Cost, Part, Reduce, Round, others
from pyllama_dist.program import REDUCED


def schedule(node: int, n_nodes: int, rows: int) -> Iterator[Action]:
    """Up, sum, down."""
    whole = (Part(REDUCED, 0, rows),)
    if node:
        yield Round({0: (Part(node, 0, rows),)}, {})
        yield Round({}, {0: whole})
    else:
        yield Round({}, {other: (Part(other, 0, rows),) for other in others(0, n_nodes)})
        yield Reduce(0, rows)
        yield Round(dict.fromkeys(others(0, n_nodes), whole), {})


def cost(node: int, n_nodes: int, rows: int) -> Cost:
    """The root's is that of all workers together."""
    peers = 1 if node else n_nodes - 1
    return Cost(2, peers, peers, peers * rows, peers * rows)

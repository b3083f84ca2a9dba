"""Each node sums its part of the rows and sends that sum to all others.

A reduce-scatter by rows, then an all-gather by rows: two rounds, and the fewest bytes for the node
that has the most. With n nodes and B bytes of partial sums, of which node i sums b(i), about B / n,
it

- sends n - 1 messages of together B - b(i), then n - 1 messages of b(i): about 2 B (n - 1) / n;
- receives n - 1 messages of b(i), then n - 1 of together B - b(i): as many bytes.

That is n / 2 times less than `direct`. Where there are fewer rows than nodes, the last nodes sum
nothing, and have no messages for that.

Source: Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH,
2005; here every node sends its rows straight to where they are summed, not by recursive halving, so
that they are added in the order of the nodes.
"""

from collections.abc import Iterator

from pyllama_dist.net.collectives.schedule import Action, Cost, Part, Reduce, Round, others
from pyllama_dist.partition import cut
from pyllama_dist.program import REDUCED


def schedule(node: int, n_nodes: int, rows: int) -> Iterator[Action]:
    """Rows to where they are summed; then their sums to all."""
    spans = cut(rows, n_nodes)
    own = spans[node]
    summing = [other for other in others(node, n_nodes) if spans[other][0] < spans[other][1]]
    all_others = others(node, n_nodes) if own[0] < own[1] else []
    yield Round(
        {other: (Part(node, *spans[other]),) for other in summing},
        {other: (Part(other, *own),) for other in all_others},
    )
    yield Reduce(*own)
    yield Round(
        {other: (Part(REDUCED, *own),) for other in all_others},
        {other: (Part(REDUCED, *spans[other]),) for other in summing},
    )


def cost(node: int, n_nodes: int, rows: int) -> Cost:
    """Twice what it does not sum, and what it sums to and from all others."""
    start, stop = cut(rows, n_nodes)[node]
    own, sums = stop - start, int(start < stop)
    messages = min(rows, n_nodes) - sums + sums * (n_nodes - 1)
    moved = rows - own + own * (n_nodes - 1)
    return Cost(2, messages, messages, moved, moved)

"""All nodes come to hold all partial sums in rounds, in each of which they hold twice as many.

In round k a node sends what it holds, its own region and those of the 2^k - 1 nodes after it, to
the node 2^k before it; in the last round only what is still missing there. So ceil(log2 n) rounds
for any number n of nodes. With B bytes of partial sums each node

- sends ceil(log2 n) messages, of together (n - 1) B bytes;
- receives as many.

As many bytes as `direct` in fewer messages, for many nodes and few rows. The sum is then made as
there.

Source: Bruck, Ho, Kipnis, Upfal, Weathersby: Efficient Algorithms for All-to-All Communications in
Multiport Message-Passing Systems, 1997.
"""

from collections.abc import Iterator

from pyllama_dist.net.collectives.schedule import Action, Cost, Part, Round


def schedule(node: int, n_nodes: int, rows: int) -> Iterator[Action]:
    """A node holds the regions from its own on, round the circle."""
    held = 1
    while held < n_nodes:
        count = min(held, n_nodes - held)
        to, source = (node - held) % n_nodes, (node + held) % n_nodes
        yield Round(
            {to: _regions(node, count, n_nodes, rows)},
            {source: _regions(source, count, n_nodes, rows)},
        )
        held += count


def cost(node: int, n_nodes: int, rows: int) -> Cost:
    """The same for every node."""
    rounds = (n_nodes - 1).bit_length()
    return Cost(rounds, rounds, rounds, (n_nodes - 1) * rows, (n_nodes - 1) * rows)


def _regions(first: int, count: int, n_nodes: int, rows: int) -> tuple[Part, ...]:
    return tuple(Part((first + i) % n_nodes, 0, rows) for i in range(count))

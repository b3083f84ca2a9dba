"""Tensor parallelism: which heads, blocks and rows each node holds. Pure arithmetic.

Everything is cut in whole units, as evenly as whole units allow, and the first nodes take what is
left over. Any number of nodes works, up to the number of units of query heads.

A node's key and value heads follow from its query heads: it holds those that its query heads read.
Where a group of query heads that share one key head is cut, both nodes hold that key head.
"""

from dataclasses import dataclass
from math import gcd

BLOCK = 32  # values in a quantized block: a cut through a row must fall between blocks

Range = tuple[int, int]  # start, stop


@dataclass(frozen=True)
class Shard:
    """The part of every layer and of the head that one node holds."""

    heads: Range  # query heads
    kv_heads: Range  # key and value heads, replicated where groups are cut
    ffn: Range  # rows of gate and up, columns of down
    experts: Range  # the same of every expert
    shared: Range  # the same of the shared experts
    vocab: Range  # rows of lm_head


def cut(total: int, parts: int, unit: int = 1) -> tuple[Range, ...]:
    """Cuts `total` into consecutive ranges of whole units, even to within one unit.

    >>> cut(428, 3)
    ((0, 143), (143, 286), (286, 428))
    >>> cut(70, 2, unit=32)
    ((0, 64), (64, 70))
    """
    units = -(-total // unit)
    small, larger = divmod(units, parts)
    stops = [small * (i + 1) + min(i + 1, larger) for i in range(parts)]
    starts = [0, *stops[:-1]]
    return tuple(
        (min(a * unit, total), min(b * unit, total)) for a, b in zip(starts, stops, strict=True)
    )


def head_unit(head_dim: int, block: int = BLOCK) -> int:
    """The fewest query heads whose width is whole blocks of the weights.

    >>> head_unit(128), head_unit(16), head_unit(80), head_unit(16, block=1)
    (1, 2, 2, 1)
    """
    return block // gcd(block, head_dim)


def max_nodes(n_heads: int, head_dim: int, block: int = BLOCK) -> int:
    """The most nodes that a model can be cut for: each needs a unit of query heads.

    >>> max_nodes(32, 128), max_nodes(16, 16)
    (32, 8)
    """
    return -(-n_heads // head_unit(head_dim, block))


def partition(
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    ffn_dim: int,
    vocab_size: int,
    n_nodes: int,
    block: int = BLOCK,
    expert_dim: int = 0,
    shared_dim: int = 0,
) -> tuple[Shard, ...]:
    """The shard of each node; `block` is that of the weights' format, 1 if they have none.

    Args:
        n_heads: query heads.
        n_kv_heads: key and value heads.
        head_dim: what a head brings to the columns of `o_proj`.
        ffn_dim: width of a dense layer's FFN.
        vocab_size: rows of `lm_head`.
        n_nodes: root and workers.
        block: see above.
        expert_dim: width of an expert's FFN.
        shared_dim: width of the shared experts' FFN.

    Raises:
        ValueError: `n_nodes` is not between 1 and `max_nodes`.
    """
    most = max_nodes(n_heads, head_dim, block)
    if not 1 <= n_nodes <= most:
        raise ValueError(f"{n_nodes} nodes for {most} units of heads")
    group = n_heads // n_kv_heads  # query heads that read the same key head
    return tuple(
        Shard(heads, (heads[0] // group, (heads[1] - 1) // group + 1), ffn, experts, shared, vocab)
        for heads, ffn, experts, shared, vocab in zip(
            cut(n_heads, n_nodes, head_unit(head_dim, block)),
            cut(ffn_dim, n_nodes, BLOCK),
            cut(expert_dim, n_nodes, BLOCK),
            cut(shared_dim, n_nodes, BLOCK),
            cut(vocab_size, n_nodes),
            strict=True,
        )
    )

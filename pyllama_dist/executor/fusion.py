"""Which rows of the table are fused: opened by the threads as if they were one op.

That saves handing over from op to op, and keeps what a thread has made near to it. Rows are fused
only where a part of each needs nothing but the same part of those before it, so no result changes.
"""

from itertools import groupby, pairwise

from pyllama_dist.executor.lowering import Cut, Row
from pyllama_kernels.attention import MOST


def fuse(rows: list[Row]) -> list[Row]:
    """The rows of a segment, with those that begin a fused group saying how long it is."""
    fused: dict[int, dict[str, float]] = {i: {"fused": 1} for i in range(len(rows))}
    for found in (_products(rows), _activations(rows), _heads(rows)):
        for i, fields in found.items():
            fused[i] |= fields
    return [row | fused[i] for i, row in enumerate(rows)]


def _products(rows: list[Row]) -> dict[int, dict[str, float]]:
    """Products of the same input: queries, keys and values; gate and up."""

    def input_of(i: int) -> object:
        row = rows[i]
        product = row.cut is Cut.PRODUCTS
        return (row["kind"], bool(row["plan"]), row["rows"], row["a"]) if product else i

    found: dict[int, dict[str, float]] = {}
    for _, group in groupby(range(len(rows)), key=input_of):
        members = list(group)
        # If earlier members of a fused group have no rows, the group starts at the next one.
        found |= {i: {"fused": len(members) - place} for place, i in enumerate(members)}
    return found


def _activations(rows: list[Row]) -> dict[int, dict[str, float]]:
    """An activation function and the rounding of its result: whoever made a block rounds it."""
    return {
        i: {"fused": 2}
        for i, (row, after) in enumerate(pairwise(rows))
        if row.by_block and _follows(after, row)
    }


def _heads(rows: list[Row]) -> dict[int, dict[str, float]]:
    """What belongs to attention, key head by key head: from the products to the next ones.

    Not where a node has query heads without their key head's others: a key head would not stand
    for the same number of query heads everywhere.
    """
    found: dict[int, dict[str, float]] = {}
    for at, attend in enumerate(rows):
        if attend.cut is not Cut.ATTENTION or attend["first"] or attend["kv_heads"] < 2:
            continue
        whole = attend["heads"] == attend["kv_heads"] * attend["group"]
        if not whole or attend["group"] > MOST:
            continue
        first = at
        while first > 0 and rows[first - 1].by_head:
            first -= 1
        last = at + 2  # after what puts chunks together
        if last < len(rows) and _follows(rows[last], attend):
            last += 1
        cuts = {(attend["rows"], attend["heads"]), (attend["rows"], attend["kv_heads"])}
        if all((row["rows"], row["heads"]) in cuts for row in rows[first:at]):
            found[first] = {"fused": last - first, "units": attend["kv_heads"]}
    return found


def _follows(row: Row, before: Row) -> bool:
    """Whether a row reads what the one before it has made, block after block as it lies."""
    return row.by_block and row["a"] == before["out"]

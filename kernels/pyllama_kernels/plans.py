"""The dispatch plan of a mixture of experts: which rows of a batch go to which expert.

A router chooses some experts for each row. A row and an expert that is chosen for it are a *pair*.
Pairs are numbered in the order of the experts, then of the rows, so that all rows of an expert are
one small batch. Its activations are tiles of their own, of as many rows as suit so small a batch.

A plan is an array of int64. E experts, and room for P pairs:

    4       numbers: pairs, experts that have rows, E, P
    E       the experts that have rows
    E + 1   the first pair of each of those; after the last one, the number of pairs
    E + 1   the first row of tiles of each of those, likewise
    P       the row of each pair
    P       the experts of each row, -1 after the last one
    P       the pairs of each row, likewise
    E       rows of each expert, while the plan is made

A plan in which nothing was written has no pairs.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.extending import register_jitable

I64 = npt.NDArray[np.int64]

PAIRS, LISTED, EXPERTS, ROOM = range(4)
HEAD = 4
MOST_EXPERTS = 4096  # that a router can choose from


@register_jitable
def plan_words(experts: int, pairs: int) -> int:
    """Numbers in a plan."""
    return HEAD + 4 * experts + 2 + 3 * pairs


def new_plan(experts: int, pairs: int, plan: I64) -> I64:
    """Makes an empty plan of zeros, [plan_words(experts, pairs)] int64; returns it."""
    plan[EXPERTS], plan[ROOM] = experts, pairs
    return plan


@register_jitable
def lists(plan: I64) -> Any:
    """The lists of a plan, from the experts that have rows to the rows of each expert."""
    experts, room = plan[EXPERTS], plan[ROOM]
    firsts = HEAD + experts
    tiles = firsts + experts + 1
    rows = tiles + experts + 1
    return (
        plan[HEAD:firsts],
        plan[firsts:tiles],
        plan[tiles:rows],
        plan[rows : rows + room],
        plan[rows + room : rows + 2 * room],
        plan[rows + 2 * room : rows + 3 * room],
        plan[rows + 3 * room :],
    )


def spans(plan: I64) -> Iterator[tuple[int, slice, int]]:
    """Each expert that has rows, its pairs, and its first row of tiles."""
    experts, firsts, tiles = lists(plan)[:3]
    for i in range(plan[LISTED]):
        yield int(experts[i]), slice(int(firsts[i]), int(firsts[i + 1])), int(tiles[i])


def most_tile_rows(pairs: int, experts: int) -> int:
    """Rows of tiles that so many pairs take at most.

    The worst are experts of 2 rows, which take a tile of 4; none wastes more than the 7 rows that
    9 rows leave empty in a tile of 16.
    """
    return min(2 * pairs, pairs + 7 * experts)

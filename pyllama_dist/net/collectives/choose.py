"""Which algorithm an all-reduce takes: one by name, or by what it would cost.

All nodes must choose the same one. So it depends on what all of them know: the pipe, the number of
nodes and of rows, and what the root said in `net`.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from types import MappingProxyType

from pyllama_dist.config import FloatType
from pyllama_dist.net.collectives import direct, recursive_doubling, reduce_scatter, star, syncs
from pyllama_dist.net.collectives.schedule import Action, Round, Schedule, count_rows, reads_reduced
from pyllama_dist.net.frames import HEAD, MAX_DATA
from pyllama_dist.program import AllReduce, Pipe, Program, Sync

# Of equal ones the first is taken.
ALGORITHMS: MappingProxyType[str, Callable[[int, int, int], Iterator[Action]]] = MappingProxyType(
    {
        "direct": direct.schedule,
        "reduce-scatter": reduce_scatter.schedule,
        "star": star.schedule,
        "recursive-doubling": recursive_doubling.schedule,
    }
)
AUTO = "auto"

# Nodes on a switched network of 1 Gbit/s: what `auto` assumes. Only ratios count, and they are the
# same within a factor of ten of these: small exchanges cost rounds and messages, large ones bytes.
_ROUND_SECONDS = 100e-6  # from a message's end at one node to its arrival at another
_MESSAGE_SECONDS = 20e-6  # to send or to receive one: see design of `zeromq`
_BYTE_SECONDS = 8e-9  # of a link, in each direction


def make_schedule(
    exchange: Sync | AllReduce, pipe: Pipe, collective: str, program: Program, rows: int
) -> Schedule:
    """What a node does for an exchange.

    Args:
        exchange: of its program.
        pipe: the pipe that it names.
        collective: what the root said: one of `ALGORITHMS`, or `AUTO`.
        program: the node's.
        rows: of each region that travels, at least 1.
    """
    node, n_nodes = program.node, program.n_nodes
    if isinstance(exchange, Sync):
        return tuple(syncs.schedule(exchange.kind, node, n_nodes, rows))
    row_bytes = pipe.float_type.row_bytes(pipe.widths[0])
    name = choose(collective, n_nodes, rows, row_bytes, pipe.float_type is FloatType.F32)
    return tuple(ALGORITHMS[name](node, n_nodes, rows))


@lru_cache(maxsize=1024)
def choose(collective: str, n_nodes: int, rows: int, row_bytes: int, exact: bool) -> str:
    """The algorithm of an all-reduce, of `ALGORITHMS`.

    Args:
        collective: one of `ALGORITHMS`, or `AUTO`.
        n_nodes: all nodes.
        rows: of each region.
        row_bytes: of each row.
        exact: whether sums travel as they are. If not, `AUTO` takes none that sends sums: results
            would depend on how many rows a batch has.
    """
    wanted = [name for name in ALGORITHMS if collective in (AUTO, name)]
    found: dict[str, float] = {}
    for name in wanted:
        schedules = [tuple(ALGORITHMS[name](node, n_nodes, rows)) for node in range(n_nodes)]
        if collective == AUTO and not exact and any(map(reads_reduced, schedules)):
            continue
        if max(map(_largest, schedules)) * row_bytes + HEAD <= MAX_DATA:
            found[name] = max(_seconds(schedule, row_bytes) for schedule in schedules)
    return min(
        found, key=lambda name: found[name], default="direct"
    )  # whose frames are no larger than a pipe


def _seconds(schedule: Schedule, row_bytes: int) -> float:
    """What a schedule would take if no node had to wait for another one's computing."""
    seconds = 0.0
    for action in schedule:
        if isinstance(action, Round):
            messages = len(action.sends) + len(action.receives)
            rows = max(action.rows_sent, action.rows_received)
            seconds += _ROUND_SECONDS + messages * _MESSAGE_SECONDS
            seconds += rows * row_bytes * _BYTE_SECONDS
    return seconds


def _largest(schedule: Schedule) -> int:
    """Rows of the largest message that a node sends."""
    rounds = (action for action in schedule if isinstance(action, Round))
    messages = (message for action in rounds for message in action.sends.values())
    return max(map(count_rows, messages), default=0)

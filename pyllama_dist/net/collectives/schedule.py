"""The words of a collective: what one node does for one exchange of a pipe, as data.

A pipe has a region for each node, [rows, bytes of a row]; where its partial sums are reduced, one
more for their sum. A schedule moves rows of regions between nodes, each to the same place at the
other end, and says which rows of the sum a node makes. It follows from the node's index, the number
of nodes and the number of rows alone, so that every node knows what the others do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pyllama_dist.net.frames import HEAD
from pyllama_dist.program import REDUCED


@dataclass(frozen=True)
class Part:
    """Rows of a region."""

    region: int  # the node that writes it, or `REDUCED`
    first: int
    last: int  # the row after the last one


Message = tuple[Part, ...]


def count_rows(message: Message) -> int:
    """Rows of all its parts."""
    return sum(part.last - part.first for part in message)


@dataclass(frozen=True)
class Round:
    """Messages that depend on none of each other; all are sent before any is waited for."""

    sends: Mapping[int, Message]  # by node
    receives: Mapping[int, Message]  # by node

    @property
    def rows_sent(self) -> int:
        """Of all messages together."""
        return sum(map(count_rows, self.sends.values()))

    @property
    def rows_received(self) -> int:
        """Of all messages together."""
        return sum(map(count_rows, self.receives.values()))


@dataclass(frozen=True)
class Reduce:
    """This node makes rows of the sum: region after region, in the order of the nodes.

    Of partial sums in Q80 the sum is rounded to Q80 once more, to travel.
    """

    first: int
    last: int


Action = Round | Reduce
Schedule = tuple[Action, ...]


@dataclass(frozen=True)
class Cost:
    """What one node puts on the wire and takes from it."""

    rounds: int
    messages_sent: int
    messages_received: int
    rows_sent: int
    rows_received: int

    def sent(self, row_bytes: int) -> int:
        """Bytes sent, heads included."""
        return self.messages_sent * HEAD + self.rows_sent * row_bytes

    def received(self, row_bytes: int) -> int:
        """Bytes received, heads included."""
        return self.messages_received * HEAD + self.rows_received * row_bytes

    @classmethod
    def of(cls, schedule: "Schedule") -> "Cost":
        """The cost of a schedule, counted."""
        rounds = [action for action in schedule if isinstance(action, Round)]
        return cls(
            len(rounds),
            sum(len(action.sends) for action in rounds),
            sum(len(action.receives) for action in rounds),
            sum(action.rows_sent for action in rounds),
            sum(action.rows_received for action in rounds),
        )


def others(node: int, n_nodes: int) -> list[int]:
    """All other nodes, the next one first, so that not all of them send to the same one at once."""
    return [(node + i) % n_nodes for i in range(1, n_nodes)]


def reads_reduced(schedule: Schedule) -> bool:
    """Whether every node finds the whole sum in `REDUCED` at the end; else it has all regions."""
    return any(
        part.region == REDUCED
        for action in schedule
        if isinstance(action, Round)
        for message in (*action.sends.values(), *action.receives.values())
        for part in message
    )

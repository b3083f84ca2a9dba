"""Carries out the schedules of one exchange of a pipe, in place where rows lie as they travel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pyllama_dist.errors import ProtocolError
from pyllama_dist.net.collectives.schedule import (
    Message,
    Reduce,
    Round,
    Schedule,
    count_rows,
    reads_reduced,
)
from pyllama_dist.net.frames import HEAD, check_frame, write_head
from pyllama_dist.net.transport import Mesh

_KEPT = 4  # numbers of rows whose frames are kept: those of a decode step, of a batch of a prompt


class Regions(Protocol):
    """What an exchange needs to know of a pipe: its regions, as they lie in memory."""

    def frame(self, region: int, rows: int, head: int) -> memoryview:
        """The first rows of a region, with `head` bytes before them."""


@dataclass(frozen=True)
class _Frame:
    """A message in memory: where its rows lie, or a copy of them.

    Attributes:
        memory: the frame, head included.
        copies: rows of regions, and their place in the frame. None if the frame is where they lie:
            for one part from the first row on, since only there is room for a head.
    """

    memory: memoryview
    copies: tuple[tuple[memoryview, memoryview], ...]


class _Round:
    """A round with its frames."""

    def __init__(
        self, number: int, sends: Mapping[int, _Frame], receives: Mapping[int, _Frame]
    ) -> None:
        self.number = number  # among the rounds of the schedule
        self.written = list({id(frame): frame for frame in sends.values()}.values())
        self.received = receives
        self.to = {node: frame.memory for node, frame in sends.items()}
        self.into = {node: frame.memory for node, frame in receives.items()}
        self.bytes_sent = sum(map(len, self.to.values()))


@dataclass(frozen=True)
class _Ready:
    """A schedule with its frames."""

    actions: tuple[Reduce | _Round, ...]
    reads_reduced: bool


class Exchange:
    """One kind of exchange of one pipe, by one node."""

    def __init__(
        self,
        mesh: Mesh,
        regions: Regions,
        schedule: Callable[[int], Schedule],
        reduce: Callable[[int, int], None],
        *,
        node: int,
    ) -> None:
        """An exchange.

        Args:
            mesh: the connections to all other nodes.
            regions: those of the pipe.
            schedule: makes the schedule for a number of rows, at least 1.
            reduce: makes rows of the sum: the first one, and the one after the last.
            node: this node.
        """
        self._mesh, self._regions, self._schedule, self._reduce = mesh, regions, schedule, reduce
        self._node = node
        self._ready: dict[int, _Ready] = {}  # by rows

    def reads_reduced(self, rows: int) -> bool:
        """Whether the sum of so many rows will be in the region for it, not still to be made."""
        return rows > 0 and self._at(rows).reads_reduced

    def run(self, rows: int, step: int, sync: int, timeout: float) -> int:
        """Sends and receives.

        Args:
            rows: rows of a region.
            step: number of the step.
            sync: place of the exchange in the program.
            timeout: seconds to wait for the others, in each round.

        Returns:
            Bytes sent and received.

        Raises:
            LostError: a peer is gone or late.
            ProtocolError: a peer is at another step, or a frame was damaged.
        """
        moved = 0
        if rows == 0:
            return moved
        for action in self._at(rows).actions:
            if isinstance(action, Reduce):
                self._reduce(action.first, action.last)
            else:
                moved += self._run_round(action, (step, sync, action.number), timeout)
        return moved

    def _run_round(self, ready: _Round, place: tuple[int, int, int], timeout: float) -> int:
        """One round: all is sent, then what comes is checked and put in its place."""
        for frame in ready.written:
            for rows, copy in frame.copies:
                copy[:] = rows
            write_head(frame.memory, *place)
        moved = ready.bytes_sent
        for other, received in self._mesh.exchange(ready.to, ready.into, timeout):
            frame = ready.received[other]
            try:
                check_frame(frame.memory, received, *place)
            except ProtocolError as error:
                ends = f"{self._mesh.names[self._node]} and {self._mesh.names[other]}"
                raise ProtocolError(f"the link of {ends}: {error}") from None
            for rows, copy in frame.copies:
                rows[:] = copy
            moved += received
        return moved

    def _at(self, rows: int) -> _Ready:
        """The frames for so many rows; most steps have as many as one of those before."""
        ready = self._ready.get(rows)
        if ready is None:
            if len(self._ready) == _KEPT:
                del self._ready[next(iter(self._ready))]
            ready = self._ready[rows] = self._prepare(rows)
        return ready

    def _prepare(self, rows: int) -> _Ready:
        schedule = self._schedule(rows)
        actions: list[Reduce | _Round] = []
        rounds = 0
        for action in schedule:
            match action:
                case Round(sends, receives):
                    if sends or receives:
                        frames = self._frames(sends), self._frames(receives)
                        actions.append(_Round(rounds, *frames))
                    rounds += 1
                case Reduce(first, last) if first < last:
                    actions.append(action)
        return _Ready(tuple(actions), reads_reduced(schedule))

    def _frames(self, messages: Mapping[int, Message]) -> dict[int, _Frame]:
        """A frame for each message; equal ones, which go to several nodes, share it."""
        frames = {message: self._frame(message) for message in messages.values()}
        return {node: frames[message] for node, message in messages.items()}

    def _frame(self, message: Message) -> _Frame:
        if len(message) == 1 and message[0].first == 0:
            return _Frame(self._regions.frame(message[0].region, message[0].last, HEAD), ())
        row_bytes = len(self._regions.frame(message[0].region, 1, 0))
        memory = memoryview(bytearray(HEAD + count_rows(message) * row_bytes))
        copies, end = [], HEAD
        for part in message:
            rows = self._regions.frame(part.region, part.last, 0)[part.first * row_bytes :]
            copies.append((rows, memory[end : end + len(rows)]))
            end += len(rows)
        return _Frame(memory, tuple(copies))

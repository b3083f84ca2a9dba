"""The root's conversations with its workers, and whom it names when one of them fails."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from pyllama_dist.closing import Closing
from pyllama_dist.errors import NodeError, ProtocolError, PyllamaError
from pyllama_dist.net.messages import Bye, Error, Message, Phase
from pyllama_dist.net.transport import ROOT, Channel, LostError, Mesh

_BLAME_SECONDS = 0.5  # for workers to say whom they miss, before the first suspect is believed

_M = TypeVar("_M")


class Workers(Closing):
    """All workers of a root. A context manager: at its end it sends `bye`, or the error.

    Attributes:
        channels: to each worker, in the order of nodes.
        mesh: the data connections; None before they stand, and where there are no workers.
        phase: where the session stands.
    """

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.mesh: Mesh | None = None
        self.phase = Phase.HELLO
        self._deadline = 0.0

    def begin(self, phase: Phase, seconds: float) -> None:
        """Begins a phase with a deadline for all workers, in seconds."""
        self.phase, self._deadline = phase, time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Until the deadline of the phase."""
        return max(0.0, self._deadline - time.monotonic())

    def tell(self, message: Message) -> None:
        """Sends a message to all workers.

        Raises:
            LostError: one takes nothing, or is gone.
        """
        for channel in self.channels:
            channel.send(message)

    def expect(self, channel: Channel, kind: type[_M]) -> _M:
        """The next message of a worker, which must be of this kind.

        Raises:
            LostError: it is gone, says that another node is, or the phase is over its time.
            NodeError: it says why it cannot go on.
            ProtocolError: it says something else.
        """
        message, _ = channel.receive(self.seconds_left)
        if isinstance(message, kind):
            return message
        if isinstance(message, Error):
            if message.culprit:
                raise LostError(message.message, message.culprit, channel.address)
            raise self._reason(channel, message)
        raise ProtocolError(
            f"{channel.address} answered {type(message).__name__} instead of {kind.__name__} in "
            f"phase {self.phase}"
        )

    def expect_all(self, kind: type[_M]) -> list[_M]:
        """As `expect`, of all workers."""
        return [self.expect(channel, kind) for channel in self.channels]

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """Converts a `LostError` raised within to an error that names the node at fault."""
        try:
            yield
        except LostError as lost:
            raise self._blame(lost) from None

    def close(self, error: BaseException | None = None) -> None:
        """Sends `bye`, or the error, to all workers and closes all connections."""
        reason = str(error) if isinstance(error, PyllamaError) else "the root was interrupted"
        last = Bye() if error is None else Error(self.phase, reason[:4096])
        for channel in self.channels:
            channel.close(last)
        self.channels = []
        self._close_mesh()

    def _close_mesh(self) -> None:
        if self.mesh is not None:
            self.mesh.close()
            self.mesh = None

    def _blame(self, lost: LostError) -> NodeError:
        """The error to show when a node was lost.

        A worker that gives a reason of its own is believed. Else complaints are followed from node
        to node: who misses a node that has itself complained was left by it because of that. A node
        that is missed and silent is lost; where both ends of a link are alive, the link is.
        """
        complaints = {lost.reporter or ROOT: lost}
        if reason := self._hear(complaints):
            return reason
        alive = {ROOT, *complaints}
        if len(alive) <= len(self.channels):
            # Who is not lost misses the root as soon as that closes its data connections.
            self._close_mesh()
            late: dict[str, LostError] = {}
            if reason := self._hear(late):
                return reason
            alive |= late.keys()
        reporter, visited = lost.reporter or ROOT, set[str]()
        while True:
            visited.add(reporter)
            complaint = complaints[reporter]
            culprits = complaint.culprit.split(", ")
            if silent := [culprit for culprit in culprits if culprit not in alive]:
                return NodeError(
                    f"lost worker {', '.join(silent)} in phase {self.phase}: {complaint.detail}; "
                    f"check that machine (power, network, memory), start its worker again, then "
                    f"this root"
                )
            if culprits[0] in visited or culprits[0] not in complaints:
                order = [ROOT, *(channel.address for channel in self.channels)]
                ends = " - ".join(sorted((reporter, culprits[0]), key=order.index))
                return self._lost_link(ends, complaint.detail)
            reporter = culprits[0]

    def _hear(self, complaints: dict[str, LostError]) -> NodeError | None:
        """Collects whom workers miss, by worker; a worker's own reason is returned at once."""
        deadline = time.monotonic() + _BLAME_SECONDS
        for channel in self.channels:
            try:
                while channel.address not in complaints:
                    message, _ = channel.receive(max(0.0, deadline - time.monotonic()))
                    if not isinstance(message, Error):
                        continue  # said before
                    if not message.culprit:
                        return self._reason(channel, message)
                    complaint = LostError(message.message, message.culprit, channel.address)
                    complaints[channel.address] = complaint
            except NodeError:
                continue
        return None

    def _reason(self, channel: Channel, message: Error) -> NodeError:
        """The error of a worker that says why it cannot go on."""
        if message.phase is Phase.HELLO and self.phase is not Phase.HELLO:
            # ZeroMQ connects again by itself, and the worker takes that for a new root.
            detail = "the connection ended and was made again"
            return self._lost_link(f"{ROOT} - {channel.address}", detail)
        return NodeError(f"worker {channel.address} in phase {message.phase}: {message.message}")

    def _lost_link(self, ends: str, detail: str) -> NodeError:
        return NodeError(
            f"lost the link {ends} in phase {self.phase}: {detail}; both ends are there: check the "
            f"network between them, then start this root again"
        )

"""The root: it knows the model, gives every worker its program and weights, and leads each step.

The phases and messages are those of `net/PROTOCOL.md`.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pyllama_dist import __version__
from pyllama_dist.check import check_batch, check_program
from pyllama_dist.cores import kept_to
from pyllama_dist.errors import NodeError, ProtocolError, PyllamaError
from pyllama_dist.executor import make_executor
from pyllama_dist.executor.memory import own_blocks
from pyllama_dist.net.frames import MAX_RAW
from pyllama_dist.net.messages import (
    PROTOCOL,
    Allocated,
    AskUsage,
    Bound,
    Bye,
    Error,
    Hello,
    Join,
    Meshed,
    Net,
    Peers,
    Phase,
    Ready,
    Step,
    Usage,
    WeightPart,
    WeightsEnd,
    Welcome,
)
from pyllama_dist.net.transport import ROOT, Address, Channel, Dialer, Door, LostError, Mesh
from pyllama_dist.node import Node
from pyllama_dist.program import Batch, Program, Span, weights

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Progress = Callable[[int], None]

_TALK_SECONDS = 15.0
_LOAD_SECONDS = 60.0
_BLAME_SECONDS = 0.5  # for workers to say whom they lost, before the first suspect is believed

_M = TypeVar("_M")


class WeightSource(Protocol):
    """Where weights and embeddings come from: a `.m` file."""

    def slice(self, name: str, rows: Span, cols: Span) -> U8:
        """Part of a tensor, [rows, bytes] uint8, in the file's format."""

    def raw(self, name: str) -> U8:
        """A whole tensor, [rows, bytes] uint8, in the file's format."""

    def drop_pages(self) -> None:
        """Lets go of what was read."""


class Root:
    """Node 0 and the conversations with all workers."""

    def __init__(
        self,
        source: WeightSource,
        programs: Sequence[Program],
        *,
        n_threads: int,
        cpu: int | None = None,
        timeout: float = 60.0,
        dialer: Dialer | None = None,
        workers: Sequence[Address] = (),
        progress: Progress = lambda nbytes: None,
    ) -> None:
        """Connects to the workers and brings them to READY.

        Args:
            source: the model file.
            programs: one for each node, the root's first.
            n_threads: threads of this node.
            cpu: the CPU that its steps keep to; None: any.
            timeout: seconds that an exchange may take.
            dialer: how workers are reached; None if there are none.
            workers: their addresses, in order.
            progress: told the bytes of weights as they are placed, of all nodes together.

        Raises:
            NodeError: a worker cannot be reached, refuses, or is lost; with address and phase.
        """
        self._source = source
        self._embedding = source.raw("embed_tokens.weight").view(np.float32)  # mapped, not read
        self._names = [ROOT, *map(str, workers)]
        self._channels: list[Channel] = []
        self._mesh: Mesh | None = None
        self._number = 0
        self._phase = Phase.HELLO
        self._cpu = cpu
        check_program(programs[0])  # our own: compiled ops trust whatever they get
        self._executor = make_executor(programs[0], n_threads)
        try:
            if workers:
                if dialer is None:
                    raise TypeError("workers without a dialer")
                self._meet(dialer, workers)
                self._send_programs(programs, timeout)
            self._place_weights(programs, progress)
            self._phase = Phase.READY
        except LostError as lost:
            error = self._blame(lost)
            self.close(error)
            raise error from None
        except BaseException as error:
            self.close(error)
            raise
        program, pipes = programs[0], self._executor.memory.pipes
        self.node = Node(program, self._executor, self._mesh, timeout)
        self._x = pipes["x"].f32(0, program.max_rows)
        self._slices = [pipes["logits"].f32(i, program.max_logits) for i in range(program.n_nodes)]
        self._logits = self._slices[0]
        if program.n_nodes > 1:
            vocab = sum(part.shape[1] for part in self._slices)
            self._logits = np.empty((program.max_logits, vocab), np.float32)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return len(self._embedding)

    def step(self, tokens: Sequence[int], batch: Batch) -> F32:
        """Runs all nodes on a batch.

        Args:
            tokens: one for each row of the batch, within the vocabulary.
            batch: their sequences and positions, and the rows whose logits are wanted; and what
                becomes of blocks. If the first one gives out none, each sequence has its own.

        Returns:
            [len(batch.logits), vocab] float32; the next step overwrites them.

        Raises:
            ProtocolError: tokens and batch do not fit each other, the program or the vocabulary.
            NodeError: a worker was lost; with address, phase and what to do.
        """
        if len(tokens) != len(batch.seqs):
            raise ProtocolError(f"{len(tokens)} tokens for a batch of {len(batch.seqs)} rows")
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ProtocolError(f"a token id beyond the vocabulary of {self.vocab_size}")
        if self._number == 0 and not batch.table:
            batch = replace(batch, table=own_blocks(self.node.program))
        check_batch(self.node.program, batch, self._executor.memory.table)
        self._phase = Phase.STEP
        self._number = (self._number + 1) % (1 << 32)
        self._x[: len(tokens)] = self._embedding[np.asarray(tokens)]
        try:
            if self._mesh is not None:
                self._mesh.check()  # a worker that left and came back knows nothing of us
            for channel in self._channels:
                channel.send(Step(self._number, batch))
            with kept_to(self._cpu):
                self.node.step(self._number, batch)
        except LostError as lost:
            raise self._blame(lost) from None
        logits = self._logits[: len(batch.logits)]
        if len(self._slices) > 1:
            np.concatenate([part[: len(logits)] for part in self._slices], axis=1, out=logits)
        return logits

    def usage(self) -> list[Usage]:
        """What steps have cost each worker so far, and the memory it has taken.

        Raises:
            NodeError: a worker was lost; with address, phase and what to do.
        """
        try:
            for channel in self._channels:
                channel.send(AskUsage())
            return [self._expect(channel, Usage, _TALK_SECONDS) for channel in self._channels]
        except LostError as lost:
            raise self._blame(lost) from None

    def close(self, error: BaseException | None = None) -> None:
        """Says bye, or why not, and frees everything."""
        reason = str(error) if isinstance(error, PyllamaError) else "the root was interrupted"
        last = Bye() if error is None else Error(self._phase, reason[:4096])
        for channel in self._channels:
            channel.close(last)
        self._channels = []
        if self._mesh is not None:
            self._mesh.close()
            self._mesh = None
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def _expect(self, channel: Channel, kind: type[_M], timeout: float) -> _M:
        message, _ = channel.receive(timeout)
        if isinstance(message, kind):
            return message
        if isinstance(message, Error):
            if message.culprit:
                raise LostError(message.message, message.culprit)
            raise self._theirs(channel, message)
        found = type(message).__name__
        raise ProtocolError(
            f"{channel.address} answered {found} instead of {kind.__name__} in phase {self._phase}"
        )

    def _meet(self, dialer: Dialer, workers: Sequence[Address]) -> None:
        """HELLO and PEERS."""
        session = secrets.token_bytes(16)
        for address in workers:
            self._channels.append(dialer.connect(address))
        for channel in self._channels:
            channel.send(Hello(PROTOCOL, __version__, session))
        for channel in self._channels:
            welcome = self._expect(channel, Welcome, _TALK_SECONDS)
            if welcome.protocol != PROTOCOL:
                raise NodeError(
                    f"worker {channel.address} speaks protocol {welcome.protocol} (pyllama-dist "
                    f"{welcome.version}), this root {PROTOCOL} (pyllama-dist {__version__}); "
                    f"install the same version on both"
                )

        self._phase = Phase.PEERS
        n_nodes = len(workers) + 1
        doors: dict[int, tuple[Door, ...]] = {}  # by worker: where each lower node reaches it
        for node, channel in enumerate(self._channels, start=1):
            channel.send(Join(node, n_nodes))
            doors[node] = self._expect(channel, Bound, _TALK_SECONDS).doors
            if len(doors[node]) != node:
                raise ProtocolError(f"{channel.address} opened {len(doors[node])} doors")
        for node, channel in enumerate(self._channels, start=1):
            higher = range(node + 1, n_nodes)
            channel.send(Peers(tuple(self._names), tuple(doors[peer][node] for peer in higher)))
        self._mesh = dialer.mesh()
        self._mesh.connect(
            {peer: (workers[peer - 1].host, doors[peer][0]) for peer in range(1, n_nodes)}
        )
        self._mesh.greet(session, 0, self._names, _TALK_SECONDS)
        for channel in self._channels:
            self._expect(channel, Meshed, _TALK_SECONDS)

    def _send_programs(self, programs: Sequence[Program], timeout: float) -> None:
        """NET."""
        self._phase = Phase.NET
        for channel, program in zip(self._channels, programs[1:], strict=True):
            channel.send(Net(program, timeout))
        for channel, program in zip(self._channels, programs[1:], strict=True):
            allocated = self._expect(channel, Allocated, _LOAD_SECONDS)
            if allocated.nbytes != sum(weight.nbytes for weight in weights(program)):
                raise ProtocolError(f"{channel.address} allocated {allocated.nbytes} bytes")

    def _place_weights(self, programs: Sequence[Program], progress: Progress) -> None:
        """WEIGHTS: tensor after tensor to all nodes, so that the file is read once, in order."""
        self._phase = Phase.WEIGHTS
        for index, parts in enumerate(zip(*map(weights, programs), strict=True)):
            for node, weight in enumerate(parts):
                view = self._source.slice(weight.tensor, weight.rows, weight.cols)
                for offset, data in _chunks(view):
                    if node == 0:
                        own = self._executor.memory.weights[index]
                        own[offset : offset + data.size] = data
                    else:
                        self._channels[node - 1].send(WeightPart(index, offset), data.data)
                    progress(data.size)
            self._executor.memory.settle(index)
            if index % 32 == 0:
                self._source.drop_pages()
        self._source.drop_pages()
        for channel in self._channels:
            channel.send(WeightsEnd())
        for channel in self._channels:
            self._expect(channel, Ready, _LOAD_SECONDS)

    def _blame(self, lost: LostError) -> NodeError:
        """The error to show for a lost connection: workers may know better who failed, and why."""
        named, culprit, detail = False, lost.culprit, lost.detail
        deadline = time.monotonic() + _BLAME_SECONDS
        for channel in self._channels:
            try:
                message, _ = channel.receive(max(0.0, deadline - time.monotonic()))
            except NodeError:
                continue
            if isinstance(message, Error):
                if not message.culprit:
                    return self._theirs(channel, message)
                if message.culprit != ROOT and not named:
                    named, culprit, detail = True, message.culprit, message.message
        return NodeError(
            f"lost worker {culprit} in phase {self._phase}: {detail}; check that machine (power, "
            f"network, memory), start its worker again, then this root"
        )

    @staticmethod
    def _theirs(channel: Channel, message: Error) -> NodeError:
        return NodeError(f"worker {channel.address} in phase {message.phase}: {message.message}")


def _chunks(view: U8) -> Iterator[tuple[int, U8]]:
    """A view's bytes in pieces that a frame can carry: offset and contiguous bytes."""
    rows, row_bytes = view.shape
    step = max(1, MAX_RAW // max(1, row_bytes))
    for start in range(0, rows, step):
        flat = np.ascontiguousarray(view[start : start + step]).reshape(-1)
        for first in range(0, flat.size, MAX_RAW):
            yield start * row_bytes + first, flat[first : first + MAX_RAW]

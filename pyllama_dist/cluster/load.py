"""Phases NET and WEIGHTS: every node gets its program, and its slices of the weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pyllama_dist.errors import ProtocolError
from pyllama_dist.executor import Executor
from pyllama_dist.net.frames import MAX_RAW, checksum
from pyllama_dist.net.messages import (
    Allocated,
    Net,
    Phase,
    Ready,
    WeightPart,
    WeightsEnd,
)
from pyllama_dist.program import Program, Span, weights
from pyllama_dist.workers import Workers

U8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes placed so far, and those of all nodes together

_NET_SECONDS = 60.0
_READY_SECONDS = 60.0  # after the last weight was sent


class WeightSource(Protocol):
    """Where weights and embeddings come from: a `.m` file."""

    def slice(self, name: str, rows: Span, cols: Span) -> U8:
        """Part of a tensor, [rows, bytes] uint8, in the file's format."""

    def raw(self, name: str) -> U8:
        """A whole tensor, [rows, bytes] uint8, in the file's format."""

    def drop_pages(self) -> None:
        """Lets go of what was read."""


def load(
    workers: Workers,
    executor: Executor,
    source: WeightSource,
    programs: Sequence[Program],
    timeout: float,
    collective: str,
    progress: Progress,
) -> None:
    """Brings all nodes to READY.

    Args:
        workers: connected with each other.
        executor: the root's, made for its program.
        source: the model file.
        programs: one for each node, the root's first.
        timeout: seconds that each round of an exchange may take.
        collective: how sums travel.
        progress: told the bytes of weights as they are placed.

    Raises:
        LostError: a worker is lost.
        NodeError: a worker refuses its program.
    """
    _send_programs(workers, programs, timeout, collective)
    _place_weights(workers, executor, source, programs, progress)


def _send_programs(
    workers: Workers, programs: Sequence[Program], timeout: float, collective: str
) -> None:
    workers.begin(Phase.NET, _NET_SECONDS)
    for channel, program in zip(workers.channels, programs[1:], strict=True):
        channel.send(Net(program, collective, timeout))
    for channel, program in zip(workers.channels, programs[1:], strict=True):
        allocated = workers.expect(channel, Allocated)
        if allocated.nbytes != sum(weight.nbytes for weight in weights(program)):
            raise ProtocolError(f"{channel.address} allocated {allocated.nbytes} bytes")


def _place_weights(
    workers: Workers,
    executor: Executor,
    source: WeightSource,
    programs: Sequence[Program],
    progress: Progress,
) -> None:
    """Tensor after tensor to all nodes, so that the file is read once, in order."""
    workers.phase = Phase.WEIGHTS
    total = sum(weight.nbytes for program in programs for weight in weights(program))
    placed = 0
    for index, parts in enumerate(zip(*map(weights, programs), strict=True)):
        if workers.mesh is not None:
            workers.mesh.check()  # a node that gave up only stops reading weights
        for node, weight in enumerate(parts):
            view = source.slice(weight.tensor, weight.rows, weight.cols)
            for offset, data in _chunks(view):
                if node == 0:
                    own = executor.memory.weights[index]
                    own[offset : offset + data.size] = data
                else:
                    part = WeightPart(index, offset, checksum(data.data))
                    workers.channels[node - 1].send(part, data.data)
                placed += data.size
                progress(placed, total)
        executor.memory.settle(index)
        if index % 32 == 0:
            source.drop_pages()
    source.drop_pages()
    workers.tell(WeightsEnd())
    workers.begin(Phase.WEIGHTS, _READY_SECONDS)
    workers.expect_all(Ready)


def _chunks(view: U8) -> Iterator[tuple[int, U8]]:
    """A view's bytes in pieces that a frame can carry: offset and contiguous bytes."""
    rows, row_bytes = view.shape
    step = max(1, MAX_RAW // max(1, row_bytes))
    for start in range(0, rows, step):
        flat = np.ascontiguousarray(view[start : start + step]).reshape(-1)
        for first in range(0, flat.size, MAX_RAW):
            yield start * row_bytes + first, flat[first : first + MAX_RAW]

"""The computing part of an `AllReduce`: sums of a pipe's regions, whole or some rows of them.

Which rows a node sums, and when, is up to the algorithm that carries the exchange out: see
`net.collectives`. Where the sum is ready in the pipe's region `REDUCED`, it only has to be taken;
else every node adds up all regions, in the order of the nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType
from pyllama_dist.executor.lowering import Cut, Lowering, Row, address
from pyllama_dist.executor.memory import F32, Memory, PipeMemory
from pyllama_dist.program import REDUCED, AllReduce, Op, Program
from pyllama_kernels import optable, reference
from pyllama_kernels.entries import ENTRIES


@dataclass(frozen=True)
class TakeSum:
    """target = the sum of a pipe's regions. Run and lowered like an op, but no part of a program.

    It begins the segment after its exchange, so that all threads do it.
    """

    exchange: AllReduce

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        pipe = memory.pipes[self.exchange.pipe]
        ready = memory.reduced[self.exchange.pipe]
        regions = [REDUCED] if ready else range(len(pipe.spec.widths))
        _sum(pipe, regions, 0, memory.f32(self.exchange.target))

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`. `Reduction` changes the row where the sum is ready."""
        pipe, n = table.memory.pipes[self.exchange.pipe], table.width(self.exchange.target)
        return [
            table.row(
                _merge(pipe),
                self.exchange.target,
                Cut.NUMBERS,
                cost=n,
                a=address(pipe.payload(0, 1)),
                n=n,
                parts=len(pipe.spec.widths),
                stride=pipe.memory.shape[1],
            )
        ]


def ops_of_segment(program: Program, segment: int) -> list[Op | TakeSum]:
    """What a node runs for a segment: first it takes the sums of the exchanges before."""
    before = program.segments[segment - 1].syncs if segment else ()
    sums = [TakeSum(exchange) for exchange in before if isinstance(exchange, AllReduce)]
    return [*sums, *program.segments[segment].ops]


def reduce_rows(memory: Memory, exchange: AllReduce, first: int, last: int) -> None:
    """Makes rows of the sum in the region `REDUCED`: the reference implementation."""
    pipe = memory.pipes[exchange.pipe]
    rows = memory.f32(exchange.target)[first:last]
    _sum(pipe, range(len(pipe.spec.widths)), first, rows)
    sent = pipe.payload(REDUCED, last)[first:]
    if pipe.spec.float_type is FloatType.F32:
        sent.view(np.float32)[:] = rows
    else:
        reference.pack_q80(rows.reshape(-1, 32), sent.reshape(-1, 34))


def _merge(pipe: PipeMemory) -> str:
    """The entry that adds up regions."""
    return "merge_f32" if pipe.spec.float_type is FloatType.F32 else "merge_q80"


def _sum(pipe: PipeMemory, regions: Iterable[int], first: int, out: F32) -> None:
    """The sum of some regions, from a row on: [rows, width]."""
    parts = np.stack([pipe.payload(region, first + len(out))[first:] for region in regions])
    if pipe.spec.float_type is FloatType.F32:
        reference.merge_f32(parts.view(np.float32).reshape(len(parts), -1), out.reshape(-1))
    else:
        reference.merge_q80(parts.reshape(len(parts), -1, 34), out.reshape(-1, 32))


ROWS = 2  # of the table, that a `Reduction` takes


class Reduction:
    """An `AllReduce` in the compiled table: the rows that take its sum, and those that make it.

    The latter are a segment of their own, behind all others. Of Q80, rows are summed in the target,
    and rounded into the region `REDUCED`.
    """

    def __init__(
        self, memory: Memory, exchange: AllReduce, table: npt.NDArray[Any], start: int
    ) -> None:
        """The `ROWS` rows of the table from `start` on become those that make the sum."""
        pipe, target = memory.pipes[exchange.pipe], memory.buffers[exchange.target]
        f32, width = pipe.spec.float_type is FloatType.F32, target.shape[1]
        entries = (_merge(pipe),) if f32 else (_merge(pipe), "pack_q80")
        self._n_regions, self._row_bytes = len(pipe.spec.widths), pipe.row_bytes(REDUCED)
        self._regions = address(pipe.payload(0, 1))
        self._reduced = address(pipe.payload(REDUCED, 1))
        self._target, self._target_bytes = address(target), 4 * width
        self._table, self._start, self._stop = table, start, start + len(entries)
        takes = table["entry"] == ENTRIES[entries[0]].address
        takes &= (table["out"] == self._target) & (table["a"] == self._regions)
        self._takes = np.flatnonzero(takes)
        makes = table[start : self._stop]
        makes["entry"] = [ENTRIES[name].address for name in entries]
        makes["cut"], makes["cost"], makes["fused"] = Cut.NUMBERS, width, 1
        makes["rows"], makes["n"] = optable.N_REDUCED, width
        makes["parts"], makes["stride"] = self._n_regions, pipe.memory.shape[1]
        self._is_ready = False

    def read(self, ready: bool) -> None:
        """From now on, the sum is ready in its region, or has to be made of all regions."""
        if ready != self._is_ready:
            self._table["a"][self._takes] = self._reduced if ready else self._regions
            self._table["parts"][self._takes] = 1 if ready else self._n_regions
            self._is_ready = ready

    def at(self, first: int) -> tuple[int, int]:
        """The rows that make the sum from row `first` of the batch on: a segment of the table."""
        regions, reduced = (at + first * self._row_bytes for at in (self._regions, self._reduced))
        target = self._target + first * self._target_bytes
        places = [(regions, target), (target, reduced)]
        if self._stop == self._start + 1:
            places = [(regions, reduced)]
        for row, (a, out) in enumerate(places, start=self._start):
            self._table["a"][row], self._table["out"][row] = a, out
        return self._start, self._stop

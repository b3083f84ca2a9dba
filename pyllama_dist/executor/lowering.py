"""Turns ops into rows of the compiled table: names become addresses and sizes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import Program, Rows, Weight, own_region
from pyllama_kernels import optable
from pyllama_kernels.optable import Cut

__all__ = ["Cut", "Lowering", "Row", "address"]

_ROWS: dict[Rows, int] = {
    "batch": optable.N_ROWS,
    "logits": optable.N_LOGITS,
    "experts": optable.N_PAIRS,
}


@dataclass(frozen=True)
class Row:
    """A row of the table, and what must be known of it to fuse it with others.

    Attributes:
        entry: name of the compiled function: see `pyllama_kernels.entry`.
        cut: how it is cut into parts.
        fields: the other fields of `optable.OP`.
        by_head: whether a part of it, of as many as there are key heads, needs and makes only what
            belongs to that key head.
        by_block: whether a part of it needs only the same part of what it reads.
    """

    entry: str
    cut: Cut
    fields: dict[str, float]
    by_head: bool = False
    by_block: bool = False

    def __or__(self, fields: dict[str, Any]) -> "Row":
        """This row with other fields."""
        own = {name: fields[name] for name in ("entry", "cut") if name in fields}
        rest = {name: value for name, value in fields.items() if name not in own}
        return replace(self, **own, fields=self.fields | rest)

    def __getitem__(self, name: str) -> float:
        return self.fields.get(name, 0)


def address(array: npt.NDArray[Any]) -> int:
    """The address of an array's first byte; whoever takes it keeps the array."""
    return array.ctypes.data


class Lowering:
    """What ops need to become rows of the table.

    Attributes:
        program: the program that they are of.
        memory: its memory.
        kept: arrays that rows point to, beside those of the memory: they must live as long.
    """

    def __init__(self, program: Program, memory: Memory) -> None:
        self.program, self.memory = program, memory
        self.kept: list[npt.NDArray[Any]] = []
        self._widths = {buffer.name: buffer.width for buffer in program.buffers}

    def row(
        self,
        entry: str,
        target: str,
        cut: Cut,
        *,
        cost: int = 0,
        by_head: bool = False,
        by_block: bool = False,
        **fields: float,
    ) -> Row:
        """A row of the table.

        Args:
            entry: name of the compiled function.
            target: where it writes; how many rows of memory that is follows from it.
            cut: how it is cut into parts.
            cost: numbers that each row takes, to judge how many threads pay.
            by_head: see `Row`.
            by_block: see `Row`.
            fields: other fields of `optable.OP`.
        """
        rows = _ROWS[self.memory.rows(target)]
        fields = {"rows": rows, "out": self.at(target), "cost": cost, **fields}
        return Row(entry, cut, fields, by_head, by_block)

    def at(self, name: str) -> int:
        """Address of a buffer, or of this node's region of a pipe."""
        if name in self.memory.pipes:
            pipe = self.memory.pipes[name]
            return address(pipe.payload(own_region(self.program, pipe.spec), 1))
        return address(self.memory.buffers[name])

    def width(self, name: str) -> int:
        """Values in a row of a buffer, or of this node's region of a pipe."""
        if name in self.memory.pipes:
            pipe = self.memory.pipes[name].spec
            return pipe.widths[own_region(self.program, pipe)]
        return self._widths[name]

    def weight(self, weight: Weight) -> int:
        """Address of a weight."""
        return address(self.memory.weights[self.memory.index(weight)])

    def cache(self, name: str) -> dict[str, float]:
        """The sizes of a cache."""
        spec = self.memory.cache_specs[name]
        n_blocks, kv_heads, _, page_bytes = self.memory.caches[name].shape
        sizes = {"n_blocks": n_blocks, "page_bytes": page_bytes}
        return sizes | {"kind": spec.float_type, "kv_heads": kv_heads, "n": spec.head_dim}

    def keep(self, array: npt.NDArray[Any]) -> int:
        """Address of an array, which is kept as long as the table."""
        self.kept.append(array)
        return address(array)

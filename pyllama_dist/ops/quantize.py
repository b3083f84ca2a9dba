"""Rounding to Q80."""

from collections.abc import Iterator

import numpy as np

from pyllama_dist.config import FloatType
from pyllama_dist.executor.lowering import Cut, Lowering, Row
from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import Buffer, Count, Name, Op, Part, Shapes
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference
from pyllama_kernels.layout import activation_bytes


class Quantize(Part, Op, frozen=True, tag="quantize"):
    """target = source, rounded to Q80; each head by itself, for a `Matmul` of as many heads.

    A buffer gets the tiles that matrix products read, a pipe plain blocks.
    """

    source: Name
    target: Name
    heads: Count = 1

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        width, rows = shapes.width(self.source), shapes.rows(self.source)
        yield Buffer(self.target, FloatType.Q80, width, rows)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        width, target = check.f32(self.source), check.find(self.target)
        require(target.float_type is FloatType.Q80, "target is not Q80")
        require(check.width(self.target) == width, "widths differ")
        require(width % (32 * self.heads) == 0, "heads are not whole blocks")
        require(self.heads == 1 or isinstance(target, Buffer), "a pipe has one head")
        require(target.rows != "experts", "rows for experts are rounded expert by expert")
        check.same_rows(self.source, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        x = memory.f32(self.source)
        if self.target in memory.pipes:
            packed = memory.own_payload(self.target).reshape(-1, 34)
            reference.pack_q80(x.reshape(-1, 32), packed)
            return
        size = activation_bytes(len(x), x.shape[1] // self.heads)
        for head, part in enumerate(np.split(x, self.heads, axis=1)):
            reference.quantize(part, memory.q80(self.target)[head * size :])

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        width = table.width(self.source)
        return [
            table.row(
                "pack_q80" if self.target in table.memory.pipes else "quantize",
                self.target,
                Cut.NUMBERS,
                cost=width,
                by_block=self.heads == 1,
                a=table.at(self.source),
                n=width // self.heads,
                heads=self.heads,
            )
        ]

"""What is done number by number, and what only moves numbers."""

from collections.abc import Iterator

from pyllama_dist.config import FloatType
from pyllama_dist.executor.lowering import Cut, Lowering, Row
from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import Buffer, Count, Name, Op, Part, Shapes
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference


class SiluMul(Part, Op, frozen=True, tag="silu_mul"):
    """target = silu(gate) * up."""

    gate: Name
    up: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield shapes.like(self.target, self.gate)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        check.same(self.gate, self.up)
        check.same(self.gate, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        reference.silu_mul(*map(memory.f32, (self.gate, self.up, self.target)))

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        a, b, n = table.at(self.gate), table.at(self.up), table.width(self.gate)
        cut = Cut.NUMBERS
        return [table.row("silu_mul", self.target, cut, cost=n, by_block=True, a=a, b=b, n=n)]


class Add(Part, Op, frozen=True, tag="add"):
    """target += source."""

    source: Name
    target: Name

    def validate(self, check: Check) -> None:
        """See `Op`."""
        check.same(self.source, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        reference.add(memory.f32(self.source), memory.f32(self.target))

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        a, n = table.at(self.source), table.width(self.source)
        return [table.row("add", self.target, Cut.NUMBERS, cost=n, a=a, n=n)]


class Gather(Part, Op, frozen=True, tag="gather"):
    """target = those rows of source whose logits were asked for."""

    source: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield Buffer(self.target, FloatType.F32, shapes.width(self.source), "logits")

    def validate(self, check: Check) -> None:
        """See `Op`."""
        require(check.f32(self.source) == check.f32(self.target), "widths differ")
        check.batch_rows(self.source)
        require(check.find(self.target).rows == "logits", "target has no logits rows")

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        index = memory.logits[: memory.n_logits]
        reference.gather(memory.f32(self.source), index, memory.f32(self.target))

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        a, n = table.at(self.source), table.width(self.source)
        return [table.row("gather", self.target, Cut.ROWS, cost=n, a=a, n=n)]


class Concat(Part, Op, frozen=True, tag="concat"):
    """Each head of the target is a head of `first`, followed by one of `second`."""

    first: Name
    second: Name
    target: Name
    heads: Count

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        width = shapes.width(self.first) + shapes.width(self.second)
        yield Buffer(self.target, FloatType.F32, width, shapes.rows(self.first))

    def validate(self, check: Check) -> None:
        """See `Op`."""
        first, second = check.f32(self.first), check.f32(self.second)
        require(check.f32(self.target) == first + second, "widths differ")
        require(first % self.heads == second % self.heads == 0, "heads are not whole")
        check.same_rows(self.first, self.target)
        check.same_rows(self.second, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        names = self.first, self.second, self.target
        parts = [memory.f32(name).reshape(memory.n_rows, self.heads, -1) for name in names]
        reference.concat(*parts)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        return [
            table.row(
                "concat",
                self.target,
                Cut.NUMBERS,
                cost=table.width(self.first),
                a=table.at(self.first),
                b=table.at(self.second),
                n=table.width(self.first) // self.heads,
                m=table.width(self.target) // self.heads,
                heads=self.heads,
            )
        ]

"""Norms: of whole rows, or of each head of a row."""

from collections.abc import Iterator

from pyllama_dist.config import FloatType
from pyllama_dist.executor.lowering import Cut, Lowering, Row
from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import Buffer, Name, Op, Part, Shapes, Weight
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference


class RmsNorm(Part, Op, frozen=True, tag="rms_norm"):
    """target = source * rsqrt(mean(source^2) + epsilon) * weight.

    The mean is over as many values as the weight has: over a row, or over each head of a row.
    """

    source: Name
    target: Name
    weight: Weight
    epsilon: float

    def weights(self) -> tuple[Weight, ...]:
        """See `Op`."""
        return (self.weight,)

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield shapes.like(self.target, self.source)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        check.same(self.source, self.target)
        width = self.weight.shape[1]
        check.weight(self.weight, (1, width), FloatType.F32)
        require(width > 0 and check.f32(self.source) % width == 0, "heads are not whole")
        check.number("epsilon", self.epsilon, 0)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        weight = memory.vector(self.weight)
        heads = memory.heads(self.source, weight.size).reshape(-1, weight.size)
        normed = memory.heads(self.target, weight.size).reshape(-1, weight.size)
        reference.rms_norm(heads, weight, self.epsilon, normed)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        n, width = self.weight.shape[1], table.width(self.source)
        return [
            table.row(
                "rms_norm",
                self.target,
                Cut.ROWS,
                cost=width,
                by_head=True,
                a=table.at(self.source),
                w=table.weight(self.weight),
                n=n,
                heads=width // n,
                epsilon=self.epsilon,
            )
        ]


class LayerNorm(Part, Op, frozen=True, tag="layer_norm"):
    """target = (source - mean(source)) * rsqrt(variance(source) + epsilon) * weight + bias."""

    source: Name
    target: Name
    weight: Weight
    bias: Weight
    epsilon: float

    def weights(self) -> tuple[Weight, ...]:
        """See `Op`."""
        return self.weight, self.bias

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield shapes.like(self.target, self.source)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        width = check.f32(self.source)
        check.same(self.source, self.target)
        check.weight(self.weight, (1, width), FloatType.F32)
        check.weight(self.bias, (1, width), FloatType.F32)
        check.number("epsilon", self.epsilon, 0)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        weight, bias = memory.vector(self.weight), memory.vector(self.bias)
        rows, normed = memory.f32(self.source), memory.f32(self.target)
        reference.layer_norm(rows, weight, bias, self.epsilon, normed)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        n = table.width(self.source)
        return [
            table.row(
                "layer_norm",
                self.target,
                Cut.ROWS,
                cost=n,
                a=table.at(self.source),
                w=table.weight(self.weight),
                c=table.weight(self.bias),
                n=n,
                epsilon=self.epsilon,
            )
        ]

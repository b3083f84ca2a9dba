"""Products with the matrices of a layer."""

from collections.abc import Iterator

import numpy as np

from pyllama_dist.config import FloatType
from pyllama_dist.executor.arena import U8
from pyllama_dist.executor.lowering import Cut, Lowering, Row
from pyllama_dist.executor.memory import F32, Memory
from pyllama_dist.program import Buffer, Count, Name, Op, Part, Shapes, Weight
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference
from pyllama_kernels.layout import activation_bytes


class Matmul(Part, Op, frozen=True, tag="matmul"):
    """target = source @ weight.T + bias.

    With several heads, the weight is a stack of as many matrices: each multiplies its part of the
    source, and makes its part of the target.
    """

    source: Name
    target: Name
    weight: Weight
    bias: Weight | None = None
    heads: Count = 1

    def weights(self) -> tuple[Weight, ...]:
        """See `Op`."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        rows = shapes.rows(self.source)
        yield Buffer(self.target, FloatType.F32, self.weight.shape[0], rows)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        rows, cols = self.weight.shape
        float_type = self.weight.float_type
        check_factor(check, self.source, float_type)
        require(rows % self.heads == 0, "heads are not whole")
        require(
            self.heads == 1 or rows // self.heads % 16 == 0 or float_type.block == 1,
            "heads are not whole groups of 16 rows",
        )
        inputs = check.width(self.source) // self.heads
        require(inputs * self.heads == check.width(self.source), "heads are not whole")
        check.weight(self.weight, (check.f32(self.target), inputs), float_type)
        if self.bias is not None:
            check.weight(self.bias, (1, rows), FloatType.F32)
        require(cols % float_type.block == 0, "columns are not whole blocks")
        check.same_rows(self.source, self.target)
        require(check.find(self.target).rows != "experts", "rows for experts have weights each")

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        weight, out = memory.matrix(self.weight), memory.f32(self.target)
        bias = np.zeros(out.shape[1], np.float32) if self.bias is None else memory.vector(self.bias)
        n, outs = self.weight.shape[1], np.split(out, self.heads, axis=1)
        weights, biases = np.split(weight, self.heads), np.split(bias, self.heads)
        for head, (w, b, y) in enumerate(zip(weights, biases, outs, strict=True)):
            if self.weight.float_type is FloatType.F32:
                x: F32 | U8 = memory.f32(self.source)[:, head * n : (head + 1) * n]
            else:
                x = memory.q80(self.source)[head * activation_bytes(len(out), n) :]
            multiply(self.weight.float_type, x, w, b, y)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        m, n = self.weight.shape
        return [
            table.row(
                "multiply",
                self.target,
                Cut.PRODUCTS,
                a=table.at(self.source),
                w=table.weight(self.weight),
                c=table.weight(self.bias) if self.bias is not None else 0,
                n=n,
                m=m,
                heads=self.heads,
                kind=self.weight.float_type,
            )
        ]


def check_factor(check: Check, source: str, float_type: FloatType) -> None:
    """Checks that weights of this type can be multiplied with this memory."""
    types = (FloatType.F32, FloatType.Q40, FloatType.Q80)
    require(float_type in types, f"{float_type.name} weights")
    quantized, memory = float_type is not FloatType.F32, check.find(source)
    require(isinstance(memory, Buffer) or not quantized, "a quantized input must be a buffer")
    require(
        memory.float_type is (FloatType.Q80 if quantized else FloatType.F32),
        "the input's type does not go with the weight's",
    )


def multiply(float_type: FloatType, x: F32 | U8, weight: U8, bias: F32, out: F32) -> None:
    """A batch, or its tiles, times one matrix: the reference implementation."""
    if float_type is FloatType.F32:
        reference.matmul_f32(x.view(np.float32), weight.view(np.float32), bias, out)
    elif float_type is FloatType.Q40:
        reference.matmul_q40(x.view(np.uint8), len(out), weight, bias, out)
    else:
        size = float_type.block_bytes
        blocks = weight.reshape(len(weight), weight.shape[1] // size, size)
        reference.matmul_q80(x.view(np.uint8), len(out), blocks, bias, out)

"""The plain executor: op after op, with the NumPy twins. The one to step through."""

from types import TracebackType
from typing import Self

import numpy as np

from pyllama_dist.config import FloatType
from pyllama_dist.executor.memory import F32, U8, Memory
from pyllama_dist.program import (
    Add,
    Attention,
    Batch,
    Gather,
    Matmul,
    Merge,
    Op,
    Program,
    Quantize,
    RmsNorm,
    Rope,
    SiluMul,
    StoreKv,
    Weight,
    own_slot,
    weights,
)
from pyllama_kernels import reference as kernels


class ReferenceExecutor:
    """Runs a program op after op. See `Executor`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.memory = Memory(program)
        # Ops hold equal weights only if they are the same part of the same tensor.
        self._held = {weight: index for index, weight in enumerate(weights(program))}
        self._caches = {cache.name: cache for cache in program.caches}
        self._rows = {pipe.name: pipe.rows for pipe in program.pipes}
        self._rows |= {buffer.name: buffer.rows for buffer in program.buffers}

    def begin(self, batch: Batch) -> None:
        """Takes the rows that the segments will work on."""
        self.memory.set_batch(batch)

    def run(self, segment: int) -> None:
        """Runs the ops of one segment."""
        for op in self.program.segments[segment].ops:
            self.run_op(op)

    def end(self) -> None:
        """Ends the step."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run_op(self, op: Op) -> None:
        """Runs one op on the rows of the batch."""
        m = self.memory
        slots, positions = m.slots[: m.n_rows], m.positions[: m.n_rows]
        match op:
            case RmsNorm():
                weight = self._weight(op.weight).view(np.float32)[0]
                kernels.rms_norm(self._f32(op.source), weight, op.epsilon, self._f32(op.target))
            case Quantize():
                x = self._f32(op.source)
                if op.target in m.pipes:
                    packed = self._own_payload(op.target).reshape(-1, 34)
                    kernels.pack_q80(x.reshape(-1, 32), packed)
                else:
                    kernels.quantize(x, self._q80(op.target))
            case Matmul():
                self._matmul(op)
            case Rope():
                cos, sin = m.rope[op.rotary_dim, op.theta]
                kernels.rope(positions, cos, sin, self._heads(op.target, op.head_dim))
            case StoreKv():
                for source, name, store in (
                    (op.keys, op.key_cache, kernels.store_keys),
                    (op.values, op.value_cache, kernels.store_values),
                ):
                    spec = self._caches[name]
                    x = self._heads(source, spec.head_dim)
                    store(x, slots, positions, spec.float_type, m.caches[name])
            case Attention():
                spec = self._caches[op.key_cache]
                kernels.attention(
                    self._heads(op.query, spec.head_dim),
                    m.caches[op.key_cache],
                    m.caches[op.value_cache],
                    spec.float_type,
                    slots,
                    positions,
                    op.first,
                    op.group,
                    self._heads(op.target, spec.head_dim),
                )
            case SiluMul():
                kernels.silu_mul(self._f32(op.gate), self._f32(op.up), self._f32(op.target))
            case Merge():
                self._merge(op)
            case Add():
                kernels.add(self._f32(op.source), self._f32(op.target))
            case Gather():
                index = m.logits[: m.n_logits]
                kernels.gather(self._f32(op.source), index, self._f32(op.target))

    def _matmul(self, op: Matmul) -> None:
        weight, out = self._weight(op.weight), self._f32(op.target)
        bias = (
            np.empty(0, np.float32)
            if op.bias is None
            else self._weight(op.bias).view(np.float32)[0]
        )
        if op.weight.float_type is FloatType.F32:
            kernels.matmul_f32(self._f32(op.source), weight.view(np.float32), bias, out)
            return
        if op.weight.float_type is FloatType.Q40:
            kernels.matmul_q40(self._q80(op.source), len(out), weight, bias, out)
        else:
            blocks = weight.reshape(len(weight), -1, op.weight.float_type.block_bytes)
            kernels.matmul_q80(self._q80(op.source), len(out), blocks, bias, out)

    def _merge(self, op: Merge) -> None:
        pipe = self.memory.pipes[op.source]
        parts = np.stack([pipe.payload(slot, self._count(op.source)) for slot in pipe.held])
        out = self._f32(op.target)
        if pipe.spec.float_type is FloatType.F32:
            kernels.merge_f32(parts.view(np.float32).reshape(len(parts), -1), out.reshape(-1))
        else:
            kernels.merge_q80(parts.reshape(len(parts), -1, 34), out.reshape(-1, 32))

    def _count(self, name: str) -> int:
        return self.memory.n_rows if self._rows[name] == "batch" else self.memory.n_logits

    def _own_payload(self, name: str) -> U8:
        pipe = self.memory.pipes[name]
        return pipe.payload(own_slot(self.program, pipe.spec), self._count(name))

    def _f32(self, name: str) -> F32:
        """A float32 buffer, or this node's slot of a pipe: [rows, width], not a copy."""
        if name in self.memory.pipes:
            return self._own_payload(name).view(np.float32)
        return self.memory.buffers[name].view(np.float32)[: self._count(name)]

    def _q80(self, name: str) -> U8:
        """The tiles of a Q80 buffer, uint8."""
        return self.memory.buffers[name].view(np.uint8)

    def _heads(self, name: str, head_dim: int) -> F32:
        x = self._f32(name)
        return x.reshape(len(x), -1, head_dim)

    def _weight(self, weight: Weight) -> U8:
        return self.memory.matrix(self._held[weight])

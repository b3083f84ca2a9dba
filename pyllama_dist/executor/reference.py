"""The plain executor: op after op, with the NumPy twins. The one to step through."""

from types import TracebackType
from typing import Self

import numpy as np

from pyllama_dist.config import FloatType, Pairs, Scoring
from pyllama_dist.executor.arena import U8
from pyllama_dist.executor.memory import F32, I64, Memory, rope_kind
from pyllama_dist.program import (
    Add,
    Attention,
    Batch,
    Combine,
    Concat,
    Dispatch,
    ExpertMatmul,
    Gather,
    LayerNorm,
    Matmul,
    Merge,
    Op,
    Program,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    Select,
    SiluMul,
    Store,
    Weight,
    own_slot,
    weights,
)
from pyllama_kernels import reference as kernels
from pyllama_kernels.blocks import BLOCK
from pyllama_kernels.layout import ROW_BYTES, activation_bytes
from pyllama_kernels.plans import PAIRS, lists, spans


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
        self._plan: I64 = np.empty(0, np.int64)  # the latest route's

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
        where = m.seqs[: m.n_rows], m.positions[: m.n_rows], m.table
        match op:
            case RmsNorm():
                weight = self._vector(op.weight)
                heads = self._heads(op.source, weight.size).reshape(-1, weight.size)
                normed = self._heads(op.target, weight.size).reshape(-1, weight.size)
                kernels.rms_norm(heads, weight, op.epsilon, normed)
            case LayerNorm():
                weight, bias = self._vector(op.weight), self._vector(op.bias)
                rows, normed = self._f32(op.source), self._f32(op.target)
                kernels.layer_norm(rows, weight, bias, op.epsilon, normed)
            case Quantize():
                x = self._f32(op.source)
                if op.target in m.pipes:
                    packed = self._own_payload(op.target).reshape(-1, 34)
                    kernels.pack_q80(x.reshape(-1, 32), packed)
                elif self._rows[op.target] == "experts":
                    kernels.quantize_experts(x, self._plan, self._q80(op.target))
                else:
                    tiles = self._q80(op.target)
                    size = activation_bytes(len(x), x.shape[1] // op.heads)
                    for head, part in enumerate(np.split(x, op.heads, axis=1)):
                        kernels.quantize(part, tiles[head * size :])
            case Matmul():
                self._matmul(op)
            case Rope():
                cos, sin = m.rope[rope_kind(op)]
                halves, x = op.pairs is Pairs.HALVES, self._heads(op.target, op.head_dim)
                kernels.rope(m.positions[: m.n_rows], cos, sin, halves, x)
            case Concat():
                parts = [
                    self._f32(name).reshape(m.n_rows, op.heads, -1)
                    for name in (op.first, op.second, op.target)
                ]
                kernels.concat(*parts)
            case Store():
                spec = self._caches[op.cache]
                store = kernels.store_keys if op.keys else kernels.store_values
                x = self._heads(op.source, spec.head_dim)
                store(x, *where, spec.float_type, m.caches[op.cache])
            case Attention():
                spec = self._caches[op.key_cache]
                query = self._heads(op.query, spec.head_dim)
                no_mask = np.empty((0, 0), np.float32)
                kernels.attention(
                    query,
                    m.caches[op.key_cache],
                    m.caches[op.value_cache],
                    spec.float_type,
                    *where,
                    op.first,
                    op.group,
                    op.scale,
                    self._f32(op.selection) if op.selection else no_mask,
                    self._f32(op.target).reshape(*query.shape[:2], -1),
                )
            case Select():
                spec = self._caches[op.cache]
                kernels.select(
                    self._heads(op.query, spec.head_dim),
                    self._f32(op.weights),
                    m.caches[op.cache],
                    spec.float_type,
                    *where,
                    op.top_k,
                    op.scale,
                    self._f32(op.target),
                )
            case Route():
                self._route(op)
            case Dispatch():
                plan = m.plans[op.route]
                index = lists(plan)[3][: plan[PAIRS]]
                kernels.gather(self._f32(op.source), index, self._f32(op.target)[: plan[PAIRS]])
            case ExpertMatmul():
                self._expert_matmul(op)
            case Combine():
                source, route, out = (self._f32(n) for n in (op.source, op.route, op.target))
                kernels.combine(source, route, m.plans[op.route], m.program.n_experts, out)
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
        """The product, head by head."""
        weight, out = self._weight(op.weight), self._f32(op.target)
        bias = np.zeros(out.shape[1], np.float32) if op.bias is None else self._vector(op.bias)
        n, outs = op.weight.shape[1], np.split(out, op.heads, axis=1)
        weights, biases = np.split(weight, op.heads), np.split(bias, op.heads)
        for head, (w, b, y) in enumerate(zip(weights, biases, outs, strict=True)):
            if op.weight.float_type is FloatType.F32:
                x: F32 | U8 = self._f32(op.source)[:, head * n : (head + 1) * n]
            else:
                x = self._q80(op.source)[head * activation_bytes(len(out), n) :]
            _product(op.weight.float_type, x, w, b, y)

    def _route(self, op: Route) -> None:
        """Chooses experts, and plans which rows they get."""
        bias = np.empty(0, np.float32) if op.bias is None else self._vector(op.bias)
        source, out = self._f32(op.source), self._f32(op.target)
        softmax, groups = op.scoring is Scoring.SOFTMAX, (op.groups, op.active_groups)
        kernels.route(source, bias, softmax, op.active, *groups, op.normalize, op.scale, out)
        self._plan = self.memory.plans[op.target]
        kernels.make_plan(out, op.active, self._plan)

    def _expert_matmul(self, op: ExpertMatmul) -> None:
        """The product, expert by expert."""
        experts, out = op.weight.each, self._f32(op.target)
        no_bias = np.empty(0, np.float32)
        for expert, pairs, tile in spans(self.memory.plans[op.route]):
            weight = experts[expert]
            if op.weight.float_type is FloatType.F32:
                x: F32 | U8 = self._f32(op.source)[pairs]
            else:
                x = self._q80(op.source)[tile * (weight.shape[1] // BLOCK) * ROW_BYTES :]
            _product(op.weight.float_type, x, self._weight(weight), no_bias, out[pairs])

    def _merge(self, op: Merge) -> None:
        pipe = self.memory.pipes[op.source]
        parts = np.stack([pipe.payload(slot, self._count(op.source)) for slot in pipe.held])
        out = self._f32(op.target)
        if pipe.spec.float_type is FloatType.F32:
            kernels.merge_f32(parts.view(np.float32).reshape(len(parts), -1), out.reshape(-1))
        else:
            kernels.merge_q80(parts.reshape(len(parts), -1, 34), out.reshape(-1, 32))

    def _count(self, name: str) -> int:
        m = self.memory
        return {"batch": m.n_rows, "logits": m.n_logits, "experts": m.n_pairs}[self._rows[name]]

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
        return x.reshape(len(x), x.shape[1] // head_dim, head_dim)

    def _vector(self, weight: Weight) -> F32:
        vector: F32 = self._weight(weight).view(np.float32)[0]
        return vector

    def _weight(self, weight: Weight) -> U8:
        return self.memory.matrix(self._held[weight])


def _product(float_type: FloatType, x: F32 | U8, weight: U8, bias: F32, out: F32) -> None:
    """A batch, or its tiles, times one matrix."""
    if float_type is FloatType.F32:
        kernels.matmul_f32(x.view(np.float32), weight.view(np.float32), bias, out)
    elif float_type is FloatType.Q40:
        kernels.matmul_q40(x.view(np.uint8), len(out), weight, bias, out)
    else:
        blocks = weight.reshape(len(weight), -1, float_type.block_bytes)
        kernels.matmul_q80(x.view(np.uint8), len(out), blocks, bias, out)

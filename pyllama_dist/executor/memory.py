"""The memory of one node: pipes, buffers, caches and weights, all allocated once."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType
from pyllama_dist.program import Batch, Buffer, Cache, Pipe, Program, Rope, slots_used, weights

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
_POSITIONS = 4096  # whose angles are worked out at once
_T = TypeVar("_T", bound=np.generic)

# Before each slot of a pipe, so that a frame's head and its data can be sent as they lie.
HEADROOM = 64
# Slots are this far apart, or a multiple: whole Q80 blocks (34 bytes) and whole cache lines (64).
STRIDE = 1088


def pipe_bytes(program: Program, pipe: Pipe) -> int:
    """Bytes from one slot of a pipe to the next, headroom included."""
    payload = program.rows_of(pipe.rows) * pipe.float_type.row_bytes(max(pipe.widths))
    return -(-(HEADROOM + payload) // STRIDE) * STRIDE


def planned_bytes(program: Program) -> int:
    """Bytes that a node needs for a program, as far as they grow with the model."""
    caches = sum(4 * c.kv_heads * c.head_dim for c in program.caches)
    buffers = sum(program.rows_of(b.rows) * b.width * 4 for b in program.buffers)
    pipes = sum(pipe_bytes(program, p) * len(slots_used(program, p)) for p in program.pipes)
    tables = sum(4 * rotary_dim for rotary_dim, _ in _rope_kinds(program))
    facts = 8 * (2 * program.max_rows + program.max_logits)
    held = sum(weight.nbytes for weight in weights(program))
    kept = (caches * program.n_slots + tables) * program.seq_len
    return held + kept + buffers + pipes + facts


def _rope_kinds(program: Program) -> set[tuple[int, float]]:
    """The rotary_dim and theta of each table that a program needs."""
    ops = (op for segment in program.segments for op in segment.ops)
    return {(op.rotary_dim, op.theta) for op in ops if isinstance(op, Rope)}


@dataclass(frozen=True)
class Q80Buffer:
    """A Q80 buffer as matrices read it: values and scales apart."""

    values: I8  # [max_rows, width]
    scales: F32  # [max_rows, width / 32]


@dataclass(frozen=True)
class PipeMemory:
    """A pipe's slots, each with headroom before its data; slot i may lie at another index."""

    spec: Pipe
    memory: U8  # [slots held, stride]
    held: tuple[int, ...]  # which slots

    def row_bytes(self, slot: int) -> int:
        """Bytes of one row of a slot."""
        return self.spec.float_type.row_bytes(self.spec.widths[slot])

    def frame(self, slot: int, rows: int, head: int) -> memoryview:
        """The first rows of a slot with `head` bytes of its headroom before them."""
        start, size = HEADROOM - head, head + rows * self.row_bytes(slot)
        return self.memory[self.held.index(slot), start : start + size].data

    def payload(self, slot: int, rows: int) -> U8:
        """The first rows of a slot, [rows, bytes] uint8."""
        width = self.row_bytes(slot)
        flat = self.memory[self.held.index(slot), HEADROOM : HEADROOM + rows * width]
        return flat.reshape(rows, width)

    def f32(self, slot: int, rows: int) -> F32:
        """The first rows of a float32 slot, [rows, width]."""
        return self.payload(slot, rows).view(np.float32)


def _zeros(shape: tuple[int, ...], dtype: type[_T]) -> npt.NDArray[_T]:
    """Zeros that start at a cache line; pages that are never touched are never taken."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def rope_tables(seq_len: int, rotary_dim: int, theta: float) -> tuple[F32, F32]:
    """Cosines and sines of position * theta^(-2i / rotary_dim).

    Returns:
        Two arrays [seq_len, rotary_dim / 2] float32.

    Source: rope type "default" of transformers.
    """
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    frequencies = theta ** (-2 * pairs / rotary_dim)
    cos = np.empty((seq_len, len(pairs)), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, seq_len, _POSITIONS):  # in float64, but never all of it
        angles = np.outer(np.arange(start, min(start + _POSITIONS, seq_len)), frequencies)
        cos[start : start + _POSITIONS] = np.cos(angles)
        sin[start : start + _POSITIONS] = np.sin(angles)
    return cos, sin


class Memory:
    """Everything that a program's ops read and write, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.pipes = {pipe.name: self._pipe(pipe) for pipe in program.pipes}
        self.buffers = {buffer.name: self._buffer(buffer) for buffer in program.buffers}
        self.caches = {cache.name: self._cache(cache) for cache in program.caches}
        self.weights: list[U8] = [_zeros((weight.nbytes,), np.uint8) for weight in weights(program)]
        self.rope: dict[tuple[int, float], tuple[F32, F32]] = {
            kind: rope_tables(program.seq_len, *kind) for kind in _rope_kinds(program)
        }
        self.slots: I64 = np.zeros(program.max_rows, np.int64)
        self.positions: I64 = np.zeros(program.max_rows, np.int64)
        self.logits: I64 = np.zeros(program.max_logits, np.int64)
        self.n_rows = self.n_logits = 0

    def _pipe(self, pipe: Pipe) -> PipeMemory:
        held = slots_used(self.program, pipe)
        memory = _zeros((len(held), pipe_bytes(self.program, pipe)), np.uint8)
        return PipeMemory(pipe, memory, held)

    def _buffer(self, buffer: Buffer) -> F32 | Q80Buffer:
        rows = self.program.rows_of(buffer.rows)
        if buffer.float_type is FloatType.F32:
            return _zeros((rows, buffer.width), np.float32)
        return Q80Buffer(
            _zeros((rows, buffer.width), np.int8),
            _zeros((rows, buffer.width // 32), np.float32),
        )

    def _cache(self, cache: Cache) -> F32:
        p = self.program
        return _zeros((p.n_slots, cache.kv_heads, p.seq_len, cache.head_dim), np.float32)

    def set_batch(self, batch: Batch) -> None:
        """The rows that the next segments work on."""
        self.n_rows, self.n_logits = len(batch.slots), len(batch.logits)
        self.slots[: self.n_rows] = batch.slots
        self.positions[: self.n_rows] = batch.positions
        self.logits[: self.n_logits] = batch.logits

"""The memory of one node: pipes, buffers, caches and weights, all allocated once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType, RopeScaling
from pyllama_dist.executor.arena import U8, arena
from pyllama_dist.program import (
    Attention,
    Batch,
    Buffer,
    Cache,
    ExpertMatmul,
    Op,
    Pipe,
    Program,
    Rope,
    Route,
    Weight,
    slots_used,
    weights,
)
from pyllama_kernels.blocks import BLOCK
from pyllama_kernels.layout import (
    GROUP,
    GROUP_BYTES,
    ROW_BYTES,
    activation_bytes,
    pack_weights_in_place,
    packed_rows,
)
from pyllama_kernels.pages import BLOCK_PAGES, KV_BLOCK, count_cells, page_bytes, seq_blocks
from pyllama_kernels.plans import most_tile_rows, new_plan, plan_words

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
RopeKind = tuple[int, float, RopeScaling | None]  # rotary_dim, theta, scaling
_POSITIONS = 4096  # whose angles are worked out at once
_Op = TypeVar("_Op", bound=Op)

# Before each slot of a pipe, so that a frame's head and its data can be sent as they lie.
HEADROOM = 64
# Slots are this far apart, or a multiple: whole Q80 blocks (34 bytes) and whole cache lines (64).
STRIDE = 1088


def pipe_bytes(program: Program, pipe: Pipe) -> int:
    """Bytes from one slot of a pipe to the next, headroom included."""
    payload = program.rows_of(pipe.rows) * pipe.float_type.row_bytes(max(pipe.widths))
    return -(-(HEADROOM + payload) // STRIDE) * STRIDE


def block_bytes(program: Program) -> int:
    """Bytes of one block of all caches of a node."""
    each = (c.kv_heads * c.float_type.row_bytes(c.head_dim) for c in program.caches)
    return KV_BLOCK * sum(each)


def planned_bytes(program: Program) -> int:
    """Bytes that a node needs for a program, as far as they grow with the model."""
    buffers = sum(_buffer_bytes(program, buffer) for buffer in program.buffers)
    pipes = sum(pipe_bytes(program, p) * len(slots_used(program, p)) for p in program.pipes)
    tables = sum(4 * rotary_dim for rotary_dim, _, _ in _rope_kinds(program))
    facts = 8 * (2 * program.max_rows + program.max_logits)
    facts += 8 * program.n_seqs * seq_blocks(program.seq_len)
    held = sum(_room(weight) for weight in weights(program))
    kept = block_bytes(program) * program.n_blocks + tables * program.seq_len
    parts = max((parts_bytes(program, op) for op in ops_of(program, Attention)), default=0)
    plans = sum(8 * _plan_words(program, n_experts) for n_experts in _routes(program).values())
    plans += sum(8 * op.weight.count for op in ops_of(program, ExpertMatmul))  # their addresses
    return held + kept + buffers + pipes + facts + parts + plans


def own_blocks(program: Program) -> tuple[tuple[int, int, int], ...]:
    """The table where each sequence has blocks of its own, as far as there are any."""
    each = seq_blocks(program.seq_len)
    places = ((seq, place) for seq in range(program.n_seqs) for place in range(each))
    blocks = range(program.n_blocks)
    return tuple((seq, place, block) for (seq, place), block in zip(places, blocks, strict=False))


def rope_kind(op: Rope) -> RopeKind:
    """What the table of cosines and sines depends on."""
    return op.rotary_dim, op.theta, op.scaling


def _rope_kinds(program: Program) -> set[RopeKind]:
    """The tables that a program needs."""
    return {rope_kind(op) for op in ops_of(program, Rope)}


def _routes(program: Program) -> dict[str, int]:
    """The buffers that routes are written to, and how many experts each tells apart."""
    routed = {op.target for op in ops_of(program, Route)}
    return {buffer.name: buffer.width for buffer in program.buffers if buffer.name in routed}


def _plan_words(program: Program, n_experts: int) -> int:
    return plan_words(n_experts, program.rows_of("experts"))


def parts_bytes(program: Program, op: Attention) -> int:
    """Bytes of what an attention op finds in each chunk of positions, for a few rows."""
    head_dim = next(c.head_dim for c in program.caches if c.name == op.key_cache)
    width = next(b.width for b in program.buffers if b.name == op.query)
    cells = count_cells(program.seq_len, program.max_rows)
    return 4 * cells * width // head_dim * (head_dim + 2)  # values are no wider than keys


def ops_of(program: Program, kind: type[_Op]) -> Iterator[_Op]:
    """All ops of a kind, in order."""
    for segment in program.segments:
        yield from (op for op in segment.ops if isinstance(op, kind))


def _buffer_bytes(program: Program, buffer: Buffer) -> int:
    rows = program.rows_of(buffer.rows)
    if buffer.float_type is FloatType.F32:
        return 4 * rows * buffer.width
    if buffer.rows == "experts":
        n_experts = max(_routes(program).values(), default=rows)
        return most_tile_rows(rows, n_experts) * (buffer.width // BLOCK) * ROW_BYTES
    # A small batch has small tiles, but never takes more than the largest one.
    return activation_bytes(max(rows, 4), buffer.width)


def _cache_shape(program: Program, cache: Cache) -> tuple[int, ...]:
    size = page_bytes(cache.float_type.value, cache.head_dim)
    return program.n_blocks, cache.kv_heads, BLOCK_PAGES, size


def _room(weight: Weight) -> int:
    """Bytes that a weight takes: matrices of Q40 are kept in groups of 16 rows."""
    rows, cols = weight.shape
    if weight.float_type is FloatType.Q40:
        return packed_rows(rows) * weight.float_type.row_bytes(cols)
    return weight.nbytes


def _typed(program: Program, buffer: Buffer, memory: U8) -> F32 | U8:
    """A buffer's memory as its numbers: [rows, width] float32, or as it is."""
    if buffer.float_type is FloatType.F32:
        return memory.view(np.float32).reshape(program.rows_of(buffer.rows), buffer.width)
    return memory


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


def rope_tables(
    seq_len: int, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[F32, F32]:
    """Cosines and sines of position * theta^(-2i / rotary_dim), the frequencies maybe scaled.

    Returns:
        Two arrays [seq_len, rotary_dim / 2] float32.

    Source: rope types "default" and "llama3" of transformers.
    """
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    frequencies = theta ** (-2 * pairs / rotary_dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    cos = np.empty((seq_len, len(pairs)), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, seq_len, _POSITIONS):  # in float64, but never all of it
        angles = np.outer(np.arange(start, min(start + _POSITIONS, seq_len)), frequencies)
        cos[start : start + _POSITIONS] = np.cos(angles)
        sin[start : start + _POSITIONS] = np.sin(angles)
    return cos, sin


def _scaled(frequencies: npt.NDArray[np.float64], s: RopeScaling) -> npt.NDArray[np.float64]:
    """Long waves are stretched by the factor, short ones stay, those between change over."""
    turns = s.original_max_seq_len * frequencies / (2 * np.pi)  # within the trained length
    span = s.high_freq_factor - s.low_freq_factor
    # Where both are one there is nothing between: long or short.
    share = (turns - s.low_freq_factor) / span if span else turns > s.high_freq_factor
    kept: npt.NDArray[np.float64] = np.clip(share, 0, 1).astype(np.float64)
    return frequencies * (kept + (1 - kept) / s.factor)


class Memory:
    """Everything that a program's ops read and write, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._specs = list(weights(program))
        routes = _routes(program)
        memory = iter(
            arena(
                [
                    (len(slots_used(program, pipe)), pipe_bytes(program, pipe))
                    for pipe in program.pipes
                ]
                + [(_buffer_bytes(program, buffer),) for buffer in program.buffers]
                + [_cache_shape(program, cache) for cache in program.caches]
                + [(8 * _plan_words(program, n_experts),) for n_experts in routes.values()]
                + [(_room(weight),) for weight in self._specs]
            )
        )
        self.pipes = {
            pipe.name: PipeMemory(pipe, next(memory), slots_used(program, pipe))
            for pipe in program.pipes
        }
        self.buffers = {b.name: _typed(program, b, next(memory)) for b in program.buffers}
        self.caches = {cache.name: next(memory) for cache in program.caches}
        # Beside each route: which rows go to which expert.
        self.plans = {
            name: new_plan(n_experts, program.rows_of("experts"), next(memory).view(np.int64))
            for name, n_experts in routes.items()
        }
        self._rooms = list(memory)
        # As they arrive, in the order of a file; `settle` turns them into what kernels read.
        self.weights: list[U8] = [
            room[: weight.nbytes] for room, weight in zip(self._rooms, self._specs, strict=True)
        ]
        self.rope: dict[RopeKind, tuple[F32, F32]] = {
            kind: rope_tables(program.seq_len, *kind) for kind in _rope_kinds(program)
        }
        # Which block holds which positions of a sequence; -1: none.
        self.table: I64 = np.full((program.n_seqs, seq_blocks(program.seq_len)), -1, np.int64)
        self.seqs: I64 = np.zeros(program.max_rows, np.int64)
        self.positions: I64 = np.zeros(program.max_rows, np.int64)
        self.logits: I64 = np.zeros(program.max_logits, np.int64)
        self.n_rows = self.n_logits = self.n_pairs = 0

    def settle(self, index: int) -> None:
        """A weight is complete: brings it into the order in which the kernels read it."""
        weight, room = self._specs[index], self._rooms[index]
        if weight.float_type is FloatType.Q40 and room.size:
            n_blocks = weight.shape[1] // BLOCK
            spare = np.empty(n_blocks * GROUP_BYTES // 2, np.uint16)
            pack_weights_in_place(room.view(np.uint16), n_blocks, spare)

    def matrix(self, index: int) -> U8:
        """A settled weight as kernels read it.

        Returns:
            Q40: [groups, n / 32, 288] uint8; otherwise [rows, bytes] uint8.
        """
        weight, room = self._specs[index], self._rooms[index]
        rows, cols = weight.shape
        if weight.float_type is FloatType.Q40:
            return room.reshape(packed_rows(rows) // GROUP, cols // BLOCK, GROUP_BYTES)
        return room.reshape(rows, weight.float_type.row_bytes(cols))

    def set_batch(self, batch: Batch) -> None:
        """The rows that the next segments work on, and where blocks are from now on."""
        for seq, place, block in batch.table:
            self.table[seq, place] = block
        for source, target in batch.copies:
            for cache in self.caches.values():
                cache[target] = cache[source]
        self.n_rows, self.n_logits = len(batch.seqs), len(batch.logits)
        self.n_pairs = self.n_rows * self.program.n_experts
        self.seqs[: self.n_rows] = batch.seqs
        self.positions[: self.n_rows] = batch.positions
        self.logits[: self.n_logits] = batch.logits

"""The memory of one node: pipes, buffers, caches and weights, all allocated once."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType
from pyllama_dist.executor.arena import U8, arena
from pyllama_dist.program import (
    Batch,
    Buffer,
    Cache,
    Pipe,
    Program,
    Rows,
    Weight,
    all_reduces,
    ops,
    own_region,
    regions_held,
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
from pyllama_kernels.pages import BLOCK_PAGES, KV_BLOCK, page_bytes, seq_blocks
from pyllama_kernels.plans import most_tile_rows

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

# Before each region of a pipe, so that a frame's head and its data can be sent as they lie.
HEADROOM = 64
# Regions are this far apart, or a multiple: whole Q80 blocks (34 bytes) and whole cache lines (64).
STRIDE = 1088


@dataclass(frozen=True)
class Constant:
    """An array, or several, that an op needs beside pipes, buffers and caches.

    Ops that name the same key share what the first one of them makes.
    """

    key: Hashable
    nbytes: int
    make: Callable[[], Any]


def pipe_bytes(program: Program, pipe: Pipe) -> int:
    """Bytes from one region of a pipe to the next, headroom included."""
    payload = program.rows_of(pipe.rows) * pipe.float_type.row_bytes(max(pipe.widths))
    return -(-(HEADROOM + payload) // STRIDE) * STRIDE


def block_bytes(program: Program) -> int:
    """Bytes of one block of all caches of a node."""
    each = (c.kv_heads * c.float_type.row_bytes(c.head_dim) for c in program.caches)
    return KV_BLOCK * sum(each)


def planned_bytes(program: Program) -> int:
    """Bytes that a node needs for a program, as far as they grow with the model."""
    buffers = sum(_buffer_bytes(program, buffer) for buffer in program.buffers)
    pipes = sum(pipe_bytes(program, p) * len(regions_held(program, p)) for p in program.pipes)
    constants = {c.key: c.nbytes for op in ops(program) for c in op.constants(program)}
    facts = 8 * (2 * program.max_rows + program.max_logits)
    facts += 8 * program.n_seqs * seq_blocks(program.seq_len)
    held = sum(_room(weight) + 8 for weight in weights(program))  # and its address
    kept = block_bytes(program) * program.n_blocks
    return held + kept + buffers + pipes + facts + shared_bytes(program) + sum(constants.values())


def own_blocks(program: Program) -> tuple[tuple[int, int, int], ...]:
    """The table where each sequence has blocks of its own, as far as there are any."""
    each = seq_blocks(program.seq_len)
    places = ((seq, place) for seq in range(program.n_seqs) for place in range(each))
    blocks = range(program.n_blocks)
    return tuple((seq, place, block) for (seq, place), block in zip(places, blocks, strict=False))


def shared_bytes(program: Program) -> int:
    """Bytes that the threads share while an op runs: one piece serves all ops."""
    return max((op.shared_bytes(program) for op in ops(program)), default=0)


def scratch_bytes(program: Program) -> int:
    """Bytes that each thread needs while an op runs, whole cache lines: likewise."""
    most = max((op.scratch_bytes(program) for op in ops(program)), default=0)
    return -(-most // 64) * 64


def _buffer_bytes(program: Program, buffer: Buffer) -> int:
    rows = program.rows_of(buffer.rows)
    if buffer.float_type is FloatType.F32:
        return 4 * rows * buffer.width
    if buffer.rows == "experts":
        return most_tile_rows(rows, program.n_experts) * (buffer.width // BLOCK) * ROW_BYTES
    return activation_bytes(rows, buffer.width)


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
    """A pipe's regions, each with headroom before its data; region i may lie at another index.

    `REDUCED`, if it is there, is the last of them.
    """

    spec: Pipe
    memory: U8  # [regions held, stride]
    held: tuple[int, ...]  # which regions

    def row_bytes(self, region: int) -> int:
        """Bytes of one row of a region."""
        return self.spec.float_type.row_bytes(self.spec.widths[region])

    def frame(self, region: int, rows: int, head: int) -> memoryview:
        """The first rows of a region with `head` bytes of its headroom before them."""
        start, size = HEADROOM - head, head + rows * self.row_bytes(region)
        return self.memory[self.held.index(region), start : start + size].data

    def payload(self, region: int, rows: int) -> U8:
        """The first rows of a region, [rows, bytes] uint8."""
        width = self.row_bytes(region)
        flat = self.memory[self.held.index(region), HEADROOM : HEADROOM + rows * width]
        return flat.reshape(rows, width)

    def f32(self, region: int, rows: int) -> F32:
        """The first rows of a float32 region, [rows, width]."""
        return self.payload(region, rows).view(np.float32)


class Memory:
    """Everything that a program's ops read and write, by name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._specs = list(weights(program))
        memory = iter(
            arena(
                [
                    (len(regions_held(program, pipe)), pipe_bytes(program, pipe))
                    for pipe in program.pipes
                ]
                + [(_buffer_bytes(program, buffer),) for buffer in program.buffers]
                + [_cache_shape(program, cache) for cache in program.caches]
                + [(_room(weight),) for weight in self._specs]
            )
        )
        self.pipes = {
            pipe.name: PipeMemory(pipe, next(memory), regions_held(program, pipe))
            for pipe in program.pipes
        }
        self.buffers = {b.name: _typed(program, b, next(memory)) for b in program.buffers}
        self.caches = {cache.name: next(memory) for cache in program.caches}
        self.cache_specs = {cache.name: cache for cache in program.caches}
        self._rooms = list(memory)
        # As they arrive, in the order of a file; `settle` turns them into what kernels read.
        self.weights: list[U8] = [
            room[: weight.nbytes] for room, weight in zip(self._rooms, self._specs, strict=True)
        ]
        # Ops hold equal weights only if they are the same part of the same tensor.
        self._index = {weight: index for index, weight in enumerate(self._specs)}
        self.constants: dict[Hashable, Any] = {}
        for op in ops(program):
            for constant in op.constants(program):
                if constant.key not in self.constants:
                    self.constants[constant.key] = constant.make()
        self._rows: dict[str, Rows] = {part.name: part.rows for part in program.pipes}
        self._rows |= {part.name: part.rows for part in program.buffers}
        # Which block holds which positions of a sequence; -1: none.
        self.table: I64 = np.full((program.n_seqs, seq_blocks(program.seq_len)), -1, np.int64)
        self.seqs: I64 = np.zeros(program.max_rows, np.int64)
        self.positions: I64 = np.zeros(program.max_rows, np.int64)
        self.logits: I64 = np.zeros(program.max_logits, np.int64)
        self.n_rows = self.n_logits = self.n_pairs = 0
        # Of pipes that are reduced: whether the sum is ready in its region, or still to be made.
        self.reduced = {exchange.pipe: False for exchange in all_reduces(program)}

    def settle(self, index: int) -> None:
        """A weight is complete: brings it into the order in which the kernels read it."""
        weight, room = self._specs[index], self._rooms[index]
        if weight.float_type is FloatType.Q40 and room.size:
            n_blocks = weight.shape[1] // BLOCK
            spare = np.empty(n_blocks * GROUP_BYTES // 2, np.uint16)
            pack_weights_in_place(room.view(np.uint16), n_blocks, spare)

    def set_batch(self, batch: Batch) -> None:
        """The rows that the next segments work on, and where blocks are from now on."""
        for seq, place, block in batch.table:
            self.table[seq, place] = block
        for source, target in batch.copies:
            for cache in self.caches.values():
                cache[target] = cache[source]
        self.n_rows, self.n_logits = len(batch.seqs), len(batch.logits)
        self.n_pairs = self.n_rows * self.program.n_active_experts
        self.seqs[: self.n_rows] = batch.seqs
        self.positions[: self.n_rows] = batch.positions
        self.logits[: self.n_logits] = batch.logits

    @property
    def row_places(self) -> tuple[I64, I64, I64]:
        """Where rows are kept: the sequence and the position of each, and the table of blocks."""
        return self.seqs[: self.n_rows], self.row_positions, self.table

    @property
    def row_positions(self) -> I64:
        """The position of each row of the batch."""
        return self.positions[: self.n_rows]

    def rows(self, name: str) -> Rows:
        """What kind of rows a pipe or buffer has."""
        return self._rows[name]

    def count(self, name: str) -> int:
        """How many rows of a pipe or buffer the batch has."""
        counts = {"batch": self.n_rows, "logits": self.n_logits, "experts": self.n_pairs}
        return counts[self._rows[name]]

    def own_payload(self, name: str) -> U8:
        """This node's region of a pipe, the rows of the batch."""
        pipe = self.pipes[name]
        return pipe.payload(own_region(self.program, pipe.spec), self.count(name))

    def f32(self, name: str) -> F32:
        """A float32 buffer, or this node's region of a pipe: [rows, width], not a copy."""
        if name in self.pipes:
            return self.own_payload(name).view(np.float32)
        return self.buffers[name].view(np.float32)[: self.count(name)]

    def q80(self, name: str) -> U8:
        """The tiles of a Q80 buffer, uint8."""
        return self.buffers[name].view(np.uint8)

    def heads(self, name: str, head_dim: int) -> F32:
        """As `f32`, [rows, heads, head_dim]."""
        x = self.f32(name)
        return x.reshape(len(x), x.shape[1] // head_dim, head_dim)

    def index(self, weight: Weight) -> int:
        """The place of a weight among those of the program."""
        return self._index[weight]

    def vector(self, weight: Weight) -> F32:
        """A float32 weight of one row."""
        vector: F32 = self.matrix(weight).view(np.float32)[0]
        return vector

    def matrix(self, weight: Weight) -> U8:
        """A settled weight as kernels read it.

        Returns:
            Q40: [groups, n / 32, 288] uint8; otherwise [rows, bytes] uint8.
        """
        room = self._rooms[self._index[weight]]
        rows, cols = weight.shape
        if weight.float_type is FloatType.Q40:
            return room.reshape(packed_rows(rows) // GROUP, cols // BLOCK, GROUP_BYTES)
        return room.reshape(rows, weight.float_type.row_bytes(cols))

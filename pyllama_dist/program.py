"""The program that a node runs: memory, ops, and the places where nodes exchange data.

A program says everything about one node's part of a model and nothing about the model itself. The
root builds one for each node and sends it; a worker runs what it is sent. The words are
distributed-llama's: a *pipe* is memory that nodes exchange, a *buffer* is a node's own, a *segment*
is a run of ops between two exchanges, a *sync* is an exchange.

Every row of a pipe or buffer belongs to one row of the batch, or, where `rows` is "logits", to one
of those rows of the batch whose logits were asked for.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pyllama_dist.config import FloatType

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Width = Annotated[int, Meta(ge=0, le=1 << 24)]
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Span = tuple[Width, Width]  # start, stop
Rows = Literal["batch", "logits"]


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parts of a program."""


class Pipe(_Part, frozen=True):
    """Memory that nodes exchange: a slot for each node, or one slot in all."""

    name: Name
    float_type: FloatType  # F32, or Q80 as blocks of 34 bytes
    widths: tuple[Width, ...]  # values in a row of each slot
    rows: Rows = "batch"


class Buffer(_Part, frozen=True):
    """A node's own memory, [rows, width]."""

    name: Name
    float_type: FloatType  # F32, or Q80 as values and scales
    width: Width
    rows: Rows = "batch"


class Cache(_Part, frozen=True):
    """Keys or values of one layer: head_dim numbers for each slot, key head and position."""

    name: Name
    float_type: FloatType  # F32, F16 or Q80
    kv_heads: Count
    head_dim: Count


class Weight(_Part, frozen=True):
    """The part of a tensor that a node holds: `rows` x `cols` of it."""

    tensor: Name
    float_type: FloatType
    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the part."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the part in the `.m` file's format."""
        return self.shape[0] * self.float_type.row_bytes(self.shape[1])


class RmsNorm(_Part, frozen=True, tag="rms_norm"):
    """target = source * rsqrt(mean(source^2) + epsilon) * weight, row by row."""

    source: Name
    target: Name
    weight: Weight
    epsilon: float


class Quantize(_Part, frozen=True, tag="quantize"):
    """target = source, rounded to Q80."""

    source: Name
    target: Name


class Matmul(_Part, frozen=True, tag="matmul"):
    """target = source @ weight.T + bias."""

    source: Name
    target: Name
    weight: Weight
    bias: Weight | None = None


class Rope(_Part, frozen=True, tag="rope"):
    """Turns the first `rotary_dim` values of each head in place, in pairs (2i, 2i+1)."""

    target: Name
    head_dim: Count
    rotary_dim: Width
    theta: float


class StoreKv(_Part, frozen=True, tag="store_kv"):
    """Writes each row's keys and values into the caches at the row's slot and position."""

    keys: Name
    values: Name
    key_cache: Name
    value_cache: Name


class Attention(_Part, frozen=True, tag="attention"):
    """target = softmax(query @ keys.T / sqrt(head_dim)) @ values, over positions up to the row's.

    Query head h of this node reads key head (first + h) // group of its caches.
    """

    query: Name
    target: Name
    key_cache: Name
    value_cache: Name
    group: Count  # query heads that share a key head
    first: Width  # place of this node's first query head in its group


class SiluMul(_Part, frozen=True, tag="silu_mul"):
    """target = silu(gate) * up."""

    gate: Name
    up: Name
    target: Name


class Merge(_Part, frozen=True, tag="merge"):
    """target = the sum of a pipe's slots, added in the order of the nodes."""

    source: Name
    target: Name


class Add(_Part, frozen=True, tag="add"):
    """target += source."""

    source: Name
    target: Name


class Gather(_Part, frozen=True, tag="gather"):
    """target = those rows of source whose logits were asked for."""

    source: Name
    target: Name


Op = RmsNorm | Quantize | Matmul | Rope | StoreKv | Attention | SiluMul | Merge | Add | Gather


class SyncKind(StrEnum):
    """How a pipe is exchanged. The names are distributed-llama's."""

    WITH_ROOT = "with_root"  # the root's slot goes to every worker
    NODE_SLICES = "node_slices"  # every node's slot goes to every other node
    NODE_SLICES_EXCEPT_ROOT = "node_slices_except_root"  # every worker's slot goes to the root


class Sync(_Part, frozen=True):
    """One exchange of a pipe."""

    pipe: Name
    kind: SyncKind


class Segment(_Part, frozen=True):
    """Ops that run without a word to other nodes, then exchanges."""

    name: Name
    ops: tuple[Op, ...] = ()
    syncs: tuple[Sync, ...] = ()


class Program(_Part, frozen=True):
    """What one node runs for each step."""

    n_nodes: Count
    node: Width  # this node's index; the root is 0
    max_rows: Count  # rows of the largest batch
    max_logits: Count  # rows of a batch whose logits can be asked for
    n_slots: Count  # sequences whose keys and values are kept
    seq_len: Count  # positions of a sequence
    pipes: tuple[Pipe, ...]
    buffers: tuple[Buffer, ...]
    caches: tuple[Cache, ...]
    segments: tuple[Segment, ...]

    def rows_of(self, rows: Rows) -> int:
        """The most rows that memory of this kind holds."""
        return self.max_rows if rows == "batch" else self.max_logits


class Batch(_Part, frozen=True):
    """The rows of one step: for each its sequence and position, and which rows need logits."""

    slots: tuple[Width, ...]
    positions: tuple[Width, ...]
    logits: tuple[Width, ...]  # places in the batch


def own_slot(program: Program, pipe: Pipe) -> int:
    """The slot of a pipe that this node writes."""
    return program.node if len(pipe.widths) > 1 else 0


def slots_used(program: Program, pipe: Pipe) -> tuple[int, ...]:
    """The slots of a pipe that this node needs memory for.

    Every slot, but for a pipe that only the root collects: there a worker has its own alone.
    """
    kinds = {sync.kind for s in program.segments for sync in s.syncs if sync.pipe == pipe.name}
    if program.node > 0 and kinds == {SyncKind.NODE_SLICES_EXCEPT_ROOT}:
        return (own_slot(program, pipe),)
    return tuple(range(len(pipe.widths)))


def weights(program: Program) -> Iterator[Weight]:
    """The weights of all ops, in their order: the wire names a weight by its place here."""
    for segment in program.segments:
        for op in segment.ops:
            match op:
                case RmsNorm():
                    yield op.weight
                case Matmul():
                    yield op.weight
                    if op.bias is not None:
                        yield op.bias

"""The program that a node runs: memory, ops, and the places where nodes exchange data.

A program says everything about one node's part of a model and nothing about the model itself. The
root builds one for each node and sends it; a worker runs what it is sent. The words are
distributed-llama's: a *pipe* is memory that nodes exchange, a *buffer* is a node's own, a *segment*
is a run of ops between two exchanges, a *sync* is an exchange.

Every row of a pipe or buffer belongs to one row of the batch; or, where `rows` is "logits", to one
of those rows of the batch whose logits were asked for; or, where it is "experts", to one row of the
batch and one expert chosen for it, in the order of the experts.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, Struct

from pyllama_dist.config import FloatType, Pairs, RopeScaling, Scoring

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Width = Annotated[int, Meta(ge=0, le=1 << 24)]
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Span = tuple[Width, Width]  # start, stop
Rows = Literal["batch", "logits", "experts"]


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
    """What one layer keeps: head_dim numbers for each block, key head and position in it."""

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


class ExpertWeight(_Part, frozen=True):
    """The parts of the same matrix of every expert; `{}` in the tensor's name is the expert."""

    tensor: Name
    count: Annotated[int, Meta(ge=1, le=4096)]
    float_type: FloatType
    rows: Span
    cols: Span

    @property
    def each(self) -> tuple[Weight, ...]:
        """The weight of each expert."""
        return tuple(
            Weight(self.tensor.replace("{}", str(i)), self.float_type, self.rows, self.cols)
            for i in range(self.count)
        )


class RmsNorm(_Part, frozen=True, tag="rms_norm"):
    """target = source * rsqrt(mean(source^2) + epsilon) * weight.

    The mean is over as many values as the weight has: over a row, or over each head of a row.
    """

    source: Name
    target: Name
    weight: Weight
    epsilon: float


class LayerNorm(_Part, frozen=True, tag="layer_norm"):
    """target = (source - mean(source)) * rsqrt(variance(source) + epsilon) * weight + bias."""

    source: Name
    target: Name
    weight: Weight
    bias: Weight
    epsilon: float


class Quantize(_Part, frozen=True, tag="quantize"):
    """target = source, rounded to Q80; each head by itself, for a `Matmul` of as many heads."""

    source: Name
    target: Name
    heads: Count = 1


class Matmul(_Part, frozen=True, tag="matmul"):
    """target = source @ weight.T + bias.

    With several heads, the weight is a stack of as many matrices: each multiplies its part of the
    source, and makes its part of the target.
    """

    source: Name
    target: Name
    weight: Weight
    bias: Weight | None = None
    heads: Count = 1


class Rope(_Part, frozen=True, tag="rope"):
    """Turns the first `rotary_dim` values of each head in place."""

    target: Name
    head_dim: Count
    rotary_dim: Width
    theta: float
    pairs: Pairs = Pairs.ADJACENT
    scaling: RopeScaling | None = None


class Concat(_Part, frozen=True, tag="concat"):
    """Each head of the target is a head of `first`, followed by one of `second`."""

    first: Name
    second: Name
    target: Name
    heads: Count


class Store(_Part, frozen=True, tag="store"):
    """Writes each row into a cache, at the row's sequence and position.

    A cache of keys is laid out for products with queries; so is what serves as keys and values.
    """

    source: Name
    cache: Name
    keys: bool


class Attention(_Part, frozen=True, tag="attention"):
    """target = softmax(query @ keys.T * scale) @ values, over positions up to the row's.

    Query head h of this node reads key head (first + h) // group of its caches. Where both caches
    are the same one, values are the first numbers of the keys, as many as the target's heads have.
    With a selection, only the positions that it holds are seen.
    """

    query: Name
    target: Name
    key_cache: Name
    value_cache: Name
    group: Count  # query heads that share a key head
    first: Width  # place of this node's first query head in its group
    scale: float
    selection: Name | None = None


class Select(_Part, frozen=True, tag="select"):
    """target = 0 at the positions whose scores are the `top_k` highest, -inf at all others.

    score = sum over heads h of weights[h] * relu(query[h] @ key * scale), for the positions up to
    the row's; of equal scores the earlier position wins. The target is seq_len wide.
    """

    query: Name
    weights: Name  # one for each head of the query
    cache: Name
    target: Name
    top_k: Count
    scale: float


class Route(_Part, frozen=True, tag="route"):
    """target = the weight of each expert in a row, 0 for those that are not chosen.

    Scores are made of the source; those plus bias decide who is chosen: the groups whose best two
    have the largest sum, and in them the `active` largest. The weights are the scores without bias.
    Source: modeling_glm4_moe.py of transformers; DeepSeek-V3, 2024.
    """

    source: Name
    target: Name
    bias: Weight | None
    scoring: Scoring
    active: Count
    groups: Count
    active_groups: Count
    normalize: bool
    scale: float


class Dispatch(_Part, frozen=True, tag="dispatch"):
    """target = the rows of source, once for each expert chosen for them."""

    source: Name
    route: Name
    target: Name


class ExpertMatmul(_Part, frozen=True, tag="expert_matmul"):
    """target = source @ weight.T, each row with the weight of its expert."""

    source: Name
    route: Name
    target: Name
    weight: ExpertWeight


class Combine(_Part, frozen=True, tag="combine"):
    """target = for each row of the batch, the sum of its experts' rows times their weights."""

    source: Name
    route: Name
    target: Name


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


Op = (
    RmsNorm
    | LayerNorm
    | Quantize
    | Matmul
    | Rope
    | Concat
    | Store
    | Attention
    | Select
    | SiluMul
    | Route
    | Dispatch
    | ExpertMatmul
    | Combine
    | Merge
    | Add
    | Gather
)


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
    n_experts: Width  # experts chosen for each row
    n_seqs: Count  # sequences whose keys and values are kept
    n_blocks: Count  # that caches are made of: see `pyllama_kernels.pages`
    seq_len: Count  # positions of a sequence, at most
    pipes: tuple[Pipe, ...]
    buffers: tuple[Buffer, ...]
    caches: tuple[Cache, ...]
    segments: tuple[Segment, ...]

    def rows_of(self, rows: Rows) -> int:
        """The most rows that memory of this kind holds."""
        return {
            "batch": self.max_rows,
            "logits": self.max_logits,
            "experts": self.max_rows * self.n_experts,
        }[rows]


class Batch(_Part, frozen=True):
    """The rows of one step: for each its sequence and position, and which rows need logits.

    Before they are worked on, blocks are given to sequences, and then copied, in these orders.
    """

    seqs: tuple[Width, ...]
    positions: tuple[Width, ...]
    logits: tuple[Width, ...]  # places in the batch
    table: tuple[tuple[Width, Width, Width], ...] = ()  # sequence, place in it, block
    copies: tuple[tuple[Width, Width], ...] = ()  # blocks of all caches: source, target


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
                case LayerNorm():
                    yield op.weight
                    yield op.bias
                case Route(bias=Weight() as bias):
                    yield bias
                case ExpertMatmul():
                    yield from op.weight.each

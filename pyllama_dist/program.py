"""The program that a node runs: memory, ops, and the places where nodes exchange data.

A program says everything about one node's part of a model and nothing about the model itself. The
root builds one for each node and sends it; a worker runs what it is sent. The words are
distributed-llama's: a *pipe* is memory that nodes exchange, a *buffer* is a node's own, a *segment*
is a run of ops between two exchanges, a *sync* is an exchange.

Every row of a pipe or buffer belongs to one row of the batch; or, where `rows` is "logits", to one
of those rows of the batch whose logits were asked for; or, where it is "experts", to one row of the
batch and one expert chosen for it, in the order of the experts.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from pyllama_dist.config import FloatType

if TYPE_CHECKING:
    from pyllama_dist.executor.lowering import Lowering, Row
    from pyllama_dist.executor.memory import Constant, Memory
    from pyllama_dist.validate import Check

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Width = Annotated[int, Meta(ge=0, le=1 << 24)]
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Span = tuple[Width, Width]  # start, stop
Rows = Literal["batch", "logits", "experts"]


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parts of a program."""


class Pipe(Part, frozen=True):
    """Memory that nodes exchange: a region for each node, or one region in all."""

    name: Name
    float_type: FloatType  # F32, or Q80 as blocks of 34 bytes
    widths: tuple[Width, ...]  # values in a row of each region
    rows: Rows = "batch"


class Buffer(Part, frozen=True):
    """A node's own memory, [rows, width]."""

    name: Name
    float_type: FloatType  # F32, or Q80 as values and scales
    width: Width
    rows: Rows = "batch"


class Cache(Part, frozen=True):
    """What one layer keeps: head_dim numbers for each block, key head and position in it."""

    name: Name
    float_type: FloatType  # F32, F16 or Q80
    kv_heads: Count
    head_dim: Count


class Weight(Part, frozen=True):
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


class ExpertWeight(Part, frozen=True):
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


class Op:
    """Something that a node does with its memory between two exchanges.

    An op is a frozen `Part`, with a tag that names it on the wire. It says everything about itself
    but the kernel: which weights and memory it needs, what must hold of them, how NumPy computes
    it, and which rows of the compiled table it becomes. Memory, checks and both executors are made
    of that. Those of this package are in `ops`.
    """

    __slots__ = ()

    def weights(self) -> "tuple[Weight, ...]":
        """The weights that it reads. The wire names them in this order."""
        return ()

    def outputs(self, shapes: "Shapes") -> "Iterable[Buffer]":
        """The buffers that it writes, as wide as what it reads asks for."""
        return ()

    def constants(self, program: "Program") -> "Iterable[Constant]":
        """Arrays that it needs beside pipes, buffers and caches."""
        return ()

    def shared_bytes(self, program: "Program") -> int:
        """Bytes that its threads share while it runs."""
        return 0

    def scratch_bytes(self, program: "Program") -> int:
        """Bytes that each of its threads needs while it runs."""
        return 0

    def validate(self, check: "Check") -> None:
        """Checks it against the memory that it names: compiled code trusts it.

        Raises:
            ProtocolError: it would leave its memory, or misread it.
        """
        raise NotImplementedError

    def run(self, memory: "Memory") -> None:
        """Computes it with the reference implementation, for all rows of the batch."""
        raise NotImplementedError

    def lower(self, table: "Lowering") -> "list[Row]":
        """It as rows of the compiled table."""
        raise NotImplementedError


# The region of a pipe for the sum of all nodes' regions, where an `AllReduce` makes it to be sent.
REDUCED = -1


class SyncKind(StrEnum):
    """How a pipe is exchanged. The names are distributed-llama's."""

    WITH_ROOT = "with_root"  # the root's region goes to every worker
    NODE_SLICES_EXCEPT_ROOT = "node_slices_except_root"  # every worker's region goes to the root


class Sync(Part, frozen=True, tag="sync"):
    """One exchange of a pipe."""

    pipe: Name
    kind: SyncKind


class AllReduce(Part, frozen=True, tag="all_reduce"):
    """target = on every node, the sum of all nodes' regions of a pipe, added in their order.

    How it travels is chosen when the program runs; all nodes end with the same bits. The sum is
    there when the next segment begins.
    """

    pipe: Name
    target: Name

    def outputs(self, shapes: "Shapes") -> "Iterable[Buffer]":
        """See `Op`."""
        yield shapes.like(self.target, self.pipe)


class Segment(Part, frozen=True):
    """Ops that run without a word to other nodes, then exchanges."""

    name: Name
    ops: tuple[Op, ...] = ()
    syncs: tuple[Sync | AllReduce, ...] = ()


class Program(Part, frozen=True):
    """What one node runs for each step."""

    n_nodes: Count
    node: Width  # this node's index; the root is 0
    max_rows: Count  # rows of the largest batch
    max_logits: Count  # rows of a batch whose logits can be asked for
    n_experts: Width  # experts that rows choose from
    n_active_experts: Width  # chosen for each row
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
            "experts": self.max_rows * self.n_active_experts,
        }[rows]


class Batch(Part, frozen=True):
    """The rows of one step: for each its sequence and position, and which rows need logits.

    Before they are worked on, blocks are given to sequences, and then copied, in these orders.
    """

    seqs: tuple[Width, ...]
    positions: tuple[Width, ...]
    logits: tuple[Width, ...]  # places in the batch
    table: tuple[tuple[Width, Width, Width], ...] = ()  # sequence, place in it, block
    copies: tuple[tuple[Width, Width], ...] = ()  # blocks of all caches: source, target


class Shapes:
    """The pipes of a node, and the buffers that its ops have written so far.

    Attributes:
        caches: by their names.
        seq_len: positions of a sequence.
    """

    def __init__(
        self, pipes: Iterable[Pipe], caches: Iterable[Cache], *, node: int, seq_len: int
    ) -> None:
        self.caches, self.seq_len = {cache.name: cache for cache in caches}, seq_len
        self._node = node
        self._memory: dict[str, Pipe | Buffer] = {pipe.name: pipe for pipe in pipes}

    def add(self, op: Op | AllReduce) -> None:
        """Adds what an op or a sum writes; what was written before stays as it is."""
        for buffer in op.outputs(self):
            self._memory.setdefault(buffer.name, buffer)

    def width(self, name: str) -> int:
        """Values in a row of a buffer, or of this node's region of a pipe."""
        match self._memory[name]:
            case Pipe(widths=widths):
                return widths[self._node if len(widths) > 1 else 0]
            case Buffer(width=width):
                return width

    def rows(self, name: str) -> Rows:
        """What kind of rows a pipe or buffer has."""
        return self._memory[name].rows

    def like(self, target: str, source: str) -> Buffer:
        """A float32 buffer as wide as another, and with such rows."""
        return Buffer(target, FloatType.F32, self.width(source), self.rows(source))

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All buffers, in the order in which they are first written."""
        return tuple(part for part in self._memory.values() if isinstance(part, Buffer))


def all_reduces(program: Program) -> list[AllReduce]:
    """All kinds of them, each once."""
    exchanges = (exchange for segment in program.segments for exchange in segment.syncs)
    return list(dict.fromkeys(e for e in exchanges if isinstance(e, AllReduce)))


def own_region(program: Program, pipe: Pipe) -> int:
    """The region of a pipe that this node writes."""
    return program.node if len(pipe.widths) > 1 else 0


def regions_held(program: Program, pipe: Pipe) -> tuple[int, ...]:
    """The regions of a pipe that this node needs memory for.

    All regions, except of a pipe that only the root collects: there a worker holds its own alone. A
    pipe that is reduced has one more region, `REDUCED`, for the sum.
    """
    syncs = {sync for s in program.segments for sync in s.syncs if sync.pipe == pipe.name}
    if program.node > 0 and syncs == {Sync(pipe.name, SyncKind.NODE_SLICES_EXCEPT_ROOT)}:
        return (own_region(program, pipe),)
    regions = tuple(range(len(pipe.widths)))
    reduced = any(isinstance(sync, AllReduce) for sync in syncs)
    return (*regions, REDUCED) if reduced else regions


def weights(program: Program) -> Iterator[Weight]:
    """The weights of all ops, in their order: the wire names a weight by its place here."""
    for op in ops(program):
        yield from op.weights()


def ops(program: Program) -> Iterator[Op]:
    """All ops, in order."""
    for segment in program.segments:
        yield from segment.ops


def ops_by_tag() -> dict[str, type[Op]]:
    """All ops that there are, by the names that they have on the wire."""
    return {str(op.__struct_config__.tag): op for op in Op.__subclasses__() if issubclass(op, Part)}

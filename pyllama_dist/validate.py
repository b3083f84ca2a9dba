"""What a node checks before it runs a program that it was sent.

Compiled ops do not look where they read and write: everything that could lead them outside their
memory is refused here. Single values have their bounds in the types of `program`.
"""

import math

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType
from pyllama_dist.errors import ProtocolError
from pyllama_dist.program import (
    AllReduce,
    Batch,
    Buffer,
    Cache,
    Pipe,
    Program,
    Sync,
    SyncKind,
    Weight,
    ops,
    own_region,
)
from pyllama_kernels.pages import KV_BLOCK

I64 = npt.NDArray[np.int64]

MAX_SEGMENTS, MAX_SYNCS, MAX_MEMORY = 4096, 4096, 8192
MAX_OPS = 1 << 16  # each is one or two rows of the compiled table, and a team counts 2^18
MAX_HEAD = 1 << 16  # numbers in a head that is kept
MAX_EXPERTS = 256  # for each row
MAX_WEIGHTS = 1 << 20  # of a program; each expert has its own
MAX_ROWS = 1 << 16  # of a batch

MAX_PIPE_BYTES = 63 << 20  # of a region: it travels as one frame, and those end at 64 MiB


def check_program(program: Program) -> None:
    """Checks that a program is consistent.

    Raises:
        ProtocolError: naming the segment and op that is not.
    """
    if not program.node < program.n_nodes <= 256:
        raise ProtocolError(f"node {program.node} of {program.n_nodes} nodes")
    active = program.n_active_experts
    if active > MAX_EXPERTS:
        raise ProtocolError(f"{active} experts for each row, at most {MAX_EXPERTS}")
    if program.max_rows > MAX_ROWS:
        raise ProtocolError(f"{program.max_rows} rows, at most {MAX_ROWS}")
    if len(program.segments) > MAX_SEGMENTS:
        raise ProtocolError(f"{len(program.segments)} segments, at most {MAX_SEGMENTS}")
    if sum(len(segment.ops) for segment in program.segments) > MAX_OPS:
        raise ProtocolError(f"more than {MAX_OPS} ops")
    n_weights = 0
    for op in ops(program):  # not all at once: those of experts are made when asked for
        n_weights += len(op.weights())
        if n_weights > MAX_WEIGHTS:
            raise ProtocolError(f"more than {MAX_WEIGHTS} weights")
    if sum(len(segment.syncs) for segment in program.segments) > MAX_SYNCS:
        raise ProtocolError(f"more than {MAX_SYNCS} syncs")
    names = [pipe.name for pipe in program.pipes]
    names += [buffer.name for buffer in program.buffers]
    names += [cache.name for cache in program.caches]
    if len(names) > MAX_MEMORY:
        raise ProtocolError(f"{len(names)} pieces of memory, at most {MAX_MEMORY}")
    if len(set(names)) < len(names):
        raise ProtocolError("two pieces of memory have the same name")
    for pipe in program.pipes:
        if len(pipe.widths) not in (1, program.n_nodes):
            raise ProtocolError(f"pipe {pipe.name} has {len(pipe.widths)} regions")
        if pipe.rows == "experts":
            raise ProtocolError(f"pipe {pipe.name} has rows for experts, which no node exchanges")
        _blocks(pipe.name, pipe.float_type, *pipe.widths)
        rows = program.rows_of(pipe.rows)
        if rows * pipe.float_type.row_bytes(max(pipe.widths)) > MAX_PIPE_BYTES:
            raise ProtocolError(f"pipe {pipe.name} does not fit into a frame")
    for buffer in program.buffers:
        _blocks(buffer.name, buffer.float_type, buffer.width)
    for cache in program.caches:
        if cache.float_type not in (FloatType.F32, FloatType.F16, FloatType.Q80):
            raise ProtocolError(
                f"{cache.name} is {cache.float_type.name}; caches are F32, F16, Q80"
            )
        if cache.head_dim > MAX_HEAD:  # attention's scratch grows with it
            raise ProtocolError(f"{cache.name} has heads of {cache.head_dim}, at most {MAX_HEAD}")
        if cache.head_dim % cache.float_type.block:
            raise ProtocolError(f"{cache.name} is not whole blocks of {cache.float_type.block}")
    check = Check(program)
    pipes = {pipe.name: pipe for pipe in program.pipes}
    for segment in program.segments:
        for i, op in enumerate(segment.ops):
            try:
                op.validate(check)
            except ProtocolError as error:
                kind = type(op).__name__
                raise ProtocolError(f"segment {segment.name}, op {i} ({kind}): {error}") from None
        for sync in segment.syncs:
            known = pipes.get(sync.pipe)
            if known is None:
                raise ProtocolError(f"segment {segment.name} syncs {sync.pipe}, which is no pipe")
            to_all = isinstance(sync, Sync) and sync.kind is SyncKind.WITH_ROOT
            if not to_all and len(known.widths) != program.n_nodes:
                raise ProtocolError(f"pipe {sync.pipe} has no region for each node")
            if isinstance(sync, AllReduce):
                try:
                    require(segment is not program.segments[-1], "no segment takes the sum")
                    check.all_reduce(sync)
                except ProtocolError as error:
                    raise ProtocolError(f"segment {segment.name}, AllReduce: {error}") from None


def check_batch(program: Program, batch: Batch, table: I64) -> None:
    """Checks that a batch fits a program.

    Args:
        program: what is run.
        batch: what it is to be run on.
        table: [n_seqs, blocks per sequence] int64, before the batch changes it.

    Raises:
        ProtocolError: naming what is out of bounds.
    """
    rows = len(batch.seqs)
    if not 1 <= rows <= program.max_rows or len(batch.positions) != rows:
        raise ProtocolError(
            f"a batch of {rows} sequences and {len(batch.positions)} positions; at most "
            f"{program.max_rows} rows"
        )
    if max(batch.seqs) >= program.n_seqs or max(batch.positions) >= program.seq_len:
        raise ProtocolError(
            f"sequence {max(batch.seqs)} of {program.n_seqs}, position {max(batch.positions)} of "
            f"{program.seq_len}"
        )
    _check_blocks(program, batch, table)
    if len(batch.logits) > program.max_logits or any(row >= rows for row in batch.logits):
        raise ProtocolError(
            f"logits of {len(batch.logits)} rows wanted; at most {program.max_logits}, of {rows}"
        )


def _check_blocks(program: Program, batch: Batch, table: I64) -> None:
    """All positions that rows look at have blocks, and no two rows write to the same place."""
    longest = dict.fromkeys(batch.seqs, 0)
    for seq, position in zip(batch.seqs, batch.positions, strict=True):
        longest[seq] = max(longest[seq], position)
    after = {seq: table[seq] for seq in longest}
    for seq, place, block in batch.table:
        if seq >= program.n_seqs or place >= table.shape[1] or block >= program.n_blocks:
            raise ProtocolError(
                f"block {block} of {program.n_blocks} for sequence {seq} of {program.n_seqs}, "
                f"place {place} of {table.shape[1]}"
            )
    for seq in {seq for seq, _, _ in batch.table} & longest.keys():
        after[seq] = table[seq].copy()
    for seq, place, block in batch.table:
        if seq in longest:
            after[seq][place] = block
    for source, target in batch.copies:
        if max(source, target) >= program.n_blocks:
            raise ProtocolError(f"block {source} to {target} of {program.n_blocks}")
    for seq, position in longest.items():
        unset = np.flatnonzero(after[seq][: position // KV_BLOCK + 1] < 0)
        if unset.size:
            raise ProtocolError(
                f"sequence {seq} has no block for positions from {unset[0] * KV_BLOCK}, and a row "
                f"at {position}"
            )
    places = {
        (after[seq][position // KV_BLOCK], position % KV_BLOCK)
        for seq, position in zip(batch.seqs, batch.positions, strict=True)
    }
    if len(places) < len(batch.seqs):
        raise ProtocolError("two rows of a batch are kept in the same place")


def _blocks(name: str, float_type: FloatType, *widths: int) -> None:
    if float_type not in (FloatType.F32, FloatType.Q80):
        raise ProtocolError(f"{name} is {float_type.name}; memory is F32 or Q80")
    if any(width % float_type.block for width in widths):
        raise ProtocolError(f"{name} is not whole blocks of {float_type.block}")


def require(holds: bool, what: str) -> None:
    """Refuses a program if something does not hold.

    Raises:
        ProtocolError: it does not.
    """
    if not holds:
        raise ProtocolError(what)


class Check:
    """What ops are checked against: the memory that they name. Its methods raise ProtocolError."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.memory: dict[str, Pipe | Buffer] = {pipe.name: pipe for pipe in program.pipes}
        self.memory |= {buffer.name: buffer for buffer in program.buffers}
        self.caches: dict[str, Cache] = {cache.name: cache for cache in program.caches}
        self.written_routes: set[str] = set()  # by the ops before

    def all_reduce(self, exchange: AllReduce) -> None:
        """All regions are as wide as the target, which is a buffer."""
        pipe = self.pipe(exchange.pipe)
        require(isinstance(self.find(exchange.target), Buffer), "the target must be a buffer")
        widths = set(pipe.widths)
        require(widths == {self.f32(exchange.target)}, "regions and target differ in width")
        self.same_rows(exchange.pipe, exchange.target)

    def find(self, name: str) -> Pipe | Buffer:
        """A pipe or buffer by its name."""
        found = self.memory.get(name)
        if found is None:
            raise ProtocolError(f"{name} does not exist")
        return found

    def pipe(self, name: str) -> Pipe:
        """A pipe by its name."""
        found = self.find(name)
        if not isinstance(found, Pipe):
            raise ProtocolError(f"{name} is no pipe")
        return found

    def cache(self, name: str) -> Cache:
        """A cache by its name."""
        found = self.caches.get(name)
        if found is None:
            raise ProtocolError(f"cache {name} does not exist")
        return found

    def width(self, name: str) -> int:
        """Values in a row of a buffer, or of this node's region of a pipe."""
        found = self.find(name)
        return (
            found.widths[own_region(self.program, found)]
            if isinstance(found, Pipe)
            else found.width
        )

    def f32(self, name: str) -> int:
        """The width of memory that must be float32."""
        require(self.find(name).float_type is FloatType.F32, f"{name} is not float32")
        return self.width(name)

    def same(self, one: str, other: str) -> None:
        """Both are float32, equally wide, and have the same rows."""
        require(self.f32(one) == self.f32(other), f"{one} and {other} differ in width")
        self.same_rows(one, other)

    def same_rows(self, one: str, other: str) -> None:
        """Both have the same kind of rows."""
        require(self.find(one).rows == self.find(other).rows, f"{one}, {other}: other rows")

    def batch_rows(self, name: str) -> None:
        """It has a row for each row of the batch."""
        require(self.find(name).rows == "batch", f"{name} has no batch rows")

    @staticmethod
    def weight(weight: Weight, shape: tuple[int, int], float_type: FloatType) -> None:
        """The weight has this shape and type."""
        rows, cols = weight.shape
        require(rows >= 0 and cols >= 0, f"{weight.tensor}: a part of negative size")
        require(weight.float_type is float_type, f"{weight.tensor} is {weight.float_type.name}")
        require(
            weight.shape == shape,
            f"{weight.tensor} is {rows} x {cols}, not {shape[0]} x {shape[1]}",
        )

    @staticmethod
    def number(name: str, value: float, least: float) -> None:
        """It is a number, and not less than that."""
        require(math.isfinite(value) and value >= least, f"{name} is {value}")

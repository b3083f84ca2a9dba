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
    Add,
    Attention,
    Batch,
    Buffer,
    Cache,
    Combine,
    Concat,
    Dispatch,
    ExpertMatmul,
    Gather,
    LayerNorm,
    Matmul,
    Merge,
    Op,
    Pipe,
    Program,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    Select,
    SiluMul,
    Store,
    SyncKind,
    Weight,
    own_slot,
    slots_used,
)
from pyllama_kernels.pages import KV_BLOCK

I64 = npt.NDArray[np.int64]

MAX_SEGMENTS, MAX_SYNCS, MAX_MEMORY = 4096, 4096, 8192
MAX_OPS = 1 << 16  # each is one or two rows of the compiled table, and a team counts 2^18
MAX_HEAD = 1 << 16  # numbers in a head that is kept
MAX_EXPERTS = 256  # for each row
MAX_ROUTED = 4096  # that a row is chosen from
MAX_WEIGHTS = 1 << 20  # of experts: each is a matrix of its own
MAX_ROWS = 1 << 16  # of a batch

MAX_PIPE_BYTES = 63 << 20  # of a slot: it travels as one frame, and those end at 64 MiB


def check_program(program: Program) -> None:
    """Checks that a program is consistent.

    Raises:
        ProtocolError: naming the segment and op that is not.
    """
    if not program.node < program.n_nodes <= 256:
        raise ProtocolError(f"node {program.node} of {program.n_nodes} nodes")
    if program.n_experts > MAX_EXPERTS:
        raise ProtocolError(f"{program.n_experts} experts for each row, at most {MAX_EXPERTS}")
    if program.max_rows > MAX_ROWS:
        raise ProtocolError(f"{program.max_rows} rows, at most {MAX_ROWS}")
    if len(program.segments) > MAX_SEGMENTS:
        raise ProtocolError(f"{len(program.segments)} segments, at most {MAX_SEGMENTS}")
    if sum(len(segment.ops) for segment in program.segments) > MAX_OPS:
        raise ProtocolError(f"more than {MAX_OPS} ops")
    ops = (op for segment in program.segments for op in segment.ops)
    if sum(op.weight.count for op in ops if isinstance(op, ExpertMatmul)) > MAX_WEIGHTS:
        raise ProtocolError(f"more than {MAX_WEIGHTS} weights of experts")
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
            raise ProtocolError(f"pipe {pipe.name} has {len(pipe.widths)} slots")
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
    checks = _OpCheck(program)
    pipes = {pipe.name: pipe for pipe in program.pipes}
    for segment in program.segments:
        for i, op in enumerate(segment.ops):
            try:
                checks.check(op)
            except ProtocolError as error:
                kind = type(op).__name__
                raise ProtocolError(f"segment {segment.name}, op {i} ({kind}): {error}") from None
        for sync in segment.syncs:
            known = pipes.get(sync.pipe)
            if known is None:
                raise ProtocolError(f"segment {segment.name} syncs {sync.pipe}, which is no pipe")
            if sync.kind is not SyncKind.WITH_ROOT and len(known.widths) != program.n_nodes:
                raise ProtocolError(f"pipe {sync.pipe} has no slot for each node")


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


def _number(name: str, value: float, least: float) -> None:
    _require(math.isfinite(value) and value >= least, f"{name} is {value}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ProtocolError(what)


class _OpCheck:
    """Checks ops against the memory that they name."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.memory: dict[str, Pipe | Buffer] = {pipe.name: pipe for pipe in program.pipes}
        self.memory |= {buffer.name: buffer for buffer in program.buffers}
        self.caches: dict[str, Cache] = {cache.name: cache for cache in program.caches}
        self.routed: str | None = None  # what the latest route was written to

    def check(self, op: Op) -> None:
        """Raises ProtocolError if the op would leave its memory or misread it."""
        match op:
            case RmsNorm():
                self.same(op.source, op.target)
                width = op.weight.shape[1]
                self.weight(op.weight, (1, width), FloatType.F32)
                _require(width > 0 and self.f32(op.source) % width == 0, "heads are not whole")
                _number("epsilon", op.epsilon, 0)
            case LayerNorm():
                width = self.f32(op.source)
                self.same(op.source, op.target)
                self.weight(op.weight, (1, width), FloatType.F32)
                self.weight(op.bias, (1, width), FloatType.F32)
                _number("epsilon", op.epsilon, 0)
            case Quantize():
                width = self.f32(op.source)
                _require(self.find(op.target).float_type is FloatType.Q80, "target is not Q80")
                _require(self.width(op.target) == width, "widths differ")
                _require(width % (32 * op.heads) == 0, "heads are not whole blocks")
                _require(
                    op.heads == 1 or isinstance(self.find(op.target), Buffer),
                    "a pipe has one head",
                )
                self.same_rows(op.source, op.target)
                if self.find(op.target).rows == "experts":
                    _require(self.routed is not None, "no expert was chosen before")
                    _require(op.heads == 1, "rows for experts have one head")
            case Matmul():
                self.matmul(op)
            case Rope():
                width = self.f32(op.target)
                _require(width % op.head_dim == 0, "heads are not whole")
                _require(op.rotary_dim % 2 == 0, "rotary_dim is odd")
                _require(op.rotary_dim <= op.head_dim, "rotary_dim is beyond the head")
                _number("theta", op.theta, 1e-30)
                if op.scaling is not None:
                    _number("factor", op.scaling.factor, 1e-30)
                    _number("low_freq_factor", op.scaling.low_freq_factor, 1e-30)
                    _number("high_freq_factor", op.scaling.high_freq_factor, 1e-30)
                self.batch_rows(op.target)
            case Concat():
                first, second = self.f32(op.first), self.f32(op.second)
                _require(self.f32(op.target) == first + second, "widths differ")
                _require(first % op.heads == second % op.heads == 0, "heads are not whole")
                self.same_rows(op.first, op.target)
                self.same_rows(op.second, op.target)
            case Store():
                cache = self.cache(op.cache)
                _require(
                    self.f32(op.source) == cache.kv_heads * cache.head_dim,
                    f"{op.source} does not fill {op.cache}",
                )
                self.batch_rows(op.source)
            case Attention():
                self.attention(op)
            case Select():
                self.select(op)
            case Route():
                experts = self.f32(op.source)
                self.same(op.source, op.target)
                self.batch_rows(op.source)
                self.routed = op.target
                self.route(op.target)
                _require(experts <= MAX_ROUTED, f"{experts} experts, at most {MAX_ROUTED}")
                if op.bias is not None:
                    self.weight(op.bias, (1, experts), FloatType.F32)
                _require(op.active == self.program.n_experts, "another number of experts is active")
                _require(experts % op.groups == 0, "groups are not whole")
                _require(op.active_groups <= op.groups, "more groups than there are")
                members = experts // op.groups
                _require(op.active <= op.active_groups * members, "more experts than there are")
                _require(op.groups == 1 or members >= 2, "groups of one expert")
                _number("scale", op.scale, 0)
            case Dispatch():
                _require(self.f32(op.source) == self.f32(op.target), "widths differ")
                self.batch_rows(op.source)
                self.route(op.route)
                self.expert_rows(op.target)
            case ExpertMatmul():
                self.expert_matmul(op)
            case Combine():
                _require(self.f32(op.source) == self.f32(op.target), "widths differ")
                self.expert_rows(op.source)
                self.route(op.route)
                self.batch_rows(op.target)
            case SiluMul():
                self.f32(op.gate)
                self.same(op.gate, op.up)
                self.same(op.gate, op.target)
            case Merge():
                self.merge(op)
            case Add():
                self.f32(op.source)
                self.same(op.source, op.target)
            case Gather():
                _require(self.f32(op.source) == self.f32(op.target), "widths differ")
                self.batch_rows(op.source)
                _require(self.find(op.target).rows == "logits", "target has no logits rows")

    def matmul(self, op: Matmul) -> None:
        """The input has the weight's columns, once for each head, and a type that goes with it."""
        rows, cols = op.weight.shape
        self.product(op.source, op.weight.float_type)
        _require(rows % op.heads == 0, "heads are not whole")
        _require(
            op.heads == 1 or rows // op.heads % 16 == 0 or op.weight.float_type.block == 1,
            "heads are not whole groups of 16 rows",
        )
        inputs = self.width(op.source) // op.heads
        _require(inputs * op.heads == self.width(op.source), "heads are not whole")
        self.weight(op.weight, (self.f32(op.target), inputs), op.weight.float_type)
        if op.bias is not None:
            self.weight(op.bias, (1, rows), FloatType.F32)
        _require(cols % op.weight.float_type.block == 0, "columns are not whole blocks")
        self.same_rows(op.source, op.target)
        _require(self.find(op.target).rows != "experts", "rows for experts have weights each")

    def expert_matmul(self, op: ExpertMatmul) -> None:
        """The input has the columns of the experts' weights, and there are as many as routed."""
        self.product(op.source, op.weight.float_type)
        self.route(op.route)
        self.expert_rows(op.source)
        self.expert_rows(op.target)
        _require(op.weight.tensor.count("{}") == 1, "a tensor of experts has one {} in its name")
        _require(op.weight.count == self.width(op.route), "another number of experts is routed")
        shape = (self.f32(op.target), self.width(op.source))
        self.weight(op.weight.each[0], shape, op.weight.float_type)
        _require(shape[1] % op.weight.float_type.block == 0, "columns are not whole blocks")

    def product(self, name: str, float_type: FloatType) -> None:
        """Weights of this type can be multiplied with this memory."""
        types = (FloatType.F32, FloatType.Q40, FloatType.Q80)
        _require(float_type in types, f"{float_type.name} weights")
        quantized = float_type is not FloatType.F32
        source = self.find(name)
        _require(isinstance(source, Buffer) or not quantized, "a quantized input must be a buffer")
        _require(
            source.float_type is (FloatType.Q80 if quantized else FloatType.F32),
            "the input's type does not go with the weight's",
        )

    def attention(self, op: Attention) -> None:
        """The last query head finds its key head."""
        keys, values = self.cache(op.key_cache), self.cache(op.value_cache)
        _require(isinstance(self.find(op.query), Buffer), "a query must be a buffer")
        width, out = self.f32(op.query), self.f32(op.target)
        self.batch_rows(op.query)
        self.batch_rows(op.target)
        _require(
            (keys.kv_heads, keys.head_dim, keys.float_type)
            == (values.kv_heads, values.head_dim, values.float_type),
            "caches differ",
        )
        _require(width % keys.head_dim == 0, "heads are not whole")
        heads = width // keys.head_dim
        _require(heads == 0 or out % heads == 0, "heads of the target are not whole")
        value_dim = out // heads if heads else keys.head_dim
        if op.key_cache == op.value_cache:
            _require(value_dim <= keys.head_dim, "values are wider than keys")
            _require(value_dim % 16 == 0, "values are not whole vectors of 16")
            _require(value_dim % keys.float_type.block == 0, "values are not whole blocks")
        else:
            _require(value_dim == keys.head_dim, "target and values differ in width")
        _require(
            heads == 0 or (op.first + heads - 1) // op.group < keys.kv_heads,
            f"{heads} query heads reach beyond {keys.kv_heads} key heads",
        )
        _number("scale", op.scale, 0)
        if op.selection is not None:
            self.selection(op.selection)

    def select(self, op: Select) -> None:
        """There is a weight for each head of the query, which are as wide as the keys."""
        keys = self.cache(op.cache)
        _require(keys.kv_heads == 1, "more than one key head")
        _require(isinstance(self.find(op.query), Buffer), "a query must be a buffer")
        _require(isinstance(self.find(op.weights), Buffer), "weights of heads must be a buffer")
        _require(
            self.f32(op.query) == self.f32(op.weights) * keys.head_dim, "heads and weights differ"
        )
        self.batch_rows(op.query)
        self.batch_rows(op.weights)
        self.selection(op.target)
        _number("scale", op.scale, 0)

    def selection(self, name: str) -> None:
        """It has a number for each position."""
        _require(self.f32(name) == self.program.seq_len, f"{name} is not seq_len wide")
        _require(isinstance(self.find(name), Buffer), "a selection must be a buffer")
        self.batch_rows(name)

    def route(self, name: str) -> None:
        """It has a number for each expert."""
        _require(isinstance(self.find(name), Buffer), "a route must be a buffer")
        _require(self.f32(name) >= self.program.n_experts > 0, f"{name}: too few experts")
        _require(name == self.routed, f"{name} is not what the last route was written to")
        self.batch_rows(name)

    def expert_rows(self, name: str) -> None:
        """It has a row for each row of the batch and expert chosen for it."""
        _require(self.find(name).rows == "experts", f"{name} has no rows for experts")

    def merge(self, op: Merge) -> None:
        """All slots are here and as wide as the target."""
        pipe = self.find(op.source)
        if not isinstance(pipe, Pipe):
            raise ProtocolError(f"{op.source} is no pipe")
        _require(set(pipe.widths) == {self.f32(op.target)}, "slots and target differ in width")
        _require(len(slots_used(self.program, pipe)) == len(pipe.widths), "slots are not here")
        self.same_rows(op.source, op.target)

    def find(self, name: str) -> Pipe | Buffer:
        """A pipe or buffer by its name."""
        found = self.memory.get(name)
        if found is None:
            raise ProtocolError(f"{name} does not exist")
        return found

    def cache(self, name: str) -> Cache:
        """A cache by its name."""
        found = self.caches.get(name)
        if found is None:
            raise ProtocolError(f"cache {name} does not exist")
        return found

    def width(self, name: str) -> int:
        """Values in a row of a buffer, or of this node's slot of a pipe."""
        found = self.find(name)
        return (
            found.widths[own_slot(self.program, found)] if isinstance(found, Pipe) else found.width
        )

    def f32(self, name: str) -> int:
        """The width of memory that must be float32."""
        _require(self.find(name).float_type is FloatType.F32, f"{name} is not float32")
        return self.width(name)

    def same(self, one: str, other: str) -> None:
        """Both are float32, equally wide, and have the same rows."""
        _require(self.f32(one) == self.f32(other), f"{one} and {other} differ in width")
        self.same_rows(one, other)

    def same_rows(self, one: str, other: str) -> None:
        """Both have the same kind of rows."""
        _require(self.find(one).rows == self.find(other).rows, f"{one}, {other}: other rows")

    def batch_rows(self, name: str) -> None:
        """It has a row for each row of the batch."""
        _require(self.find(name).rows == "batch", f"{name} has no batch rows")

    @staticmethod
    def weight(weight: Weight, shape: tuple[int, int], float_type: FloatType) -> None:
        """The weight has this shape and type."""
        rows, cols = weight.shape
        _require(rows >= 0 and cols >= 0, f"{weight.tensor}: a part of negative size")
        _require(weight.float_type is float_type, f"{weight.tensor} is {weight.float_type.name}")
        _require(
            weight.shape == shape,
            f"{weight.tensor} is {rows} x {cols}, not {shape[0]} x {shape[1]}",
        )

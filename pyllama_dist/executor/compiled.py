"""The fast executor: a program becomes a table of ops, which compiled threads work through."""

import threading
from itertools import groupby, islice, pairwise
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType, Pairs, Scoring
from pyllama_dist.executor.arena import arena
from pyllama_dist.executor.memory import Memory, ops_of, parts_bytes, rope_kind
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
    Rows,
    Select,
    SiluMul,
    Store,
    own_slot,
)
from pyllama_kernels import oploop, optable, team
from pyllama_kernels.attention import MOST, scratch_bytes
from pyllama_kernels.optable import OP, Code
from pyllama_kernels.pages import count_cells
from pyllama_kernels.selection import select_scratch_bytes

_JOIN_SECONDS = 5.0

_MATMUL = {
    FloatType.F32: Code.MATMUL_F32,
    FloatType.Q40: Code.MATMUL_Q40,
    FloatType.Q80: Code.MATMUL_Q80,
}
_EXPERTS = {
    FloatType.F32: Code.EXPERTS_F32,
    FloatType.Q40: Code.EXPERTS_Q40,
    FloatType.Q80: Code.EXPERTS_Q80,
}
_PRODUCTS = {*_MATMUL.values(), *_EXPERTS.values()}
_BY_HEAD = {Code.RMS_NORM, Code.ROPE, Code.STORE_KEYS, Code.STORE_VALUES}
_ROWS: dict[Rows, int] = {
    "batch": optable.N_ROWS,
    "logits": optable.N_LOGITS,
    "experts": optable.N_PAIRS,
}


class CompiledExecutor:
    """Runs a program with a team of threads. See `Executor`.

    The calling thread leads. The others enter compiled code when a step begins, and stay there,
    waiting between segments, until it ends, and for a moment more; then they sleep.
    """

    def __init__(self, program: Program, n_threads: int) -> None:
        self.memory = Memory(program)
        self._n_threads = n_threads
        rows, self._starts, self._addresses = _lower(program, self.memory)
        parts, scratch = _attention_bytes(program)
        table, self._parts, self._scratch = arena(
            [(len(rows), OP.itemsize), (parts,), (n_threads, scratch)]
        )
        self._table = table.reshape(-1).view(OP)
        for entry, row in zip(self._table, rows, strict=True):
            for field, value in row.items():
                entry[field] = value
        self._state = team.new_state(n_threads)
        self._step = np.zeros(optable.STEP_WORDS, np.int64)
        self._step[optable.SEQS] = _address(self.memory.seqs)
        self._step[optable.POSITIONS] = _address(self.memory.positions)
        self._step[optable.LOGITS] = _address(self.memory.logits)
        self._step[optable.TABLE] = _address(self.memory.table)
        self._step[optable.N_SEQS] = program.n_seqs
        self._step[optable.SEQ_BLOCKS] = self.memory.table.shape[1]
        self._step[optable.CELLS] = count_cells(program.seq_len, program.max_rows)
        self._step[optable.PARTS] = _address(self._parts)
        self._step[optable.SCRATCH] = _address(self._scratch)
        self._step[optable.SCRATCH_BYTES] = scratch
        self._stepping = False
        # Not semaphores: those are Python code, which ^C can leave locked.
        self._enter: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(n_threads - 1)]
        self._threads = [
            threading.Thread(target=self._follow, args=(i,), name=f"kernel-{i}", daemon=True)
            for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, batch: Batch) -> None:
        """Takes the rows that the segments will work on, and calls the team."""
        self.memory.set_batch(batch)
        self._step[optable.N_ROWS] = self.memory.n_rows
        self._step[optable.N_LOGITS] = self.memory.n_logits
        self._step[optable.N_PAIRS] = self.memory.n_pairs
        self._stepping = True
        oploop.begin_step(self._state)
        for thread, enter in enumerate(self._enter, start=1):
            if not team.is_inside(self._state, thread):
                enter.put(True)

    def run(self, segment: int) -> None:
        """Runs the ops of one segment."""
        first, last = self._starts[segment], self._starts[segment + 1]
        oploop.run(self._table, first, last, self._step, self._state, 0, self._n_threads)

    def end(self) -> None:
        """Ends the step: the team may leave."""
        if self._stepping:
            oploop.end_step(self._state)
            self._stepping = False

    def close(self) -> None:
        """Ends the threads."""
        if self._stepping:
            oploop.end_step(self._state)
        for enter in self._enter:
            enter.put(False)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)  # they are daemons: a process can end without them
        self._threads, self._enter, self._stepping = [], [], False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _follow(self, thread: int) -> None:
        enter = self._enter[thread - 1]
        # Who comes too late for a step finds it over, and leaves at once.
        while enter.get():
            oploop.run(self._table, 0, 0, self._step, self._state, thread, self._n_threads)


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data


def _lower(
    program: Program, memory: Memory
) -> tuple[list[dict[str, float]], list[int], list[npt.NDArray[np.int64]]]:
    """The program as rows of OP, and where each segment starts (one entry more than segments).

    With the addresses of experts' weights, which rows point to: they must live as long.
    """
    lowering = _Lowering(program, memory)
    rows: list[dict[str, float]] = []
    starts = [0]
    for segment in program.segments:
        lowered = [row for op in segment.ops for row in lowering.rows(op)]
        for _, some in groupby(lowered, key=_input_of_products):
            products = list(some)
            # Opened by itself, since those before it had nothing to do, one takes those after it.
            for i, product in enumerate(products):
                product["together"] = len(products) - i
        _share_heads(lowered)
        _share_blocks(lowered)
        rows += lowered
        starts.append(len(rows))
    return rows, starts, lowering.addresses


def _share_heads(rows: list[dict[str, float]]) -> None:
    """Has what belongs to attention done together, head by head: from the products to their next.

    Not where a node has query heads without their key head's others: a key head would not stand
    for the same number of query heads everywhere.
    """
    for at, attend in enumerate(rows):
        if attend["code"] != Code.ATTEND or attend["first"] or attend["kv_heads"] < 2:
            continue
        whole = attend["heads"] == attend["kv_heads"] * attend["group"]
        if not whole or attend["group"] > MOST:
            continue
        first = at
        while first > 0 and rows[first - 1]["code"] in _BY_HEAD:
            first -= 1
        last = at + 2  # after JOIN
        if last < len(rows) and _rounds(rows[last], attend):
            last += 1
        cuts = {(attend["rows"], attend["heads"]), (attend["rows"], attend["kv_heads"])}
        if all((row["rows"], row["heads"]) in cuts for row in rows[first:at]):
            rows[first] |= {"together": last - first, "units": attend["kv_heads"]}


def _share_blocks(rows: list[dict[str, float]]) -> None:
    """Has what goes through the activation function rounded by who made it."""
    for row, after in pairwise(rows):
        if row["code"] == Code.SILU_MUL and _rounds(after, row):
            row["together"] = 2


def _rounds(row: dict[str, float], before: dict[str, float]) -> bool:
    """Whether an op rounds what the one before it has made, block after block as it lies."""
    rounds = row["code"] in (Code.QUANTIZE, Code.QUANTIZE_EXPERTS)
    return rounds and row["a"] == before["out"] and row["heads"] == 1


def _input_of_products(row: dict[str, float]) -> object:
    """What products of the same input, in a row, have in common; no two other ops have it."""
    if row["code"] in _PRODUCTS:
        return row["code"], row["rows"], row["a"]
    return id(row)


def _attention_bytes(program: Program) -> tuple[int, int]:
    """What attention needs beside a program's memory: for the chunks, and for each thread."""
    ops = ops_of(program, Attention)
    parts = max((parts_bytes(program, op) for op in ops), default=0)
    needs = [scratch_bytes(cache.head_dim) for cache in program.caches]
    widths = {b.name: b.width for b in program.buffers}
    for op in ops_of(program, Select):
        heads = widths[op.weights]
        needs.append(select_scratch_bytes(heads, widths[op.query] // max(1, heads)))
    return parts, -(-max(needs, default=0) // 64) * 64


class _Lowering:
    """Turns ops into rows of the table: names become addresses and sizes."""

    def __init__(self, program: Program, memory: Memory) -> None:
        self.program, self.memory = program, memory
        self.kinds = {pipe.name: pipe.rows for pipe in program.pipes}
        self.kinds |= {buffer.name: buffer.rows for buffer in program.buffers}
        self.widths = {buffer.name: buffer.width for buffer in program.buffers}
        self.caches = {cache.name: cache for cache in program.caches}
        self.weights = iter(memory.weights)
        self.addresses: list[npt.NDArray[np.int64]] = []  # of the experts of one op each
        self.plan = 0  # address of the latest route's plan

    def rows(self, op: Op) -> list[dict[str, float]]:
        """The rows of one op, usually one. Weights are taken in the order of the ops."""
        m, p = self.memory, self.program
        match op:
            case RmsNorm():
                n = op.weight.shape[1]
                row = self.row(Code.RMS_NORM, op.target, n=n)
                row |= {"a": self.at(op.source), "epsilon": op.epsilon}
                row |= {"heads": self.width(op.source) // n}
                return [row | {"w": _address(next(self.weights))}]
            case LayerNorm():
                row = self.row(Code.LAYER_NORM, op.target, n=self.width(op.source))
                row |= {"a": self.at(op.source), "epsilon": op.epsilon}
                row |= {"w": _address(next(self.weights))}
                return [row | {"c": _address(next(self.weights))}]
            case Quantize():
                code = Code.PACK_Q80 if op.target in m.pipes else Code.QUANTIZE
                if code == Code.QUANTIZE and self.kinds[op.target] == "experts":
                    code = Code.QUANTIZE_EXPERTS
                row = self.row(code, op.target, a=self.at(op.source), heads=op.heads)
                row |= {"plan": self.plan}
                return [row | {"n": self.width(op.source) // op.heads}]
            case Matmul():
                row = self.row(_MATMUL[op.weight.float_type], op.target, heads=op.heads)
                row |= {"a": self.at(op.source), "w": _address(next(self.weights))}
                row |= {"n": op.weight.shape[1], "m": op.weight.shape[0]}
                if op.bias is not None:
                    row["c"] = _address(next(self.weights))
                return [row]
            case Rope():
                cos, sin = m.rope[rope_kind(op)]
                row = self.row(Code.ROPE, op.target, n=op.head_dim, m=op.rotary_dim // 2)
                heads = self.width(op.target) // op.head_dim
                row |= {"heads": heads, "seq_len": p.seq_len, "kind": op.pairs is Pairs.HALVES}
                return [row | {"c": _address(cos), "b": _address(sin)}]
            case Concat():
                row = self.row(Code.CONCAT, op.target, heads=op.heads)
                row |= {"a": self.at(op.first), "b": self.at(op.second)}
                row |= {"n": self.width(op.first) // op.heads}
                return [row | {"m": self.width(op.target) // op.heads}]
            case Store():
                code = Code.STORE_KEYS if op.keys else Code.STORE_VALUES
                row = self.row(code, op.source, a=self.at(op.source)) | self.cache(op.cache)
                heads = self.caches[op.cache].kv_heads
                return [row | {"heads": heads, "out": _address(m.caches[op.cache])}]
            case Attention():
                row = self.row(Code.ATTEND, op.target, a=self.at(op.query))
                row |= self.cache(op.key_cache)
                heads = self.width(op.query) // self.caches[op.key_cache].head_dim
                row |= {"heads": heads, "m": self.width(op.target) // max(1, heads)}
                row |= {"c": _address(m.caches[op.key_cache])}
                row |= {"b": _address(m.caches[op.value_cache])}
                row |= {"first": op.first, "group": op.group, "scale": op.scale}
                if op.selection is not None:
                    row |= {"w": self.at(op.selection), "seq_len": p.seq_len}
                return [row, row | {"code": Code.JOIN}]
            case Select():
                row = self.row(Code.SELECT, op.target, a=self.at(op.query)) | self.cache(op.cache)
                row |= {"b": self.at(op.weights), "c": _address(m.caches[op.cache])}
                row |= {"heads": self.width(op.weights), "group": op.top_k}
                return [row | {"scale": op.scale, "seq_len": p.seq_len}]
            case Route():
                self.plan = _address(m.plans[op.target])
                row = self.row(Code.ROUTE, op.target, n=self.width(op.source), plan=self.plan)
                row |= {"a": self.at(op.source), "kind": op.scoring is Scoring.SOFTMAX}
                row |= {"active": op.active, "normalize": op.normalize, "scale": op.scale}
                row |= {"group": op.groups, "active_groups": op.active_groups}
                if op.bias is not None:
                    row["c"] = _address(next(self.weights))
                return [row, row | {"code": Code.MAKE_PLAN}]
            case Dispatch():
                row = self.row(Code.DISPATCH, op.target, plan=_address(m.plans[op.route]))
                return [row | {"a": self.at(op.source), "n": self.width(op.source)}]
            case ExpertMatmul():
                experts = islice(self.weights, op.weight.count)
                addresses = np.array([_address(weight) for weight in experts], np.int64)
                self.addresses.append(addresses)
                row = self.row(_EXPERTS[op.weight.float_type], op.target, heads=1)
                row |= {"a": self.at(op.source), "w": _address(addresses)}
                row |= {"plan": _address(m.plans[op.route])}
                rows, cols = op.weight.each[0].shape
                return [row | {"n": cols, "m": rows}]
            case Combine():
                row = self.row(Code.COMBINE, op.target, plan=_address(m.plans[op.route]))
                row |= {"a": self.at(op.source), "b": self.at(op.route)}
                return [row | {"n": self.width(op.source), "active": p.n_experts}]
            case SiluMul():
                fields = {"a": self.at(op.gate), "b": self.at(op.up), "n": self.width(op.gate)}
                return [self.row(Code.SILU_MUL, op.target, **fields)]
            case Merge():
                pipe = m.pipes[op.source]
                f32 = pipe.spec.float_type is FloatType.F32
                code = Code.MERGE_F32 if f32 else Code.MERGE_Q80
                row = self.row(code, op.target, n=self.width(op.target))
                row |= {"a": _address(pipe.payload(pipe.held[0], 1))}
                return [row | {"parts": len(pipe.held), "stride": pipe.memory.shape[1]}]
            case Add():
                fields = {"a": self.at(op.source), "n": self.width(op.source)}
                return [self.row(Code.ADD, op.target, **fields)]
            case Gather():
                fields = {"a": self.at(op.source), "n": self.width(op.source)}
                return [self.row(Code.GATHER, op.target, **fields)]

    def row(self, code: Code, target: str, **fields: float) -> dict[str, float]:
        """A row that writes to `target`; how many rows of memory that is follows from it."""
        rows = _ROWS[self.kinds[target]]
        return {"code": code, "rows": rows, "out": self.at(target), **fields}

    def at(self, name: str) -> int:
        """Address of a buffer, or of this node's slot of a pipe."""
        if name in self.memory.pipes:
            pipe = self.memory.pipes[name]
            return _address(pipe.payload(own_slot(self.program, pipe.spec), 1))
        return _address(self.memory.buffers[name])

    def cache(self, name: str) -> dict[str, float]:
        """The sizes of a cache."""
        spec = self.caches[name]
        n_blocks, kv_heads, _, page_bytes = self.memory.caches[name].shape
        sizes = {"n_blocks": n_blocks, "page_bytes": page_bytes}
        return sizes | {"kind": spec.float_type, "kv_heads": kv_heads, "n": spec.head_dim}

    def width(self, name: str) -> int:
        """Values in a row of a buffer, or of this node's slot of a pipe."""
        if name in self.memory.pipes:
            pipe = self.memory.pipes[name].spec
            return pipe.widths[own_slot(self.program, pipe)]
        return self.widths[name]

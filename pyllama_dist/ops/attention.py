"""Attention over the positions that a cache holds."""

from collections.abc import Iterator

import numpy as np

from pyllama_dist.config import FloatType
from pyllama_dist.executor.lowering import Cut, Lowering, Row, address
from pyllama_dist.executor.memory import Memory
from pyllama_dist.program import Buffer, Count, Name, Op, Part, Program, Shapes, Width
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference
from pyllama_kernels.pages import count_cells


class Store(Part, Op, frozen=True, tag="store"):
    """Writes each row into a cache, at the row's sequence and position.

    A cache of keys is laid out for products with queries; so is what serves as keys and values.
    """

    source: Name
    cache: Name
    keys: bool

    def validate(self, check: Check) -> None:
        """See `Op`."""
        cache = check.cache(self.cache)
        width = cache.kv_heads * cache.head_dim
        require(check.f32(self.source) == width, f"{self.source} does not fill {self.cache}")
        check.batch_rows(self.source)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        spec, cache = memory.cache_specs[self.cache], memory.caches[self.cache]
        store = reference.store_keys if self.keys else reference.store_values
        x = memory.heads(self.source, spec.head_dim)
        store(x, *memory.row_places, spec.float_type, cache)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        spec = table.memory.cache_specs[self.cache]
        return [
            table.row(
                "store_keys" if self.keys else "store_values",
                self.source,
                Cut.NUMBERS,
                cost=table.width(self.source),
                by_head=True,
                a=table.at(self.source),
                heads=spec.kv_heads,
            )
            | table.cache(self.cache)
            | {"out": address(table.memory.caches[self.cache])}
        ]


class Attention(Part, Op, frozen=True, tag="attention"):
    """target = softmax(query @ keys.T * scale) @ values, over positions up to the row's.

    Query head h of this node reads key head (first + h) // group of its caches. Where both caches
    are the same one, values are the first `value_dim` numbers of the keys.
    With a selection, only the positions that it holds are seen.
    """

    query: Name
    target: Name
    key_cache: Name
    value_cache: Name
    value_dim: Count  # numbers in a head of the target
    group: Count  # query heads that share a key head
    first: Width  # place of this node's first query head in its group
    scale: float
    selection: Name | None = None

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        heads = shapes.width(self.query) // shapes.caches[self.key_cache].head_dim
        yield Buffer(self.target, FloatType.F32, heads * self.value_dim)

    def shared_bytes(self, program: Program) -> int:
        """What is found in each chunk of positions, for a few rows."""
        head_dim = next(c.head_dim for c in program.caches if c.name == self.key_cache)
        width = next(b.width for b in program.buffers if b.name == self.query)
        cells = count_cells(program.seq_len, program.max_rows)
        return 4 * cells * width // head_dim * (self.value_dim + 2)

    def scratch_bytes(self, program: Program) -> int:
        """See `Op`."""
        from pyllama_kernels.attention import scratch_bytes  # looks at the CPU

        return scratch_bytes(next(c.head_dim for c in program.caches if c.name == self.key_cache))

    def validate(self, check: Check) -> None:
        """The last query head finds its key head."""
        keys, values = check.cache(self.key_cache), check.cache(self.value_cache)
        require(isinstance(check.find(self.query), Buffer), "a query must be a buffer")
        width, out = check.f32(self.query), check.f32(self.target)
        check.batch_rows(self.query)
        check.batch_rows(self.target)
        require(
            (keys.kv_heads, keys.head_dim, keys.float_type)
            == (values.kv_heads, values.head_dim, values.float_type),
            "caches differ",
        )
        require(width % keys.head_dim == 0, "heads are not whole")
        heads = width // keys.head_dim
        value_dim = self.value_dim
        require(out == heads * value_dim, "heads of the target are not as wide as values")
        if self.key_cache == self.value_cache:
            require(value_dim <= keys.head_dim, "values are wider than keys")
            require(value_dim % 16 == 0, "values are not whole vectors of 16")
            require(value_dim % keys.float_type.block == 0, "values are not whole blocks")
        else:
            require(value_dim == keys.head_dim, "keys and values differ in width")
        require(
            heads == 0 or (self.first + heads - 1) // self.group < keys.kv_heads,
            f"{heads} query heads reach beyond {keys.kv_heads} key heads",
        )
        check.number("scale", self.scale, 0)
        if self.selection is not None:
            check_selection(check, self.selection)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        spec = memory.cache_specs[self.key_cache]
        query = memory.heads(self.query, spec.head_dim)
        no_mask = np.empty((0, 0), np.float32)
        reference.attention(
            query,
            memory.caches[self.key_cache],
            memory.caches[self.value_cache],
            spec.float_type,
            *memory.row_places,
            self.first,
            self.group,
            self.scale,
            memory.f32(self.selection) if self.selection else no_mask,
            memory.f32(self.target).reshape(*query.shape[:2], -1),
        )

    def lower(self, table: Lowering) -> list[Row]:
        """Attention of each chunk of positions, and what puts chunks together."""
        n = table.memory.cache_specs[self.key_cache].head_dim
        width = table.width(self.query)
        attend = table.row(
            "attend",
            self.target,
            Cut.ATTENTION,
            cost=width,
            a=table.at(self.query),
            b=address(table.memory.caches[self.value_cache]),
            c=address(table.memory.caches[self.key_cache]),
            w=table.at(self.selection) if self.selection else 0,
            m=self.value_dim,
            heads=width // n,
            seq_len=table.program.seq_len,
            first=self.first,
            group=self.group,
            scale=self.scale,
        ) | table.cache(self.key_cache)
        return [attend, attend | {"entry": "join", "cut": Cut.NUMBERS}]


class Select(Part, Op, frozen=True, tag="select"):
    """target = 0 at the positions whose scores are the `top_k` highest, -inf at all others.

    score = sum over heads h of weights[h] * relu(query[h] @ key * scale), for the positions up to
    the row's; of equal scores the earlier position wins. The target is seq_len wide.
    """

    query: Name
    head_weights: Name  # one for each head of the query
    cache: Name
    target: Name
    top_k: Count
    scale: float

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield Buffer(self.target, FloatType.F32, shapes.seq_len)

    def scratch_bytes(self, program: Program) -> int:
        """See `Op`."""
        from pyllama_kernels.selection import select_scratch_bytes  # looks at the CPU

        widths = {b.name: b.width for b in program.buffers}
        heads = widths[self.head_weights]
        return select_scratch_bytes(heads, widths[self.query] // max(1, heads))

    def validate(self, check: Check) -> None:
        """There is a weight for each head of the query, which are as wide as the keys."""
        keys = check.cache(self.cache)
        require(keys.kv_heads == 1, "more than one key head")
        require(isinstance(check.find(self.query), Buffer), "a query must be a buffer")
        require(isinstance(check.find(self.head_weights), Buffer), "weights must be a buffer")
        width = check.f32(self.head_weights) * keys.head_dim
        require(check.f32(self.query) == width, "heads and weights differ")
        check.batch_rows(self.query)
        check.batch_rows(self.head_weights)
        check_selection(check, self.target)
        check.number("scale", self.scale, 0)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        spec = memory.cache_specs[self.cache]
        reference.select(
            memory.heads(self.query, spec.head_dim),
            memory.f32(self.head_weights),
            memory.caches[self.cache],
            spec.float_type,
            *memory.row_places,
            self.top_k,
            self.scale,
            memory.f32(self.target),
        )

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        return [
            table.row(
                "select",
                self.target,
                Cut.SELECTION,
                a=table.at(self.query),
                b=table.at(self.head_weights),
                c=address(table.memory.caches[self.cache]),
                heads=table.width(self.head_weights),
                group=self.top_k,
                scale=self.scale,
                seq_len=table.program.seq_len,
            )
            | table.cache(self.cache)
        ]


def check_selection(check: Check, name: str) -> None:
    """Checks that a buffer has a number for each position."""
    require(check.f32(name) == check.program.seq_len, f"{name} is not seq_len wide")
    require(isinstance(check.find(name), Buffer), "a selection must be a buffer")
    check.batch_rows(name)

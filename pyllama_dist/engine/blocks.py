"""Bookkeeping of the KV cache: which physical block holds which tokens of which sequences.

The cache of every node consists of physical blocks of a fixed number of positions. A sequence has
a *chain* of them. Blocks form a tree: what a position holds depends on all tokens before it, so a
block's content is known by its own tokens and those of its ancestors. Chains that begin alike
share blocks, which count their references. A block that nobody references any more stays in the
tree as cache, until its memory is needed: least recently used first, leaves before their parents.

A block is written in place only by a chain that alone references it and whose end is the end of
what it holds; otherwise the chain gets a copy first (copy on write).

Everything here is bookkeeping at the root, which sends changes of the block table, and copies, to
the nodes.
Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
PagedAttention, 2023; the tree: Zheng et al., SGLang, 2023 (RadixAttention).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain as joined
from itertools import takewhile
from operator import eq


@dataclass(eq=False)
class Block:
    """A physical block, and its place in the tree."""

    number: int
    parent: "Block | None" = None
    tokens: list[int] = field(default_factory=list)  # of its positions, the planned step included
    computed: int = 0  # how many of them are there before the planned step
    references: int = 0  # by chains
    children: dict["Block", None] = field(default_factory=dict)  # in the order they came


@dataclass(eq=False)
class Chain:
    """The blocks of one sequence; more may be reserved than `length` needs."""

    blocks: list[Block] = field(default_factory=list)
    length: int = 0  # positions, the planned step included
    told: int = 0  # blocks at its beginning that the nodes' table has
    salt: str = ""  # chains share blocks only with those of the same salt


class BlockPool:
    """All physical blocks."""

    def __init__(self, n_blocks: int, size: int) -> None:
        """A pool whose blocks are free.

        Args:
            n_blocks: physical blocks.
            size: positions of each.
        """
        self.n_blocks, self.size = n_blocks, size
        self.copies: list[tuple[int, int]] = []  # (source, target): before the planned step
        self._free = [Block(number) for number in reversed(range(n_blocks))]
        self._idle: dict[Block, None] = {}  # cached; the least recently used first
        self._trees: dict[str, Block] = {}  # by salt: what is above all first blocks
        self._written: dict[Block, Chain] = {}  # in the planned step, by whom

    @property
    def available(self) -> int:
        """Blocks that no chain references: free ones, and those that are only cached."""
        return len(self._free) + len(self._idle)

    def needed(self, chain: Chain, length: int) -> int:
        """Blocks that a chain still lacks for so many positions, but for a copy on write."""
        return max(0, -(-length // self.size) - len(chain.blocks))

    def match(self, tokens: Sequence[int], salt: str = "") -> Chain:
        """A chain of the longest beginning of `tokens` that is cached or being computed.

        Whole blocks may be those that the planned step writes: a layer stores the keys and values
        of all rows before it reads any. Part of a block is copied before the step, so it must have
        been computed before.
        """
        chain, node = Chain(salt=salt), self._tree(salt)
        while chain.length % self.size == 0 and chain.length < len(tokens):
            rest = tokens[chain.length : chain.length + self.size]
            best, most = node, 0
            for child in node.children:
                common = _common_prefix(child.tokens, rest)
                if common < self.size:
                    common = min(common, child.computed)
                if common > most:
                    best, most = child, common
            if not most:
                break
            chain.blocks.append(best)
            chain.length += most
            self._reference(best)
            node = best
        return chain

    def fork(self, chain: Chain) -> Chain:
        """Another chain with the same content, in the same blocks; to be called between steps."""
        blocks = chain.blocks[: -(-chain.length // self.size)]
        for block in blocks:
            self._reference(block)
        return Chain(blocks, chain.length, salt=chain.salt)

    def reserve(self, chain: Chain, length: int) -> bool:
        """Gets what a chain needs to grow to `length`; false, and nothing changed, if it cannot.

        The last block is copied if it cannot be written in place. If memory does not suffice for
        the copy, what else was cached of that block is given up instead.
        """
        needed = self.needed(chain, length)
        if needed > self.available:
            return False
        place, used = divmod(chain.length, self.size)
        last = chain.blocks[place] if used and length > chain.length else None
        if last is not None and (last.references > 1 or len(last.tokens) > used):
            if needed < self.available:
                target = self._take()
                self.copies.append((last.number, target.number))
                self._adopt(target, last.parent, last.tokens[:used], used)
                self._replace(chain, place, target)
                self._release(last)
            elif last.references > 1:
                return False
            else:
                self._cut(last, used)
        chain.blocks += [self._take() for _ in range(needed)]
        return True

    def write(self, chain: Chain, tokens: Sequence[int]) -> None:
        """Plans that the next positions, which are reserved, get these tokens."""
        while tokens:
            place, used = divmod(chain.length, self.size)
            block, some = chain.blocks[place], tokens[: self.size - used]
            if not used:
                above = chain.blocks[place - 1] if place else self._tree(chain.salt)
                self._adopt(block, above, [], 0)
            block.tokens += some
            chain.length += len(some)
            tokens = tokens[len(some) :]
            self._written[block] = chain

    def settle(self) -> None:
        """The planned step has run. Full blocks that hold the same become one."""
        for block, chain in self._written.items():
            block.computed = len(block.tokens)
            full = block.computed == self.size and not block.children
            if not full or block.references > 1 or block.parent is None:
                continue
            for other in block.parent.children:
                if other is not block and other.tokens == block.tokens:
                    self._replace(chain, chain.blocks.index(block), other)
                    self._reference(other)
                    self._forget(block)
                    break
        self._written.clear()
        self.copies.clear()

    def truncate(self, chain: Chain, length: int) -> None:
        """Rolls a chain back to `length` positions; to be called between steps."""
        kept = -(-length // self.size)
        for block in reversed(chain.blocks[kept:]):
            self._release(block)
        del chain.blocks[kept:]
        chain.length, chain.told = min(chain.length, length), min(chain.told, kept)

    def release(self, chain: Chain) -> None:
        """Ends a chain. What its blocks hold stays as cache."""
        self.truncate(chain, 0)

    def forget(self) -> None:
        """Frees what is only cached."""
        for block in list(self._idle):
            self._forget(block)

    def blocks(self) -> Iterator[Block]:
        """All blocks of the trees, parents before their children."""
        return joined.from_iterable(map(self._below, self._trees.values()))

    def _tree(self, salt: str) -> Block:
        """The tree of a salt; of others, those that hold nothing go."""
        for other in [name for name, tree in self._trees.items() if not tree.children]:
            del self._trees[other]
        return self._trees.setdefault(salt, Block(-1))

    def _reference(self, block: Block) -> None:
        block.references += 1
        self._idle.pop(block, None)

    def _release(self, block: Block) -> None:
        block.references -= 1
        if block.references:
            return
        if block.parent is None:  # reserved, and never written
            self._free.append(block)
        else:
            self._idle[block] = None

    def _take(self) -> Block:
        """Returns a block without other references: a free one, or the least recently used."""
        if not self._free:
            # The first is a leaf: a parent is released after its children, so it comes later.
            self._forget(next(iter(self._idle)))
        block = self._free.pop()
        block.references = 1
        return block

    def _replace(self, chain: Chain, place: int, block: Block) -> None:
        chain.blocks[place] = block
        chain.told = min(chain.told, place)

    @staticmethod
    def _adopt(block: Block, parent: Block | None, tokens: list[int], computed: int) -> None:
        if parent is None:
            raise ValueError("a block that was never written has no content to continue")
        block.parent, block.tokens, block.computed = parent, tokens, computed
        parent.children[block] = None

    def _forget(self, block: Block) -> None:
        """Removes a block from the tree; neither it nor its descendants may be referenced."""
        self._cut(block, 0)
        if block.parent is not None:
            del block.parent.children[block]
        self._idle.pop(block, None)
        block.parent, block.references = None, 0
        self._free.append(block)

    def _cut(self, block: Block, used: int) -> None:
        """Forgets what a block holds after its first positions, and what comes after it."""
        for child in reversed(list(self._below(block))):
            self._forget(child)
        del block.tokens[used:]
        block.computed = min(block.computed, used)

    @staticmethod
    def _below(block: Block) -> Iterator[Block]:
        """The descendants of a block, parents before their children."""
        todo = list(block.children)
        while todo:
            child = todo.pop()
            yield child
            todo += child.children


class BlockTable:
    """What the nodes know: for each row of their block table, the blocks of a sequence."""

    def __init__(self, n_rows: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(n_rows)]

    def changes(self, row: int, chain: Chain) -> Iterator[tuple[int, int, int]]:
        """Entries (row, place, block) that make a row that of a chain."""
        known = self._rows[row]
        for place in range(chain.told, len(chain.blocks)):
            number = chain.blocks[place].number
            if place == len(known):
                known.append(-1)
            if known[place] != number:
                known[place] = number
                yield row, place, number
        chain.told = len(chain.blocks)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with.

    >>> _common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return sum(takewhile(bool, map(eq, one, other)))

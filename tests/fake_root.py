"""A root without a model: its logits are a hash of what a row sees through the block table."""

import threading
import zlib
from types import SimpleNamespace

import numpy as np

from pyllama_dist.node import Spent
from pyllama_dist.program import Batch


class FakeRoot:
    """Keeps the tokens that blocks hold, and sees those of the whole history of each row.

    A wrong block, a stale position, or a copy that is missing gives other logits. Blocks are full
    of garbage at first.
    """

    def __init__(
        self,
        *,
        n_seqs: int = 4,
        n_blocks: int = 16,
        block_size: int = 4,
        seq_len: int = 32,
        max_rows: int = 8,
        max_logits: int = 4,
        vocab_size: int = 50,
    ) -> None:
        self.size, self.vocab_size = block_size, vocab_size
        program = SimpleNamespace(
            n_seqs=n_seqs,
            n_blocks=n_blocks,
            seq_len=seq_len,
            max_rows=max_rows,
            max_logits=max_logits,
            n_nodes=1,
        )
        self.node = SimpleNamespace(program=program, spent=Spent())
        rng = np.random.default_rng(0)
        self.blocks = rng.integers(1000, 2000, (n_blocks, block_size))
        self.table = np.full((n_seqs, -(-seq_len // block_size)), -1)
        self._logits = np.empty((max_logits, vocab_size), np.float32)
        self.steps: list[tuple[list[int], Batch]] = []
        self.threads: set[threading.Thread] = set()
        self.fails_at: tuple[int, BaseException] | None = None  # before which step, and how

    @property
    def computed(self) -> int:
        """Rows of all steps."""
        return sum(len(tokens) for tokens, _ in self.steps)

    def step(self, tokens: list[int], batch: Batch) -> np.ndarray:
        program = self.node.program
        self.threads.add(threading.current_thread())
        if self.fails_at and len(self.steps) == self.fails_at[0]:
            raise self.fails_at[1]
        self.steps.append((list(tokens), batch))
        rows = list(zip(batch.seqs, batch.positions, strict=True))
        assert 1 <= len(rows) == len(tokens) <= program.max_rows
        assert len(batch.logits) <= program.max_logits
        assert max(batch.positions) < program.seq_len
        for seq, place, block in batch.table:
            self.table[seq, place] = block
        for source, target in batch.copies:
            self.blocks[target] = self.blocks[source]
        places = [(self.table[seq, at // self.size], at % self.size) for seq, at in rows]
        assert min(block for block, _ in places) >= 0
        assert len(set(places)) == len(rows), "two rows are kept in the same place"
        for place, token in zip(places, tokens, strict=True):
            self.blocks[place] = token
        for i, wanted in enumerate(batch.logits):
            self._logits[i] = self.logits_of(self.history(*rows[wanted]))
        self.node.spent.compute_seconds += 0.001
        return self._logits[: len(batch.logits)]

    def history(self, seq: int, position: int) -> list[int]:
        """The tokens that a row sees."""
        blocks = self.table[seq, : position // self.size + 1]
        return self.blocks[blocks].reshape(-1)[: position + 1].tolist()

    def logits_of(self, tokens: list[int]) -> np.ndarray:
        """[vocab] float32 that depend on all tokens and their order."""
        seed = zlib.crc32(np.array(tokens, np.int64).tobytes())
        return np.random.default_rng(seed).standard_normal(self.vocab_size, np.float32) * 3

    def close(self) -> None:
        pass

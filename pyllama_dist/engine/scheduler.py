"""Which rows the next step computes. Pure: it touches no node, and knows no time.

A step first has a row for each sequence that decodes, then rows of prompts, in the order in which
their sequences arrived: as many as the budget allows, in multiples of 16 but for the end of a
prompt. While others decode, prompts take fewer rows, so that those do not wait too long. A prompt
longer than the budget leaves half of it, in units of 16 rows, to later prompts that end within
that. An odd unit goes to either side in turns: if the budget is one unit, short prompts take every
second step.

Of those that wait, the first is one whose group has the fewest running. A sequence starts when
there are blocks for all its tokens. When one that decodes needs another
block and none is left, the newest sequence is preempted: it gives its blocks back and waits, in
its place in the order of arrival, to be computed again. The oldest sequence is never preempted, so
each one becomes the oldest, and ends.
"""

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from pyllama_dist.engine.blocks import BlockPool, BlockTable
from pyllama_dist.engine.sequence import Sequence, State
from pyllama_dist.program import Batch

_UNIT = 16  # rows that the kernels take together, and positions of a page
BESIDE = 64  # rows of prompts in a step in which others decode, unless the caller knows better


@dataclass(frozen=True)
class Step:
    """Rows for the nodes, and whose logits come back."""

    tokens: Tokens[int]
    batch: Batch
    rows: Tokens[tuple[Sequence, int]]  # of each sequence so many, in this order
    logits: Tokens[Sequence]  # whose row each wanted row of logits is


class Scheduler:
    """Sequences that wait or run, and the blocks that they share."""

    def __init__(self, pool: BlockPool, *, n_seqs: int, max_rows: int, max_logits: int) -> None:
        """A scheduler without sequences.

        Args:
            pool: the blocks of the KV cache.
            n_seqs: rows of the block table: sequences that run at once.
            max_rows: of a step.
            max_logits: of a step.
        """
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # both in the order of arrival
        self._table = BlockTable(n_seqs)
        self._rows = list(reversed(range(n_seqs)))
        self._max_rows, self._max_logits = max_rows, max_logits
        self._turn = 1  # who has an odd unit: 0 the long prompt, 1 those that overtake it
        self._unit = _UNIT if max_rows >= 2 * _UNIT else 1
        # Those that decode leave room for a prompt, and for its logits.
        self._most = max(1, min(n_seqs, max_rows - self._unit + 1, max_logits))

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait; alone it must fit the pool."""
        insort(self.waiting, sequence, key=_arrival)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever its state; its blocks stay as cache."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is not State.DONE:
            self._stop(sequence)
        sequence.state = State.DONE

    def plan(self, beside: int = BESIDE) -> Step | None:
        """The next step, for which everything is reserved; None if there is nothing to compute.

        `settle` must follow when it has run. Prompts have at most `beside` rows if others decode.
        """
        parts = [(sequence, 1) for sequence in self._decodes()]
        rows = sum(count for _, count in parts)
        budget = min(self._max_rows - rows, beside if rows else self._max_rows)
        parts += self._prefills(budget, self._max_logits - rows)
        return self._step(parts) if parts else None

    def settle(self) -> None:
        """The planned step has run."""
        self.pool.settle()

    def _decodes(self) -> list[Sequence]:
        chosen: list[Sequence] = []
        for sequence in self.running[:]:
            while sequence.state is State.DECODE:
                if self.pool.reserve(sequence.chain, len(sequence.tokens)):
                    self._write(sequence, 1)
                    chosen.append(sequence)
                    break
                self._preempt(chosen)
        return chosen

    def _preempt(self, chosen: Tokens[Sequence]) -> None:
        """Stops the newest sequence that is not in the step yet."""
        newest = next(s for s in reversed(self.running) if s not in chosen)
        self._stop(newest)
        newest.state = State.WAITING
        newest.timings.preemptions += 1
        self.add(newest)

    def _prefills(self, budget: int, logits: int) -> list[tuple[Sequence, int]]:
        parts = []
        prompts = [s for s in self.running if s.state is State.PREFILL] + self._queue()
        overtaken: Sequence | None = None
        kept = 0  # rows for the one that is overtaken
        self._turn = 1 - self._turn
        for place, sequence in enumerate(prompts):
            if budget < min(self._unit, sequence.remaining) or logits < 1:
                break
            if overtaken and sequence.remaining > budget:
                # Only who is being read is overtaken: who waits would have to wait for more blocks.
                if sequence.state is State.WAITING:
                    break
                continue
            if sequence.state is State.WAITING and not self._start(sequence):
                break
            # Left to prompts that end within it.
            short = (budget // self._unit + self._turn) // 2 * self._unit
            if sequence.remaining > budget and self._is_one_short(prompts[place + 1 :], short):
                overtaken, kept, budget = sequence, budget - short, short
                continue
            count = self._read(sequence, budget, logits)
            parts.append((sequence, count))
            budget -= count
            logits -= count if sequence.request.prompt_logits else not sequence.remaining
            if sequence.remaining:
                break
        if overtaken and (count := self._read(overtaken, kept + budget, logits)):
            parts.append((overtaken, count))
        return parts

    def _read(self, sequence: Sequence, most: int, logits: int) -> int:
        """Plans as many rows of a prompt as there may be, in multiples of 16 but for its end."""
        count = sequence.remaining
        if sequence.request.prompt_logits:
            count = most = min(logits, most, count)
        if count > most:
            count = most // self._unit * self._unit
        self._write(sequence, count)
        if not sequence.remaining:
            sequence.state = State.DECODE
        return count

    @staticmethod
    def _is_one_short(prompts: Tokens[Sequence], rows: int) -> bool:
        """Whether a prompt ends within `rows`, and none before it waits."""
        for sequence in prompts:
            if sequence.remaining <= rows:
                return True
            if sequence.state is State.WAITING:
                return False
        return False

    def _queue(self) -> list[Sequence]:
        """Those that wait: preempted ones first, then groups take turns."""
        running = Counter(sequence.request.group for sequence in self.running)
        queue = []
        for sequence in self.waiting:
            group = sequence.request.group
            turn = 0 if sequence.timings.preemptions else 1 + running[group]
            queue.append((turn, sequence.number, sequence))
            running[group] += 1
        return [sequence for _, _, sequence in sorted(queue, key=lambda entry: entry[:2])]

    def _start(self, sequence: Sequence) -> bool:
        """Gives a sequence a row and blocks for all its tokens, if there are any."""
        if len(self.running) >= self._most:
            return False
        pool, tokens = self.pool, sequence.tokens
        # The last token is always computed: its logits are what is needed.
        known = [] if sequence.request.prompt_logits else tokens[:-1]
        chain = pool.match(known, sequence.request.salt)
        # Each one that runs may soon need a block more.
        spare = pool.available - pool.needed(chain, len(tokens)) - len(self.running)
        if spare < 0 or not pool.reserve(chain, len(tokens)):
            pool.release(chain)
            return False
        if not sequence.timings.computed_tokens:
            sequence.timings.cached_tokens = chain.length
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        sequence.chain, sequence.row, sequence.state = chain, self._rows.pop(), State.PREFILL
        return True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.chain)
        self._rows.append(sequence.row)
        sequence.row = -1

    def _write(self, sequence: Sequence, count: int) -> None:
        start = sequence.chain.length
        self.pool.write(sequence.chain, sequence.tokens[start : start + count])
        sequence.timings.computed_tokens += count

    def _step(self, parts: Tokens[tuple[Sequence, int]]) -> Step:
        tokens: list[int] = []
        seqs: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        whose: list[Sequence] = []
        table: list[tuple[int, int, int]] = []
        for sequence, count in parts:
            end = sequence.chain.length
            tokens += sequence.tokens[end - count : end]
            seqs += [sequence.row] * count
            positions += range(end - count, end)
            table += self._table.changes(sequence.row, sequence.chain)
            last = count if sequence.request.prompt_logits else int(not sequence.remaining)
            wanted += range(len(tokens) - last, len(tokens))
            whose += [sequence] * last
        batch = Batch(
            tuple(seqs), tuple(positions), tuple(wanted), tuple(table), tuple(self.pool.copies)
        )
        return Step(tokens, batch, parts, whose)


def _arrival(sequence: Sequence) -> int:
    return sequence.number

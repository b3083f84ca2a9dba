"""The pages of a cache, and attention over them, against plain arithmetic on what is kept."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama_dist.executor.arena import arena
from pyllama_kernels import attention, blocks, cache, pages, reference
from pyllama_kernels.pages import KEPT_F16, KEPT_F32, KEPT_Q80, KV_BLOCK, PAGE
from tests.tiers import slow_but

F32 = np.float32
KINDS = (KEPT_F32, KEPT_F16, KEPT_Q80)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=["f32", "f16", "q80"])
STORES = {
    "compiled": (cache.store_keys, cache.store_values),
    "reference": (reference.store_keys, reference.store_values),
}

seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, F32)


# --- pages


def kept(x: np.ndarray, kind: int) -> list[bytes]:
    """What stands for each value of [head_dim]: its bytes, for Q80 those of its scale before it."""
    if kind != KEPT_Q80:
        return [value.tobytes() for value in x.astype("<f4" if kind == KEPT_F32 else "<f2")]
    found = blocks.quantize_q80(x).reshape(-1, 34)
    return [block[:2].tobytes() + block[2 + i : 3 + i].tobytes() for block in found
            for i in range(32)]  # fmt: skip


def held(
    page: np.ndarray, kind: int, head_dim: int, lane: int, i: int, is_key: bool
) -> list[slice]:
    """Where value `i` of a position lies in its page, as the docstring of `pages` has it."""
    if kind == KEPT_Q80:
        start, inside = 544 * (i // 32), i % 32
        quad = 4 * (16 * (inside // 4) + lane) + inside % 4
        place = quad if is_key else 32 * lane + inside
        return [slice(start + 2 * lane, start + 2 * lane + 2),
                slice(start + 32 + place, start + 33 + place)]  # fmt: skip
    size = 4 if kind == KEPT_F32 else 2
    start = i // PAGE * PAGE  # of the part of the values that it lies in
    width = min(PAGE, head_dim - start)
    place = size * (PAGE * i + lane if is_key else PAGE * start + width * lane + i - start)
    return [slice(place, place + size)]


@pytest.mark.parametrize("by", STORES)
@pytest.mark.parametrize("is_key", [True, False], ids=["keys", "values"])
@EVERY_KIND
@settings(max_examples=15)
@given(st.integers(0, 12), st.integers(1, 3), st.integers(1, 3), seeds)
def test_storing_writes_its_rows_and_nothing_else(by, is_key, kind, n_rows, heads, units, seed):
    n_blocks, head_dim = 3, 32 * units if kind == KEPT_Q80 else 11 * units
    rng = np.random.default_rng(seed)
    table = np.full((2, 4), -1, np.int64)
    table[[1, 1, 0], [0, 2, 1]] = rng.permutation(n_blocks)
    places = rng.permutation(n_blocks * KV_BLOCK)[:n_rows]  # which blocks, and where in them
    seqs, starts = np.array([[1, 0], [1, 2], [0, 1]])[places // KV_BLOCK].reshape(-1, 2).T
    positions = starts * KV_BLOCK + places % KV_BLOCK
    x = normal(seed, n_rows, heads + 1, head_dim) * F32(5)
    x[: n_rows // 3] = 0
    size = pages.page_bytes(kind, head_dim)
    found = np.full((n_blocks, heads + 1, pages.BLOCK_PAGES, size), 0xA5, np.uint8)
    expected = found.copy()
    STORES[by][not is_key](x[:, 1:], seqs, positions, table, kind, found[:, 1:])
    for row in range(n_rows):
        block = table[seqs[row], positions[row] // KV_BLOCK]
        for head in range(1, heads + 1):
            page = expected[block, head, positions[row] % KV_BLOCK // PAGE]
            for i, data in enumerate(kept(x[row, head], kind)):
                for place in held(page, kind, head_dim, positions[row] % PAGE, i, is_key):
                    size = place.stop - place.start
                    page[place] = np.frombuffer(data[:size], np.uint8)
                    data = data[size:]
    np.testing.assert_array_equal(found, expected)


def random_blocks(kind: int, head_dim: int, n_blocks: int, heads: int, seed: int) -> np.ndarray:
    """Blocks of any finite numbers, [n_blocks, heads, BLOCK_PAGES, page bytes] uint8."""
    shape = n_blocks, heads, pages.BLOCK_PAGES
    found = arena([(math.prod(shape), pages.page_bytes(kind, head_dim))])[0]
    x = normal(seed, math.prod(shape) * PAGE, head_dim)
    if kind == KEPT_F32:
        found.reshape(-1)[:] = x.reshape(-1).view(np.uint8)
    elif kind == KEPT_F16:
        found.reshape(-1)[:] = x.astype("<f2").reshape(-1).view(np.uint8)
    else:
        parts = blocks.quantize_q80(x).reshape(-1, PAGE, 34)  # scales, then numbers of any order
        parted = found.reshape(-1, PAGE * 34)
        parted[:, : 2 * PAGE] = parts[:, :, :2].reshape(-1, 2 * PAGE)
        parted[:, 2 * PAGE :] = parts[:, :, 2:].reshape(-1, 32 * PAGE)
    return found.reshape(*shape, -1)


@pytest.mark.parametrize("kind", [KEPT_F32, KEPT_F16], ids=["f32", "f16"])
@pytest.mark.parametrize("units", [1, 3])
def test_pages_are_unpacked(kind, units):
    page = random_blocks(kind, 11 * units, 1, 1, units)[0, 0, 0]
    keys = np.empty((11 * units, PAGE), F32)
    cache.unpack_numbers(page, kind, keys)
    expected = pages.read_positions(page[None], 11 * units, kind, lanes_last=True)
    np.testing.assert_array_equal(keys.T, expected)


@EVERY_KIND
@pytest.mark.parametrize("store", [0, 1], ids=["keys", "values"])
def test_what_is_kept_is_read_back(kind, store):
    x = normal(1, 2 * PAGE, 1, 64)
    held = np.zeros((1, 1, pages.BLOCK_PAGES, pages.page_bytes(kind, 64)), np.uint8)
    positions, table = np.arange(2 * PAGE), np.zeros((1, 1), np.int64)
    STORES["reference"][store](x, np.zeros_like(positions), positions, table, kind, held)
    found = pages.read_positions(held[0, 0, :2], 64, kind, lanes_last=store == 0)
    error = {KEPT_F32: 0, KEPT_F16: 2e-3, KEPT_Q80: np.abs(x).max() / 127 * 0.51}[kind]
    np.testing.assert_allclose(found, x[:, 0], rtol=0, atol=error)


# --- attention


class Task:
    """Queries of some rows, and caches whose blocks hold random keys and values."""

    def __init__(
        self, kind, seqs, positions, heads, group, first, head_dim, seed=0, size=1.0, latent=0
    ):
        """With `latent`, values are so many first numbers of the keys."""
        self.kind, self.group, self.first = kind, group, first
        self.value_dim, self.scale = latent or head_dim, 1 / math.sqrt(head_dim)
        self.mask = np.empty((0, 0), F32)
        self.seqs, self.positions = np.array(seqs, np.int64), np.array(positions, np.int64)
        n_seqs, each = max(seqs, default=0) + 1, pages.seq_blocks(max(positions, default=0) + 1)
        rng = np.random.default_rng(seed)
        self.table = rng.permutation(n_seqs * each).reshape(n_seqs, each)
        shape = n_seqs * each, (first + heads - 1) // group + 1
        self.query = normal(seed, len(seqs), heads, head_dim) * F32(size)
        self.keys = random_blocks(kind, head_dim, *shape, seed + 1)
        self.values = self.keys if latent else random_blocks(kind, head_dim, *shape, seed + 2)
        self.cells = pages.count_cells(max(positions, default=0) + 1, 256)

    def _common(self):
        rows = self.seqs, self.positions, self.table
        cached = self.query, self.keys, self.values, self.kind, *rows
        return *cached, self.first, self.group, self.scale, self.mask

    def select(self, seed: int) -> None:
        """Masks some of the positions, but never the first one."""
        rng = np.random.default_rng(seed)
        seq_len = self.positions.max() + 1
        hidden = rng.random((len(self.positions), seq_len)) < rng.random()
        self.mask = np.where(hidden, F32(-np.inf), F32(0))
        self.mask[:, 0] = 0

    def run(self, n_threads: int = 1) -> np.ndarray:
        """What the op loop does, one thread after the other."""
        rows, heads, head_dim = self.query.shape
        out = np.full((rows, heads, self.value_dim), np.nan, F32)
        parts = np.full((self.cells, heads, self.value_dim + 2), np.nan, F32)
        scratch = np.full(attention.scratch_bytes(head_dim) + 64, 0xFF, np.uint8)  # NaN
        place = scratch.ctypes.data
        for thread in range(n_threads):
            attention.attend(*self._common(), parts, out, place, thread, n_threads)
        for thread in range(n_threads):
            a, z = (heads * part // n_threads for part in (thread, thread + 1))
            attention.join(parts, self.seqs, self.positions, self.group, a, z, place, out)
        assert (scratch[-64:] == 0xFF).all()
        return out

    def in_numpy(self) -> np.ndarray:
        out = np.full((*self.query.shape[:2], self.value_dim), np.nan, F32)
        reference.attention(*self._common(), out)
        return out

    def plain(self) -> np.ndarray:
        """Softmax of scores, in float64; keys of Q80 meet queries that are rounded to Q80."""
        rows, heads, n = self.query.shape
        query = self.query
        if self.kind == KEPT_Q80:
            query = blocks.dequantize_q80(blocks.quantize_q80(query))
        out = np.empty((rows, heads, self.value_dim))
        for row in range(rows):
            count = self.positions[row] + 1
            for head in range(heads):
                kv_head = (self.first + head) // self.group
                k, v = (
                    pages.read_positions(
                        np.concatenate(list(held[self.table[self.seqs[row]], kv_head])),
                        n, self.kind, lanes_last=is_key,
                    )[:count]
                    for held, is_key in ((self.keys, True), (self.values, self.values is self.keys))
                )  # fmt: skip
                v = v[:, : self.value_dim]
                scores = k.astype(np.float64) @ query[row, head] / math.sqrt(n)
                if self.mask.size:
                    scores += self.mask[row, :count]
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v / weights.sum()
        return out


HEAD_DIMS = {
    KEPT_F32: (1, 6, 16, 33, 64, 128),
    KEPT_F16: (1, 6, 16, 33, 64, 128),
    KEPT_Q80: (32, 64, 128),
}


@pytest.mark.slow
@EVERY_KIND
@settings(max_examples=60)
@given(st.data())
def test_attention(kind, data):
    n_rows = data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 9)))
    longest = data.draw(st.sampled_from((1, 12, 33, 70)))
    seqs = data.draw(st.lists(st.integers(0, 2), min_size=n_rows, max_size=n_rows))
    positions = data.draw(st.lists(st.integers(0, longest - 1), min_size=n_rows, max_size=n_rows))
    size = data.draw(st.sampled_from((0.1, 1.0, 100.0)))
    task = Task(
        kind, seqs, positions,
        heads=data.draw(st.integers(1, 9)),
        group=data.draw(st.integers(1, 9)),
        first=data.draw(st.integers(0, 8)),
        head_dim=data.draw(st.sampled_from(HEAD_DIMS[kind])),
        seed=data.draw(seeds),
        size=size,
    )  # fmt: skip
    expected, atol = task.plain(), 2e-5 * max(1, size)
    np.testing.assert_allclose(task.in_numpy(), expected, atol=atol)
    if n_rows:
        found = task.run(data.draw(st.sampled_from((1, 2, 3, 5))))
        np.testing.assert_allclose(found, expected, atol=atol)


# More heads than form one batch, and numbers beside that; kinds of group that models have.
@EVERY_KIND
@pytest.mark.parametrize("group", slow_but([16, 65], [1, 8, 16, 63, 64, 65, 80]))
@pytest.mark.parametrize("n_rows", [1, 3])
def test_attention_of_large_groups(kind, group, n_rows):
    task = Task(kind, [0] * n_rows, range(40, 40 + n_rows), 80, group, group // 2, 32)
    np.testing.assert_allclose(task.run(), task.plain(), atol=2e-5)


# Rows that end at, before and behind the borders of pages and chunks.
LONG = [
    (254,),
    (255,),
    (256,),
    (257, 700),
    (1000, 0),
    (511, 512, 513),
    (15, 300, 16, 767),
    (255, 256, 257, 258, 700),
    tuple(range(490, 530)),
]


@EVERY_KIND
@pytest.mark.parametrize("positions", LONG, ids=lambda p: "-".join(map(str, p[:5])))
def test_long_attention_is_the_same_on_any_number_of_threads(kind, positions):
    seqs = [0] * len(positions) if len(positions) > 5 else [i % 2 for i in range(len(positions))]
    task = Task(kind, seqs, positions, 6, 4, 1, 32)
    found = task.run()
    np.testing.assert_allclose(found, task.plain(), atol=2e-5)
    for n_threads in (2, 3, 5):
        np.testing.assert_array_equal(task.run(n_threads), found)


@EVERY_KIND
@pytest.mark.parametrize("heads", slow_but([70], [1, 5, 20, 64, 70]))
@pytest.mark.parametrize("positions", [(0,), (37, 38, 39), (700,), tuple(range(100, 117))])
def test_latent_attention(kind, heads, positions):
    """All heads read one vector, whose first numbers are the values as well."""
    task = Task(kind, [0] * len(positions), positions, heads, heads + 3, 2, 96, latent=64)
    expected = task.plain()
    # Weights meet values of Q80 as activations meet weights: rounded to 7 bits.
    atol = 4e-2 if kind == KEPT_Q80 else 2e-5
    np.testing.assert_allclose(task.in_numpy(), expected, atol=2e-5)
    found = task.run()
    np.testing.assert_allclose(found, expected, atol=atol)
    assert np.abs(found - expected).mean() < atol / 8
    np.testing.assert_array_equal(task.run(3), found)


@pytest.mark.parametrize("heads", slow_but([9, 64], [1, 4, 7, 8, 9, 16, 33, 64]))
def test_latent_attention_stays_within_its_memory(heads):
    """Values as wide as keys, and as many positions as are taken at once."""
    task = Task(KEPT_Q80, [0], [1100], heads, heads, 0, 64, latent=64)
    np.testing.assert_allclose(task.run(), task.plain(), atol=4e-2)


@EVERY_KIND
@settings(max_examples=20)
@given(st.lists(st.integers(0, 1100), min_size=1, max_size=6, unique=True), st.booleans(), seeds)
def test_attention_to_selected_positions(kind, positions, latent, seed):
    task = Task(kind, [0] * len(positions), positions, 4, 4, 0, 64, latent=32 * latent)
    task.select(seed)
    expected = task.plain()
    np.testing.assert_allclose(task.in_numpy(), expected, atol=2e-5)
    atol = 4e-2 if latent and kind == KEPT_Q80 else 2e-5
    np.testing.assert_allclose(task.run(2), expected, atol=atol)


def test_a_large_batch_of_several_sequences():
    rng = np.random.default_rng(5)
    seqs, positions = np.sort(rng.integers(0, 5, 150)), rng.integers(0, 60, 150)
    task = Task(KEPT_F16, seqs.tolist(), positions.tolist(), 4, 2, 0, 16)
    found = task.run()
    np.testing.assert_allclose(found, task.plain(), atol=2e-5)
    np.testing.assert_array_equal(task.run(3), found)


@EVERY_KIND
@pytest.mark.parametrize("position", [0, 15, 16, 37, 254, 300])
def test_what_lies_behind_a_row_is_not_read(kind, position):
    """An earlier sequence of the block may have left anything."""
    clean, other = (Task(kind, [0], [position], 4, 2, 0, 32) for _ in range(2))
    behind = np.arange(position + 1, other.table.size * KV_BLOCK)
    for store, held in ((cache.store_keys, other.keys), (cache.store_values, other.values)):
        # The largest that all kinds of cache can hold.
        x = np.full((len(behind), held.shape[1], 32), 65504, F32)
        store(x, np.zeros_like(behind), behind, other.table, kind, held)
    np.testing.assert_array_equal(other.run(), clean.run())


@pytest.mark.parametrize("positions", [(3,), (700, 20)])
def test_equal_scores_give_the_mean(positions):
    task = Task(KEPT_F32, [0] * len(positions), positions, 2, 1, 0, 16)
    task.query[:] = 0
    for row, position in enumerate(positions):
        held = pages.pages_of(task.values, task.table[0], 1, position + 1)
        values = pages.read_positions(held, 16, KEPT_F32, lanes_last=False)
        mean = values[: position + 1].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(task.run()[row, 1], mean, atol=1e-6)


# --- what a result depends on


def batch_of(task: Task, rows: list[int]) -> np.ndarray:
    """The results of some rows of a task, in the batch that they make."""
    other = copy.copy(task)
    other.query = np.ascontiguousarray(task.query[rows])
    other.seqs, other.positions = task.seqs[rows], task.positions[rows]
    if task.mask.size:
        other.mask = np.ascontiguousarray(task.mask[rows])
    return other.run()


SHAPES = {  # heads, group, first, head_dim, values that are keys
    "mha": (5, 1, 0, 64, 0),
    "gqa": (6, 4, 1, 96, 0),
    "wide": (20, 16, 0, 32, 0),
    "latent": (20, 20, 0, 96, 64),
}
CONTEXTS = (40, 3 * KV_BLOCK + 5, pages.CHUNK + 20, 3 * pages.CHUNK + 100)


@EVERY_KIND
@pytest.mark.parametrize("shape", slow_but(["gqa"], SHAPES))
@settings(max_examples=25)
@given(st.data())
def test_a_row_has_the_same_result_in_any_batch(kind, shape, data):
    """Bit for bit: alone, with neighbours, on threads, wherever blocks lie, with few cells."""
    heads, group, first, head_dim, latent = SHAPES[shape]
    n_rows, longest = data.draw(st.integers(2, 24)), data.draw(st.sampled_from(CONTEXTS))
    rng = np.random.default_rng(data.draw(seeds))
    if data.draw(st.booleans()):  # a part of a prompt, and others' steps
        start = int(rng.integers(0, longest))
        ends = rng.integers(0, longest, n_rows // 3).tolist()
        positions = [*range(start, start + n_rows - len(ends)), *ends]
        seqs = [0] * (n_rows - len(ends)) + rng.integers(1, 4, len(ends)).tolist()
    else:
        positions = rng.integers(0, longest, n_rows).tolist()
        seqs = rng.integers(0, 4, n_rows).tolist()
    size = data.draw(st.sampled_from((1.0, 30.0)))
    task = Task(
        kind, seqs, positions, heads, group, first, head_dim, n_rows, size=size, latent=latent
    )
    if data.draw(st.booleans()):
        task.select(n_rows)
    expected = task.run()
    for n_threads in (2, 3, 7):
        np.testing.assert_array_equal(task.run(n_threads), expected)
    for cells in (0, task.cells // 2):
        task.cells = cells
        np.testing.assert_array_equal(task.run(3), expected)
    for row in range(min(n_rows, 6)):
        np.testing.assert_array_equal(batch_of(task, [row])[0], expected[row])
    some = rng.permutation(n_rows)[: rng.integers(1, n_rows)].tolist()
    np.testing.assert_array_equal(batch_of(task, some), expected[some])
    moved = rng.permutation(task.table.size)  # where each block goes
    task.keys = task.keys[np.argsort(moved)]
    task.values = task.keys if latent else task.values[np.argsort(moved)]
    task.table = moved[task.table]
    np.testing.assert_array_equal(task.run(2), expected)


@EVERY_KIND
@pytest.mark.parametrize("latent", [False, True])
def test_an_unset_block_behind_the_rows_is_not_read(kind, latent):
    task = Task(kind, [0, 1], [10, KV_BLOCK - 1], 4, 4, 0, 64, latent=32 * latent)
    expected = task.run()
    task.table = np.concatenate([task.table, np.full((2, 3), -1)], axis=1)
    np.testing.assert_array_equal(task.run(), expected)

"""The table of ops that the op loop works through: what a row says, and how it is read."""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray

from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import float32_pointer, int64_pointer, uint8_pointer
from pyllama_kernels.plans import EXPERTS, HEAD, ROOM, plan_words


class Cut(IntEnum):
    """How an op is cut into parts for the threads: see `oploop.count_parts`."""

    ONE = 0  # not at all
    ROWS = 1  # by rows of the batch
    NUMBERS = 2  # anywhere
    PRODUCTS = 3  # by outputs, with all products of the same input: see `products`
    ATTENTION = 4  # by key heads, rows and chunks of positions
    SELECTION = 5  # by rows that each take long


# Addresses are of the first byte; `n` and `m` are values in a row of the input and of the output.
OP = np.dtype(
    [
        ("entry", np.int64),  # address of the function that does a part: see `entry`
        ("cut", np.int64),
        ("cost", np.int64),  # numbers that each row takes, to judge whether threads pay
        ("rows", np.int64),  # which word of a step counts the rows that are written
        ("a", np.int64),  # first input
        ("b", np.int64),  # second input: up, value cache, sin
        ("c", np.int64),  # third input: bias, key cache, cos
        ("w", np.int64),  # weight; for experts: the addresses of their weights
        ("out", np.int64),
        ("n", np.int64),
        ("m", np.int64),
        ("heads", np.int64),
        ("kv_heads", np.int64),
        ("seq_len", np.int64),
        ("n_blocks", np.int64),
        ("kind", np.int64),  # float type of a weight or a cache; of the others what they say
        ("page_bytes", np.int64),
        ("first", np.int64),
        ("group", np.int64),
        ("parts", np.int64),
        ("stride", np.int64),  # bytes between the parts of a pipe
        ("epsilon", np.float64),
        ("scale", np.float64),  # of scores, or of experts' weights
        ("plan", np.int64),  # see `plans`
        ("active", np.int64),  # experts chosen for each row
        ("active_groups", np.int64),
        ("normalize", np.int64),
        # Ops from this one on that are fused: itself, products of the same input, or ops of which
        # a part needs only the same part of those before it.
        ("fused", np.int64),
        ("units", np.int64),  # key heads that those are cut into; 0: whatever parts there are
    ],
    align=True,
)

# The words of `step`, an int64 array: counts of rows (of the batch, with logits, of experts), the
# addresses of the rows' facts; the table of blocks and its shape; and memory for attention: the
# chunks' results, for so many chunks of rows, and scratch of so many bytes for each thread. At last
# the rows of a sum that are made to be sent.
N_ROWS, N_LOGITS, N_PAIRS, SEQS, POSITIONS, LOGITS = range(6)
TABLE, N_SEQS, SEQ_BLOCKS, PARTS, CELLS, SCRATCH, SCRATCH_BYTES = range(6, 13)
N_REDUCED = 13
STEP_WORDS = 14


@kernel
def f32(address: int, *shape: int) -> Any:
    """Float32 memory as an array of the given shape."""
    return carray(float32_pointer(address), shape)


@kernel
def u8(address: int, *shape: int) -> Any:
    """Uint8 memory as an array of the given shape."""
    return carray(uint8_pointer(address), shape)


@kernel
def i64(address: int, n: int) -> Any:
    """Int64 memory as an array of n."""
    return carray(int64_pointer(address), (n,))


@kernel
def table_of(step: Any) -> Any:
    """The table of blocks, [n_seqs, blocks per sequence] int64: see `pages`."""
    return carray(int64_pointer(step[TABLE]), (step[N_SEQS], step[SEQ_BLOCKS]))


@kernel
def plan_at(address: int) -> Any:
    """The dispatch plan of a mixture of experts at an address, int64: see `plans`."""
    head = i64(address, HEAD)
    return i64(address, plan_words(head[EXPERTS], head[ROOM]))


@kernel
def split(total: int, part: int, parts: int) -> tuple[int, int]:
    """Start and stop of part `part` when `total` items are split into `parts` even parts."""
    return total * part // parts, total * (part + 1) // parts

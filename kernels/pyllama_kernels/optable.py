"""The table of ops that the op loop works through: what a row says, and how it is read."""

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray

from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import float32_pointer, int64_pointer, uint8_pointer
from pyllama_kernels.plans import EXPERTS, HEAD, ROOM, plan_words


class Code(IntEnum):
    """What an op does: the kernel of the same name. The families lie one after the other."""

    # Rows of a batch: see `units.run_rows`.
    RMS_NORM = 0
    LAYER_NORM = 1
    QUANTIZE = 2
    PACK_Q80 = 3
    SILU_MUL = 4
    MERGE_F32 = 5
    MERGE_Q80 = 6
    ADD = 7
    GATHER = 8
    DISPATCH = 9  # gathers the rows of a plan
    # Products: see `products`.
    MATMUL_F32 = 10
    MATMUL_Q40 = 11
    MATMUL_Q80 = 12
    EXPERTS_F32 = 13  # for each expert, the kernel that `MATMUL_F32` is for a batch
    EXPERTS_Q40 = 14
    EXPERTS_Q80 = 15
    # Attention: see `units.run_attention`.
    ROPE = 16
    CONCAT = 17
    STORE_KEYS = 18
    STORE_VALUES = 19
    ATTEND = 20
    JOIN = 21
    SELECT = 22
    # Who gets which rows, of experts: see `units.run_experts`.
    ROUTE = 23
    MAKE_PLAN = 24
    QUANTIZE_EXPERTS = 25
    COMBINE = 26


# Addresses are of the first byte; `n` and `m` are values in a row of the input and of the output.
OP = np.dtype(
    [
        ("code", np.int64),
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
        ("kind", np.int64),  # of a cache, see `pages`
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
        # Ops from this one on that several threads work on at once: itself, products of the same
        # input, or ops of which a part needs only the same part of those before it.
        ("together", np.int64),
        ("units", np.int64),  # key heads that those are cut into; 0: whatever parts there are
    ],
    align=True,
)

# The words of `step`, an int64 array: counts of rows (of the batch, with logits, of experts), the
# addresses of the rows' facts; the table of blocks and its shape; and memory for attention: the
# chunks' results, for so many chunks of rows, and scratch of so many bytes for each thread.
N_ROWS, N_LOGITS, N_PAIRS, SEQS, POSITIONS, LOGITS = range(6)
TABLE, N_SEQS, SEQ_BLOCKS, PARTS, CELLS, SCRATCH, SCRATCH_BYTES = range(6, 13)
STEP_WORDS = 13


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
    """A plan, int64."""
    head = i64(address, HEAD)
    return i64(address, plan_words(head[EXPERTS], head[ROOM]))


@kernel
def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """A part of `total` things: start and stop."""
    return total * part // parts, total * (part + 1) // parts

"""Measures memory bandwidth: the limit of every kernel that reads each weight once.

Loads are 512 bits wide in the code; on a CPU with narrower vectors each becomes several. Their sum
is returned, so that the compiler cannot remove them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, misc"

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pyllama_kernels.jit import exact_kernel
from pyllama_kernels.lowlevel import LINE

_SUMS = 8  # lines read in one turn of the loop, each into a sum of its own
TURN = LINE * _SUMS
_SECONDS = 0.1  # of reading, at least: one pass may be 10 % faster or slower than the next


class MemoryReader:
    """Threads that read a buffer from one end to the other, as often as they are asked to."""

    def __init__(self, n_threads: int, n_bytes: int = 1 << 30) -> None:
        """Makes the buffer, and reads it once.

        Args:
            n_threads: threads, each with its own part of the buffer.
            n_bytes: size of the buffer; far more than the caches hold.

        Raises:
            ValueError: the buffer is too small to be shared out.
        """
        self.n_threads = n_threads
        part = n_bytes // n_threads // TURN * TURN
        if part == 0:
            raise ValueError(f"{n_bytes} bytes for {n_threads} threads: {TURN} each are the least")
        self._buffer = np.empty(part * n_threads + LINE, np.uint8)
        self._buffer.fill(1)  # pages that were never written are all the same one
        first = self._buffer.ctypes.data + -self._buffer.ctypes.data % LINE
        self._parts = [(first + i * part, first + (i + 1) * part) for i in range(n_threads)]
        self._threads = ThreadPoolExecutor(n_threads, "read")
        self.bytes_per_second()

    def bytes_per_second(self) -> float:
        """The mean of some passes over the whole buffer."""
        started, seconds, passes = time.perf_counter(), 0.0, 0
        while seconds < _SECONDS:
            reads = [self._threads.submit(sum_of, *part) for part in self._parts]
            for read in reads:
                read.result()
            seconds, passes = time.perf_counter() - started, passes + 1
        return passes * sum(end - start for start, end in self._parts) / seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()
        del self._buffer, self._parts


@intrinsic
def _sum_lines(typingctx, start, end):
    def codegen(context, builder, signature, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        line = ir.VectorType(i32, 16)
        zero = ir.Constant(line, None)
        sums = [cgutils.alloca_once_value(builder, zero) for _ in range(_SUMS)]
        with cgutils.for_range_slice(builder, *args, i64(TURN), i64) as (at, _):
            for i, total in enumerate(sums):
                address = builder.add(at, i64(i * LINE))
                pointer = builder.inttoptr(address, line.as_pointer())
                read = builder.load(pointer, align=LINE)
                builder.store(builder.add(builder.load(total), read), total)
        whole = zero
        for total in sums:
            whole = builder.add(whole, builder.load(total))
        result = i32(0)
        for lane in range(16):
            result = builder.add(result, builder.extract_element(whole, i32(lane)))
        return builder.zext(result, i64)

    return types.int64(types.int64, types.int64), codegen


@exact_kernel
def sum_of(start: int, end: int) -> int:
    """The sum of the 32-bit words from address `start` to `end`, modulo 2^32.

    Both are multiples of 64, and `TURN` divides their distance.
    """
    return _sum_lines(start, end)

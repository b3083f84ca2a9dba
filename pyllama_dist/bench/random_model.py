"""A model of random weights that takes next to no memory: all its tensors are views of one pool.

Row i of a tensor begins i blocks further in the pool than row 0, so a matrix of any size needs
little more than one block for each row. What nodes hold of it is as large as ever: they copy.
"""

import math
from zlib import crc32

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from pyllama_dist.config import FloatType, ModelConfig, Tensor
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.program import Span
from pyllama_kernels.blocks import Q40_BYTES

U8 = npt.NDArray[np.uint8]

_STARTS = 4096  # blocks of the pool at which a tensor may begin
# From 1024 to 23040 normed inputs a matrix then makes values of a size of 1 to 3: none overflows.
_Q40_SCALE = 0.005
# Routers choose by scores: with these they are far from 0 and 1, so that any expert may be chosen.
_ROUTER_SCALE = 0.02


class RandomModel:
    """A `WeightSource` for a configuration whose matrices are Q40."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """Makes the pools.

        Args:
            config: what a `.m` header would say.
            seed: another one gives other weights.
        """
        self.config = config
        self.tensors = {t.name: t for t in ARCHITECTURES[config.arch].tensors(config)}
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(self._blocks(FloatType.F32), np.float32)
        self._pools = {
            FloatType.F32: values.view("u1"),
            FloatType.Q40: _random_q40(self._blocks(FloatType.Q40), rng),
        }
        self._router = (np.float32(_ROUTER_SCALE) * values).view("u1")

    def slice(self, name: str, rows: Span, cols: Span) -> U8:
        """Part of a tensor, [rows, bytes] uint8, in the file's format."""
        first, last = map(self.tensors[name].float_type.row_bytes, cols)
        return self.raw(name)[rows[0] : rows[1], first:last]

    def raw(self, name: str) -> U8:
        """A whole tensor, [rows, bytes] uint8, in the file's format."""
        tensor = self.tensors[name]
        block = tensor.float_type.block_bytes
        pool = self._router if ".mlp.gate." in name else self._pools[tensor.float_type]
        rows_at = sliding_window_view(pool, tensor.float_type.row_bytes(tensor.shape[-1]))
        start = crc32(name.encode()) % _STARTS
        return rows_at[start * block : (start + _rows(tensor)) * block : block]

    def drop_pages(self) -> None:
        """Nothing to let go of."""

    def _blocks(self, float_type: FloatType) -> int:
        """Blocks of a pool from which every tensor of a number format can be cut."""
        return _STARTS + max(
            _rows(tensor) + tensor.shape[-1] // float_type.block
            for tensor in self.tensors.values()
            if tensor.float_type is float_type
        )


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _random_q40(blocks: int, rng: np.random.Generator) -> U8:
    """Q40 blocks, flat: nibbles of all values, scales of both signs, so that the mean is 0."""
    pool = rng.integers(0, 256, (blocks, Q40_BYTES), np.uint8)
    scales = rng.uniform(0.5, 1, blocks) * rng.choice((-_Q40_SCALE, _Q40_SCALE), blocks)
    pool[:, :2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return pool.reshape(-1)

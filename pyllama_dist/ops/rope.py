"""Rotary position embeddings."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import Pairs, RopeScaling
from pyllama_dist.executor.lowering import Cut, Lowering, Row, address
from pyllama_dist.executor.memory import F32, Constant, Memory
from pyllama_dist.program import Count, Name, Op, Part, Program, Width
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference

_POSITIONS = 4096  # whose angles are worked out at once


class Rope(Part, Op, frozen=True, tag="rope"):
    """Applies RoPE to the first `rotary_dim` dimensions of each head, in place."""

    target: Name
    head_dim: Count
    rotary_dim: Width
    theta: float
    pairs: Pairs = Pairs.ADJACENT
    scaling: RopeScaling | None = None

    @property
    def _key(self) -> tuple[object, ...]:
        return "rope", self.rotary_dim, self.theta, self.scaling

    def constants(self, program: Program) -> Iterator[Constant]:
        """Cosines and sines of all positions, for all ops that rotate alike."""
        size = 4 * self.rotary_dim * program.seq_len
        args = program.seq_len, self.rotary_dim, self.theta, self.scaling
        yield Constant(self._key, size, lambda: rope_tables(*args))

    def validate(self, check: Check) -> None:
        """See `Op`."""
        require(check.f32(self.target) % self.head_dim == 0, "heads are not whole")
        require(self.rotary_dim % 2 == 0, "rotary_dim is odd")
        require(self.rotary_dim <= self.head_dim, "rotary_dim is beyond the head")
        check.number("theta", self.theta, 1e-30)
        if self.scaling is not None:
            check.number("factor", self.scaling.factor, 1e-30)
            check.number("low_freq_factor", self.scaling.low_freq_factor, 1e-30)
            check.number("high_freq_factor", self.scaling.high_freq_factor, 1e-30)
        check.batch_rows(self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        cos, sin = memory.constants[self._key]
        halves, x = self.pairs is Pairs.HALVES, memory.heads(self.target, self.head_dim)
        reference.rope(memory.row_positions, cos, sin, halves, x)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        cos, sin = table.memory.constants[self._key]
        width = table.width(self.target)
        return [
            table.row(
                "rope",
                self.target,
                Cut.NUMBERS,
                cost=width,
                by_head=True,
                c=address(cos),
                b=address(sin),
                n=self.head_dim,
                m=self.rotary_dim // 2,
                heads=width // self.head_dim,
                seq_len=table.program.seq_len,
                kind=self.pairs is Pairs.HALVES,
            )
        ]


def rope_tables(
    seq_len: int, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[F32, F32]:
    """Cosines and sines of position * theta^(-2i / rotary_dim), the frequencies maybe scaled.

    Returns:
        Two arrays [seq_len, rotary_dim / 2] float32.

    Source: rope types "default" and "llama3" of transformers.
    """
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    frequencies = theta ** (-2 * pairs / rotary_dim)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    cos = np.empty((seq_len, len(pairs)), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, seq_len, _POSITIONS):  # in float64, but never all of it
        angles = np.outer(np.arange(start, min(start + _POSITIONS, seq_len)), frequencies)
        cos[start : start + _POSITIONS] = np.cos(angles)
        sin[start : start + _POSITIONS] = np.sin(angles)
    return cos, sin


def _scaled(frequencies: npt.NDArray[np.float64], s: RopeScaling) -> npt.NDArray[np.float64]:
    """Divides low frequencies by the factor, keeps high ones, and interpolates in between."""
    turns = s.original_max_seq_len * frequencies / (2 * np.pi)  # within the trained length
    span = s.high_freq_factor - s.low_freq_factor
    # Where both are one there is nothing between: long or short.
    kept = (turns - s.low_freq_factor) / span if span else turns > s.high_freq_factor
    kept = np.clip(kept, 0, 1).astype(np.float64)
    return frequencies * (kept + (1 - kept) / s.factor)

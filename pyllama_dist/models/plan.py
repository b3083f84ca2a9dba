"""What a model's `build()` is given besides the configuration: the cut and the limits."""

from dataclasses import dataclass

from pyllama_dist.config import FloatType
from pyllama_dist.partition import Share


@dataclass(frozen=True)
class Plan:
    """How a model is spread over nodes, and how much each step and cache must hold."""

    shares: tuple[Share, ...]  # one for each node
    sync: FloatType  # F32 or Q80: how partial sums travel
    max_rows: int
    max_logits: int
    n_slots: int
    seq_len: int

    @property
    def n_nodes(self) -> int:
        """Root and workers."""
        return len(self.shares)

    @property
    def partials(self) -> FloatType:
        """How partial sums are kept. A single node has nobody to send them to: float32."""
        return self.sync if self.n_nodes > 1 else FloatType.F32

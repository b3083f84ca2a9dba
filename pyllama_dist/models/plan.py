"""What a model's `build()` is given besides the configuration: the cut and the limits."""

from dataclasses import dataclass

from pyllama_dist.config import FloatType, ModelConfig
from pyllama_dist.partition import Share, partition


@dataclass(frozen=True)
class Plan:
    """How a model is spread over nodes, and how much each step and cache must hold."""

    shares: tuple[Share, ...]  # one for each node
    sync: FloatType  # F32 or Q80: how partial sums travel
    cache: FloatType  # F32, F16 or Q80: how keys and values are kept
    max_rows: int
    max_logits: int
    n_seqs: int
    n_blocks: int
    seq_len: int

    @property
    def n_nodes(self) -> int:
        """Root and workers."""
        return len(self.shares)


def shares(config: ModelConfig, n_nodes: int) -> tuple[Share, ...]:
    """The share of each node of a model.

    Raises:
        ValueError: the model cannot be cut for so many nodes.
    """
    return partition(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.value_dim,
        ffn_dim=config.ffn_dim,
        vocab_size=config.vocab_size,
        n_nodes=n_nodes,
        block=config.weights.block,
        expert_dim=config.experts.ffn_dim if config.experts else 0,
        shared_dim=config.experts.shared_ffn_dim if config.experts else 0,
    )

"""How a model is sharded over nodes, and the limits of its steps and caches."""

from dataclasses import dataclass

from pyllama_dist.config import FloatType, ModelConfig
from pyllama_dist.partition import Shard, partition


@dataclass(frozen=True)
class ShardingPlan:
    """What `build()` of a model gets besides the configuration: shards, dtypes and limits."""

    shards: tuple[Shard, ...]  # one for each node
    sync: FloatType  # dtype of partial sums on the wire: F32 or Q80
    cache: FloatType  # dtype of the KV cache: F32, F16 or Q80
    max_rows: int
    max_logits: int
    n_seqs: int
    n_blocks: int
    seq_len: int

    @property
    def n_nodes(self) -> int:
        """The number of nodes: root and workers."""
        return len(self.shards)


def shards(config: ModelConfig, n_nodes: int) -> tuple[Shard, ...]:
    """The shard of each node of a model.

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

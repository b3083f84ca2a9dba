"""Who holds what: from a model, a user's wishes and what the nodes have to a program for each node.

Nothing here talks to anybody.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from pyllama_dist.config import FloatType, ModelConfig
from pyllama_dist.cores import available_cores
from pyllama_dist.errors import NodeError, UsageError
from pyllama_dist.executor.memory import block_bytes, planned_bytes
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.models.plan import ShardingPlan, shards
from pyllama_dist.net.collectives import AUTO
from pyllama_dist.net.messages import NodeInfo
from pyllama_dist.net.transport import Address
from pyllama_dist.partition import max_nodes
from pyllama_dist.program import Program
from pyllama_kernels.pages import KV_BLOCK, seq_blocks

MAX_NODES = 256
MAX_ROWS = 256  # rows of a batch while a prompt is read: each weight is fetched once for all
MAX_SEQS = 16  # sequences that run at once, and rows of a batch whose logits can be asked for
DEFAULT_SEQ_LEN = 8192  # the cache of a longer context is taken only when asked for


@dataclass(frozen=True)
class Cluster:
    """What a user asks for."""

    workers: tuple[Address, ...] = ()
    local_workers: int = 0
    n_threads: int | None = None  # of each node on this machine; None: share out the cores
    sync: FloatType = FloatType.Q80
    cache: FloatType | None = None  # of keys and values; None: what suits the model
    max_seq_len: int | None = None
    kv_blocks: int | None = None  # of the KV cache; None: as many as one context needs
    kv_memory: int | None = None  # bytes of all nodes together, instead of `kv_blocks`
    timeout: float = 60.0
    collective: str = AUTO
    notice: Callable[[str], None] = field(default=lambda text: None)

    @property
    def n_nodes(self) -> int:
        """Root and workers."""
        return 1 + len(self.workers) + self.local_workers

    @property
    def threads(self) -> int:
        """Threads of each node on this machine."""
        return self.n_threads or max(1, available_cores() // (1 + self.local_workers))


def plan(config: ModelConfig, cluster: Cluster, nodes: Mapping[str, NodeInfo]) -> list[Program]:
    """The program of each node, which it can hold.

    Args:
        config: the model.
        cluster: what the user asks for.
        nodes: what each node has, by name, the root first.

    Raises:
        UsageError: the model cannot be cut like that.
        NodeError: nodes lack memory; with numbers.
    """
    made = programs(config, cluster)
    check_memory(made, nodes)
    return made


def check_memory(programs: Sequence[Program], nodes: Mapping[str, NodeInfo]) -> None:
    """Checks that each machine has what its nodes need.

    Raises:
        NodeError: some do not; all of them are named.
    """
    by_machine = sorted(
        zip(nodes, nodes.values(), map(planned_bytes, programs), strict=True),
        key=lambda node: node[1].machine,
    )
    short = []
    for _, group in groupby(by_machine, lambda node: node[1].machine):
        names, infos, needed = zip(*group, strict=True)
        available = min(info.memory for info in infos)
        if sum(needed) > available:
            need = "needs" if len(names) == 1 else "on one machine need"
            short.append(
                f"{', '.join(names)} {need} {sum(needed) / 1e9:.2f} GB, {available / 1e9:.2f} GB "
                f"are available"
            )
    if short:
        raise NodeError(f"{'; '.join(short)}; use more machines, or a lower --max-seq-len")


def check_request(config: ModelConfig, cluster: Cluster) -> None:
    """Checks what can be checked before any node is asked.

    Raises:
        UsageError: the model cannot be cut for so many nodes, or not be synchronised in Q80.
    """
    most, n = max_nodes(config.n_heads, config.value_dim, config.weights.block), cluster.n_nodes
    if n > min(most, MAX_NODES):
        raise UsageError(
            f"{n} nodes, and this model has query heads for at most {most}; use fewer workers "
            f"({MAX_NODES - 1} at most)"
        )
    if cluster.sync is FloatType.Q80 and n > 1 and config.dim % 32:
        raise UsageError(
            f"a model of dim {config.dim} has no whole Q80 blocks; add --buffer-float-type f32"
        )
    if cluster.cache is FloatType.Q80 and _odd(config):
        raise UsageError(
            f"heads of {_odd(config)[0]} values are no whole Q80 blocks; use --kv-cache-type f16"
        )


def programs(config: ModelConfig, cluster: Cluster) -> list[Program]:
    """The program of each node, whatever the nodes have.

    Raises:
        UsageError: the model cannot be cut for so many nodes, or not be synchronised in Q80.
    """
    check_request(config, cluster)
    n = cluster.n_nodes
    seq_len = min(config.max_seq_len, cluster.max_seq_len or DEFAULT_SEQ_LEN)
    plan = ShardingPlan(
        shards(config, n),  # here sizes of shards are decided: equal ones, so far
        sync=cluster.sync,
        cache=_cache_type(config) if cluster.cache is None else cluster.cache,
        max_rows=MAX_ROWS,
        max_logits=MAX_SEQS,
        n_seqs=MAX_SEQS,
        n_blocks=cluster.kv_blocks or seq_blocks(seq_len),
        seq_len=seq_len,
    )

    def build(plan: ShardingPlan) -> list[Program]:
        return [ARCHITECTURES[config.arch].build(config, plan, node) for node in range(n)]

    found = build(plan)
    if cluster.kv_memory is None:
        return found
    each = sum(map(block_bytes, found))
    if cluster.kv_memory < each:
        raise UsageError(
            f"--kv-memory {cluster.kv_memory} holds no block of the KV cache; one of {KV_BLOCK} "
            f"positions takes {each} bytes"
        )
    return build(replace(plan, n_blocks=cluster.kv_memory // each))


def _cache_type(config: ModelConfig) -> FloatType:
    """Default dtype of the KV cache: that of activations, or F16 if heads are not whole blocks."""
    if config.weights is FloatType.F32:
        return FloatType.F32
    return FloatType.F16 if _odd(config) else FloatType.Q80


def _odd(config: ModelConfig) -> list[int]:
    """Widths of the cached vectors that are not a multiple of a Q80 block."""
    widths = [config.head_dim]
    if config.latent:
        widths = [config.latent.kv_rank, config.latent.rope_dim]
    if config.indexer:
        widths.append(config.indexer.head_dim)
    return [width for width in widths if width % FloatType.Q80.block]

"""What a model weighs: its parameters, what a token reads of them, and what each node must hold.

Parameters are counted from the list of tensors, memory from the nodes' programs. A layer for
predicting several tokens (MTP) is in neither. distributed-llama's formats are counted: embedding,
norms, biases and routers in float32, all other matrices in the format of the weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType, ModelConfig, Tensor
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.formats.dllama.model_file import tensor_bytes
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.models.plan import shards
from pyllama_dist.partition import Shard
from pyllama_dist.program import Program, weights
from pyllama_kernels.pages import KV_BLOCK


@dataclass(frozen=True)
class ModelSizes:
    """What a model weighs, however it is cut.

    Attributes:
        parameters: all numbers of the checkpoint; a tied head is the embedding.
        active_parameters: of the matrices that a token is multiplied with, `lm_head` included: of
            experts those that are chosen.
        file_bytes: of all tensors in the `.m` file, where a tied head is a copy.
        token_bytes: of the matrices that are read for each token.
        cache: how keys and values are kept.
        kept_values: numbers kept for each position, in all layers.
        kept_bytes: the same in bytes.
    """

    parameters: int
    active_parameters: int
    file_bytes: int
    token_bytes: int
    cache: FloatType
    kept_values: int
    kept_bytes: int


@dataclass(frozen=True)
class NodeSizes:
    """What one node holds, in bytes; the root's embedding stays in its file.

    Attributes:
        shard: the node's part of the model.
        seq_len: positions of the context.
        weight_bytes: of its weights.
        cache_bytes: of keys and values.
        memory_bytes: of everything that grows with the model: these and buffers.
    """

    shard: Shard
    seq_len: int
    weight_bytes: int
    cache_bytes: int
    memory_bytes: int


def model_sizes(
    config: ModelConfig, *, cache: FloatType | None = None, tied: bool = False
) -> ModelSizes:
    """The sizes of a model.

    Args:
        config: the model.
        cache: how keys and values are kept; None: as the model's programs choose.
        tied: whether the checkpoint's head is its embedding; a `.m` file does not say.

    Raises:
        UsageError: keys and values cannot be kept like that.
    """
    tensors = ARCHITECTURES[config.arch].tensors(config)
    matrices = [t for t in tensors if len(t.shape) > 1 and t.name != "embed_tokens.weight"]
    copied = config.vocab_size * config.dim if tied else 0
    # One node with a context so long that the indexer is needed, if there is one.
    (program,) = programs(config, Cluster(cache=cache, max_seq_len=config.max_seq_len))
    return ModelSizes(
        parameters=sum(math.prod(t.shape) for t in tensors) - copied,
        active_parameters=_active(config, matrices, lambda tensor: math.prod(tensor.shape)),
        file_bytes=sum(map(tensor_bytes, tensors)),
        token_bytes=_active(config, matrices, tensor_bytes),
        cache=program.caches[0].float_type,
        kept_values=sum(cache.kv_heads * cache.head_dim for cache in program.caches),
        kept_bytes=_kept_bytes(program),
    )


def node_sizes(config: ModelConfig, cluster: Cluster) -> list[NodeSizes]:
    """What each node of a cluster holds.

    Raises:
        UsageError: the model cannot be cut like that.
    """
    made = programs(config, cluster)
    return [
        NodeSizes(
            shard,
            program.seq_len,
            weight_bytes=sum(weight.nbytes for weight in weights(program)),
            cache_bytes=program.n_blocks * KV_BLOCK * _kept_bytes(program),
            memory_bytes=planned_bytes(program),
        )
        for shard, program in zip(shards(config, len(made)), made, strict=True)
    ]


def _kept_bytes(program: Program) -> int:
    """Bytes that a node keeps for each position."""
    return sum(c.kv_heads * c.float_type.row_bytes(c.head_dim) for c in program.caches)


def _active(config: ModelConfig, matrices: list[Tensor], size: Callable[[Tensor], int]) -> int:
    """The size of all matrices, of as many experts as are chosen for a token."""
    routed = sum(size(t) for t in matrices if ".experts." in t.name)
    rest = sum(size(t) for t in matrices if ".experts." not in t.name)
    if config.experts is None:
        return rest
    return rest + routed * config.experts.active // config.experts.count

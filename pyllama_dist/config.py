"""The facts about a model: its configuration and its list of tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class FloatType(IntEnum):
    """How numbers are stored. The values are distributed-llama's, in files and on the wire."""

    F32 = 0
    F16 = 1
    Q40 = 2
    Q80 = 3

    @property
    def block(self) -> int:
        """Values in one unit of storage: 32 in a quantized block, else 1."""
        return 32 if self in (FloatType.Q40, FloatType.Q80) else 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one unit of storage."""
        return {FloatType.F32: 4, FloatType.F16: 2, FloatType.Q40: 18, FloatType.Q80: 34}[self]

    def row_bytes(self, width: int) -> int:
        """Bytes of `width` values in a row; `width` must be whole blocks."""
        if width % self.block:
            raise ValueError(f"{width} values are not whole {self.name} blocks of {self.block}")
        return width // self.block * self.block_bytes


class Arch(StrEnum):
    """Architectures, named as Hugging Face's `model_type`."""

    GLM = "glm"
    GLM4 = "glm4"
    GLM4_MOE = "glm4_moe"
    GLM4_MOE_LITE = "glm4_moe_lite"
    GLM_MOE_DSA = "glm_moe_dsa"
    LLAMA = "llama"
    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3_moe"


class Pairs(StrEnum):
    """Which two values of a head RoPE rotates as a pair."""

    ADJACENT = "adjacent"  # (2i, 2i + 1)
    HALVES = "halves"  # (i, i + rotary_dim / 2)


class Scoring(StrEnum):
    """What a router makes of its outputs."""

    SIGMOID = "sigmoid"  # of each
    SOFTMAX = "softmax"  # over all experts


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's RoPE scaling for longer texts: divides low frequencies and keeps high ones."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int  # [original_max_position_embeddings]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, in all layers but the first `dense_layers`."""

    count: int  # [n_routed_experts, num_experts]
    active: int  # [num_experts_per_tok]
    ffn_dim: int  # of an expert [moe_intermediate_size]
    shared_ffn_dim: int  # of the shared experts together, 0: none
    dense_layers: int  # [first_k_dense_replace]
    scoring: Scoring
    bias: bool  # on the scores, for the choice only [e_score_correction_bias]
    groups: int  # [n_group]
    active_groups: int  # [topk_group]
    normalize: bool  # chosen weights sum to 1 [norm_topk_prob]
    scale: float  # [routed_scaling_factor]


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are made from a short cached vector."""

    q_rank: int  # [q_lora_rank]
    kv_rank: int  # [kv_lora_rank]
    nope_dim: int  # of a query head, without position [qk_nope_head_dim]
    rope_dim: int  # of a query head, with position [qk_rope_head_dim]
    value_dim: int  # of a head [v_head_dim]
    norm_epsilon: float  # of the norms of the latent vectors


@dataclass(frozen=True)
class Indexer:
    """Sparse attention: a small attention selects the positions that the main one reads."""

    n_heads: int  # [index_n_heads]
    head_dim: int  # [index_head_dim]
    rotary_dim: int
    top_k: int  # positions [index_topk]
    layers: tuple[bool, ...]  # whether a layer selects; others reuse the last selection


@dataclass(frozen=True)
class ModelConfig:
    """What a `.m` header says. Names are distributed-llama's; Hugging Face's are in brackets."""

    arch: Arch
    dim: int  # [hidden_size]
    ffn_dim: int  # of the dense layers [intermediate_size]
    n_layers: int  # [num_hidden_layers]
    n_heads: int  # [num_attention_heads]
    n_kv_heads: int  # [num_key_value_heads]
    head_dim: int
    rotary_dim: int  # the first values of each head get RoPE: head_dim * partial_rotary_factor
    vocab_size: int
    max_seq_len: int  # [max_position_embeddings]
    rope_theta: float
    norm_epsilon: float  # [rms_norm_eps]
    qkv_bias: bool  # [attention_bias]
    weights: FloatType  # of every matrix but the embedding
    rope_pairs: Pairs = Pairs.ADJACENT
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # a norm of each query and key head [use_qk_norm]
    experts: Experts | None = None
    latent: Latent | None = None
    indexer: Indexer | None = None

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.n_kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a query head's output, the input of `o_proj`."""
        return self.latent.value_dim if self.latent else self.head_dim


class Order(StrEnum):
    """The order of a tensor's rows, relative to the checkpoint's."""

    SAME = "same"
    TRANSPOSED = "transposed"  # each head by itself
    ADJACENT = "adjacent"  # each head: rows i and i + half of it become rows 2i and 2i + 1


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: its place in the `.m` file is its place in the list.

    `source` names the checkpoint's tensors that it may come from, the first one present wins (a
    tied head falls back to the embedding). The checkpoint's tensor is a stack of `source_heads`
    equal parts; `source_rows` cuts the same rows out of each, `source_order` puts them in order.
    """

    name: str
    shape: tuple[int, ...]
    float_type: FloatType
    source: tuple[str, ...]
    source_rows: tuple[int, int] | None = None  # rows of each head, start and stop
    source_heads: int = 1
    source_order: Order = Order.SAME


@dataclass(frozen=True)
class Architecture:
    """What the file readers need to know of an architecture."""

    config_from_hf: Callable[[Mapping[str, object], FloatType], ModelConfig]
    tensors: Callable[[ModelConfig], list[Tensor]]

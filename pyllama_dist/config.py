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


@dataclass(frozen=True)
class ModelConfig:
    """What a `.m` header says. Names are distributed-llama's; Hugging Face's are in brackets."""

    arch: Arch
    dim: int  # [hidden_size]
    ffn_dim: int  # [intermediate_size]
    n_layers: int  # [num_hidden_layers]
    n_heads: int  # [num_attention_heads]
    n_kv_heads: int  # [num_key_value_heads]
    head_dim: int
    rotary_dim: int  # the first values of each head that turn: head_dim * partial_rotary_factor
    vocab_size: int
    max_seq_len: int  # [max_position_embeddings]
    rope_theta: float
    norm_epsilon: float  # [rms_norm_eps]
    qkv_bias: bool  # [attention_bias]
    weights: FloatType  # of every matrix but the embedding

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: its place in the `.m` file is its place in the list.

    `source` names the checkpoint's tensors that it may come from, the first one present wins (a
    tied head falls back to the embedding); `source_rows` cuts it out of a fused one.
    """

    name: str
    shape: tuple[int, ...]
    float_type: FloatType
    source: tuple[str, ...]
    source_rows: tuple[int, int] | None = None  # rows of the checkpoint's tensor, start and stop


@dataclass(frozen=True)
class Architecture:
    """What the file readers need to know of an architecture."""

    config_from_hf: Callable[[Mapping[str, object], FloatType], ModelConfig]
    tensors: Callable[[ModelConfig], list[Tensor]]

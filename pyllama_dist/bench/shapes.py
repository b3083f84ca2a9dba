"""Shapes of real models, to ask what a model would do before downloading it.

A shape is the part of a checkpoint's `config.json` that decides about speed, with Hugging Face's
names, and is read by the same code as the file.
"""

from collections.abc import Mapping
from types import MappingProxyType

from pyllama_dist.config import Arch, FloatType, ModelConfig
from pyllama_dist.errors import UsageError
from pyllama_dist.models import ARCHITECTURES

Shape = MappingProxyType[str, object]


def _shape(**fields: object) -> Shape:
    return MappingProxyType(fields)


_GLM_EDGE_1_5B = _shape(
    model_type="glm",
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    partial_rotary_factor=1.0,
    vocab_size=59264,
    max_position_embeddings=8192,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    attention_bias=False,
)

_GLM_4_9B_0414 = _shape(
    model_type="glm4",
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    partial_rotary_factor=0.5,
    vocab_size=151552,
    max_position_embeddings=32768,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    attention_bias=True,
)

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "glm-edge-1.5b": _GLM_EDGE_1_5B,
        # Heads and ffn as reported for this model; its config.json was not at hand.
        "glm-edge-4b": _shape(
            **_GLM_EDGE_1_5B
            | {
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 40,
                "num_attention_heads": 24,
                "num_key_value_heads": 6,
            }
        ),
        # The one whose Hugging Face name ends in -hf.
        "glm-4-9b": _shape(
            **_GLM_4_9B_0414
            | {
                "model_type": "glm",
                "max_position_embeddings": 131072,
                "rope_theta": 5e6,
                "rms_norm_eps": 1.5625e-7,
            }
        ),
        "glm-4-9b-0414": _GLM_4_9B_0414,
        "glm-4-32b-0414": _shape(
            **_GLM_4_9B_0414
            | {
                "hidden_size": 6144,
                "intermediate_size": 23040,
                "num_hidden_layers": 61,
                "num_attention_heads": 48,
                "attention_bias": False,
            }
        ),
        # Llama pairs the values that rope turns otherwise, which costs the same.
        "tinyllama-1.1b": _shape(
            model_type="glm",
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=64,
            partial_rotary_factor=1.0,
            vocab_size=32000,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            attention_bias=False,
        ),
        # As above, and without Qwen3's norms of queries and keys, which weigh next to nothing.
        "qwen3-0.6b": _shape(
            model_type="glm",
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            partial_rotary_factor=1.0,
            vocab_size=151936,
            max_position_embeddings=40960,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            attention_bias=False,
        ),
    }
)


def config_of(shape: str) -> ModelConfig:
    """The configuration of a shape, with Q40 weights.

    Raises:
        UsageError: there is no shape of this name.
    """
    fields = SHAPES.get(shape)
    if fields is None:
        raise UsageError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    arch = Arch(str(fields["model_type"]))
    return ARCHITECTURES[arch].config_from_hf(fields, FloatType.Q40)

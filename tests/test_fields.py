"""Fields of config.json that change the numbers are computed or refused by name."""

from typing import Any

import pytest

from pyllama_dist.config import FloatType
from pyllama_dist.errors import FileError
from pyllama_dist.models import CHECKPOINTS
from tests.checkpoints import CONFIG

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DSA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
}


def config_of(model_type: str, **changes: Any) -> Any:
    return CHECKPOINTS[model_type].config_from_hf(CONFIG | changes, FloatType.F32)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"sliding_window": 64, "use_sliding_window": False}),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": False}),
        ("qwen3", {"sliding_window": 64}),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True}),
        (
            "qwen3",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
        ),
        ("qwen3_moe", {"sliding_window": 64, "use_sliding_window": False} | EXPERTS),
        ("mistral", {"sliding_window": None}),
        ("glm4", {"sliding_window": 64, "use_sliding_window": False}),
        ("glm_moe_dsa", DSA | {"indexer_rope_interleave": True}),
    ],
)
def test_what_changes_nothing_is_taken(model_type: str, fields: dict[str, Any]) -> None:
    assert config_of(model_type, **fields)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
        ("glm4", {"sliding_window": 64}, "sliding_window is 64"),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True}, "sliding_window is 64"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"use_sliding_window": "no"}, "use_sliding_window is 'no', expected true"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'",
        ),
        ("glm_moe_dsa", DSA | {"indexer_rope_interleave": False}, "indexer_rope_interleave is F"),
        ("glm_moe_dsa", DSA | {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("glm_moe_dsa", DSA | {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("glm_moe_dsa", DSA | {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 1e5}}},
            "rope_parameters has fields for full_attention, sliding_attention",
        ),
        ("llama", {"rope_parameters": {"chunked_attention": {}}}, "fields for chunked_attention"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope scaling of type 'yarn'",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(
    model_type: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FileError) as caught:
        config_of(model_type, **fields)
    assert reason in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "glm4"])
def test_rope_of_the_one_type_of_layers(model_type: str) -> None:
    full = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25}
    nested = config_of(model_type, rope_parameters={"full_attention": full})
    assert nested == config_of(model_type, rope_parameters=full)
    assert (nested.rope_theta, nested.rotary_dim) == (5e6, 4)

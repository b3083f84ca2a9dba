"""ChatGLM's names and fields: the same weights under GLM's names give the same model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pyllama_dist.config import FloatType
from pyllama_dist.errors import FileError
from pyllama_dist.formats.convert import convert
from pyllama_dist.models import CHECKPOINTS

GOLDEN = Path(__file__).parent / "golden" / "glm_f32"
NAMES = {
    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
    "lm_head.weight": "transformer.output_layer.weight",
}


def chatglm_config(**changes: object) -> dict[str, object]:
    theirs = json.loads((GOLDEN / "config.json").read_text())
    return {
        "model_type": "chatglm",
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": theirs["num_key_value_heads"],
        "kv_channels": theirs["head_dim"],
        "ffn_hidden_size": theirs["intermediate_size"],
        "num_layers": theirs["num_hidden_layers"],
        "padded_vocab_size": theirs["vocab_size"],
        "seq_length": theirs["max_position_embeddings"],
        "layernorm_epsilon": theirs["rms_norm_eps"],
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "eos_token_id": theirs["eos_token_id"],
    } | changes


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """The golden GLM as its makers would have saved it before they used Hugging Face's names."""
    tensors = load_file(GOLDEN / "model.safetensors")
    found = {NAMES[name]: tensor for name, tensor in tensors.items() if name in NAMES}
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{theirs}self_attention.query_key_value.{kind}"] = np.concatenate(parts)
        for name, other in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ):
            found[f"{theirs}{other}.weight"] = tensors[f"{ours}{name}.weight"]
    found["transformer.rotary_pos_emb.inv_freq"] = np.ones(4, np.float32)
    folder.mkdir()
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(chatglm_config(**changes)))
    return folder


def model_bytes(source: Path, out: Path) -> bytes:
    convert(source, out, FloatType.F32, CHECKPOINTS, lambda done, total: None)
    return (out / "model.m").read_bytes()


def test_the_model_is_that_of_the_same_weights_under_the_other_names(tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(GOLDEN, plain)
    found = model_bytes(write_checkpoint(tmp_path / "chatglm"), tmp_path / "a")
    assert found == model_bytes(plain, tmp_path / "b")


def test_rope_ratio_multiplies_theta():
    config = CHECKPOINTS["chatglm"].config_from_hf(chatglm_config(rope_ratio=500), FloatType.Q40)
    assert config.rope_theta == 5e6
    assert (config.head_dim, config.rotary_dim) == (16, 8)


def test_without_groups_every_head_has_keys():
    fields = chatglm_config(multi_query_attention=False)
    config = CHECKPOINTS["chatglm"].config_from_hf(fields, FloatType.Q40)
    assert config.n_kv_heads == config.n_heads


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position_encoding_2d": True}, "another architecture"),
        ({"ffn_hidden_size": None}, "ffn_hidden_size is missing"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128"),
        ({"quantization_bit": 4}, "quantization_bit is 4"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm is True"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, reason):
    with pytest.raises(FileError, match=reason) as caught:
        CHECKPOINTS["chatglm"].config_from_hf(chatglm_config(**change), FloatType.Q40)
    assert "\n" not in str(caught.value)

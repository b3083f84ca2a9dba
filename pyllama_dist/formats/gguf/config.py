"""The metadata of a GGUF file as the `config.json` that Hugging Face has for the same model."""

from collections.abc import Mapping

import numpy as np

from pyllama_dist.errors import FileError
from pyllama_dist.formats.gguf.file import GgufFile

# llama.cpp's name of an architecture, and Hugging Face's `model_type`.
MODEL_TYPES = {
    "chatglm": "glm",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "deepseek2": "glm4_moe_lite",
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func
_EDGE_VOCAB, _EDGE_POSITIONS = 59264, 8192  # GLM-Edge


def config_from_gguf(file: GgufFile, notes: list[str]) -> dict[str, object]:
    """The fields that this project's architectures read, under Hugging Face's names.

    Layers that only draft tokens are not counted, though `block_count` counts them.

    Args:
        file: the file.
        notes: gets a line for each value that was mended.

    Raises:
        FileError: an architecture or a kind of it that is not known, or metadata that are missing.
    """
    return _Fields(file).config(notes)


class _Fields:
    """The metadata of one architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        arch = file.get("general.architecture")
        if not isinstance(arch, str) or arch not in MODEL_TYPES:
            raise FileError(
                f"{file.path}: architecture {arch!r} is not supported, only "
                f"{', '.join(MODEL_TYPES)}; choose another file"
            )
        self.arch = arch

    def integer(self, key: str, default: int | None = None) -> int:
        return self.file.integer(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        return self.file.number(f"{self.arch}.{key}", default)

    def refuse(self, what: str) -> FileError:
        return FileError(
            f"{self.file.path}: {what}, which is not implemented for {self.arch}; "
            f"choose another file"
        )

    def config(self, notes: list[str]) -> dict[str, object]:
        """All fields."""
        if self.file.get(f"{self.arch}.rope.dimension_sections") is not None:
            raise self.refuse("rope of several dimensions (a model that sees)")
        dim, n_heads = self.integer("embedding_length"), self.integer("attention.head_count")
        if not n_heads:
            raise self.file.damaged(f"{self.arch}.attention.head_count is 0")
        n_layers = self.integer("block_count") - self.integer("nextn_predict_layers", 0)
        config = {
            "model_type": MODEL_TYPES[self.arch],
            "hidden_act": "silu",
            "hidden_size": dim,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": self.integer("attention.head_count_kv", n_heads),
            "head_dim": self.integer("attention.key_length", dim // n_heads),
            "vocab_size": self._vocab_size(),
            "max_position_embeddings": self.integer("context_length"),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "attention_bias": any(
                f"blk.0.attn_{part}.bias" in self.file.tensors for part in ("q", "qkv")
            ),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            **self._ffn(),
            **self._rope_scaling(),
        }
        match self.arch:
            case "deepseek2":
                config |= self._latent(n_heads)
            case "chatglm" | "glm4" | "glm4moe":
                rotary = self.integer("rope.dimension_count")
                if self.arch != "chatglm" and rotary >= self._head_dim(config):
                    # All known models turn half of a head; early converters wrote the whole one.
                    raise self.refuse(f"rope of all {rotary} values of a head")
                config["partial_rotary_factor"] = rotary / max(1, self._head_dim(config))
                config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in self.file.tensors
            case _:
                rotary = self.integer("rope.dimension_count", self._head_dim(config))
                if rotary != self._head_dim(config):
                    raise self.refuse(f"rope of {rotary} of {config['head_dim']} values")
        if self.arch == "chatglm":
            self._mend_chatglm(config, notes)
        return config

    def _head_dim(self, config: Mapping[str, object]) -> int:
        value = config["head_dim"]
        return value if isinstance(value, int) else 0

    def _vocab_size(self) -> int:
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self.file.damaged("no matrix token_embd.weight")
        return int(embedding.shape[1])

    def _ffn(self) -> dict[str, object]:
        """Widths, and the router's fields where there are experts."""
        n_experts = self.integer("expert_count", 0)
        if self.arch in ("chatglm", "glm4", "llama", "qwen3"):
            if n_experts:
                raise self.refuse(f"a mixture of {n_experts} experts")
            return {"intermediate_size": self.integer("feed_forward_length")}
        width = self.integer("expert_feed_forward_length")
        # llama.cpp's converter writes it for deepseek2 where it is true only.
        normalize = self.file.get(f"{self.arch}.expert_weights_norm")
        fields: dict[str, object] = {
            "intermediate_size": self.integer("feed_forward_length", width),
            "moe_intermediate_size": width,
            "num_experts_per_tok": self.integer("expert_used_count"),
            "norm_topk_prob": self.arch != "deepseek2" if normalize is None else bool(normalize),
        }
        expected = _SOFTMAX if self.arch == "qwen3moe" else _SIGMOID
        # Early files of GLM-4.7-Flash do not say it; their router is the sigmoid all the same.
        if self.integer("expert_gating_func", expected) != expected:
            raise self.refuse("another function of the router")
        if self.arch == "qwen3moe":
            return fields | {"num_experts": n_experts}
        return fields | {
            "n_routed_experts": n_experts,
            "n_shared_experts": self.integer("expert_shared_count", 0),
            "first_k_dense_replace": self.integer("leading_dense_block_count", 0),
            "routed_scaling_factor": self.number("expert_weights_scale", 1.0),
            "n_group": self.integer("expert_group_count", 1),
            "topk_group": self.integer("expert_group_used_count", 1),
        }

    def _latent(self, n_heads: int) -> dict[str, object]:
        """Widths of multi-head latent attention.

        Since llama.cpp computes it in the absorbed form, `key_length` is that of the latent vector,
        and `key_length_mla` that of a head.
        """
        rope = self.integer("rope.dimension_count")
        key = self.integer("attention.key_length_mla", self.integer("attention.key_length"))
        value = self.integer("attention.value_length_mla", self.integer("attention.value_length"))
        if key <= rope:
            raise self.file.damaged(f"key heads of {key} values, {rope} of them for rope")
        return {
            "num_key_value_heads": n_heads,
            "head_dim": rope,
            "q_lora_rank": self.integer("attention.q_lora_rank"),
            "kv_lora_rank": self.integer("attention.kv_lora_rank"),
            "qk_nope_head_dim": key - rope,
            "qk_rope_head_dim": rope,
            "v_head_dim": value,
        }

    def _rope_scaling(self) -> dict[str, object]:
        kind = self.file.get(f"{self.arch}.rope.scaling.type")
        if kind not in (None, "none"):
            return {
                "rope_scaling": {"rope_type": kind, "factor": self.number("rope.scaling.factor", 1)}
            }
        factors = self.file.tensors.get("rope_freqs.weight")
        if factors is None:
            return {}
        if self.arch != "llama":
            raise self.refuse("rope with frequencies of its own (rope_freqs.weight)")
        return {"rope_scaling": self._llama3_scaling(np.asarray(factors.data, np.float64).ravel())}

    def _llama3_scaling(self, divisors: np.ndarray) -> dict[str, object]:
        """The scaling of Llama 3.1 and 3.2, of which the file has only each frequency's divisor."""
        low, high, original = 1.0, 4.0, 8192
        factor = float(divisors.max(initial=1.0))
        theta = self.number("rope.freq_base", 10000.0)
        turns = original * theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if not np.allclose(1 / divisors, (1 - smooth) / factor + smooth, rtol=1e-3):
            raise self.refuse("rope with frequencies of its own (rope_freqs.weight)")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _mend_chatglm(self, config: dict[str, object], notes: list[str]) -> None:
        """Mends what llama.cpp's converter writes for checkpoints in Hugging Face's own format."""
        if config["max_position_embeddings"] != config["hidden_size"]:
            return
        wrong = f"its context_length is its embedding_length, {config['hidden_size']}"
        if config["vocab_size"] == _EDGE_VOCAB:
            config["max_position_embeddings"] = _EDGE_POSITIONS
            notes.append(f"{wrong}, a known mistake: taken as GLM-Edge's, {_EDGE_POSITIONS}")
        else:
            notes.append(
                f"{wrong}, a known mistake of files whose rope_theta and epsilon are wrong too: "
                f"if answers are poor, convert the safetensors checkpoint"
            )

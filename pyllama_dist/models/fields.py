"""Reads the fields of a Hugging Face `config.json`: each is checked, none is passed over.

What would change the numbers and is not implemented is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pyllama_dist.config import (
    Arch,
    Experts,
    FloatType,
    Latent,
    ModelConfig,
    Pairs,
    RopeScaling,
    Scoring,
)
from pyllama_dist.errors import FileError

# Fields that would change the numbers, with the values under which they do not.
_INERT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "vision_config": (None,),
    "mlp_bias": (None, False),
    "attention_out_bias": (None, False),
    "rope_interleave": (None, True),
}


# Types of layers: those of GLM-5 are told by other fields.
_ATTENTION = ("full_attention", "indexed_attention", "deepseek_sparse_attention")


@dataclass(frozen=True)
class Fields:
    """A parsed `config.json` of one architecture."""

    arch: Arch
    values: Mapping[str, object]

    def has(self, key: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(key) is not None

    def number(self, key: str, low: float, high: float) -> float:
        """A number within bounds.

        Raises:
            FileError: it is missing, no number, or out of bounds.
        """
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileError(
                f"config.json: {key} is {value!r}, expected a number; is the file complete?"
            )
        if not low <= value <= high:
            raise FileError(f"config.json: {key} is {value}, expected {low:g} to {high:g}")
        return value

    def integer(self, key: str, high: int = 1 << 24, low: int = 1) -> int:
        """A whole number within bounds.

        Raises:
            FileError: as `number`, or it has a fraction.
        """
        value = self.number(key, low, high)
        if value != int(value):
            raise FileError(f"config.json: {key} is {value}, expected a whole number")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is false.

        Raises:
            FileError: it is something else.
        """
        value = self.values.get(key, default)
        if not isinstance(value, bool | None):
            raise FileError(f"config.json: {key} is {value!r}, expected true or false")
        return bool(value)

    def refuse(self, inert: Mapping[str, tuple[object, ...]]) -> None:
        """Refuses fields that ask for what is not implemented.

        Raises:
            FileError: a field is there and has none of the values under which it does nothing.
        """
        for key, accepted in inert.items():
            if key in self.values and self.values[key] not in accepted:
                raise FileError(
                    f"config.json: {key} is {self.values[key]!r}, which is not implemented for "
                    f"{self.arch}"
                )


def common_config(
    f: Fields, weights: FloatType, *, rotary: float, pairs: Pairs, scalable: bool = False
) -> ModelConfig:
    """What all architectures say alike: sizes, rope and biases of a plain attention model.

    Args:
        f: the fields.
        weights: the number format that the matrices will have.
        rotary: the part of a head that RoPE rotates, where the file does not say.
        pairs: how the architecture pairs what RoPE rotates.
        scalable: whether rope scaling of type llama3 is part of it.

    Raises:
        FileError: a field is missing, out of bounds, or asks for something not implemented.
    """
    f.refuse(_INERT)
    _refuse_window(f)
    dim, n_heads = f.integer("hidden_size"), f.integer("num_attention_heads", 4096)
    n_kv_heads = f.integer("num_key_value_heads", 4096) if f.has("num_key_value_heads") else n_heads
    head_dim = f.integer("head_dim", 4096) if f.has("head_dim") else dim // n_heads
    if n_heads % n_kv_heads:
        raise FileError(
            f"config.json: {n_heads} query heads do not share {n_kv_heads} key heads evenly"
        )
    rope, scaling = _rope(f, rotary, scalable)
    return ModelConfig(
        arch=f.arch,
        dim=dim,
        ffn_dim=f.integer("intermediate_size"),
        n_layers=f.integer("num_hidden_layers", 1024),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * rope.number("partial_rotary_factor", 0, 1)),
        vocab_size=f.integer("vocab_size"),
        max_seq_len=f.integer("max_position_embeddings"),
        rope_theta=float(rope.number("rope_theta", 1, 1e12)),
        norm_epsilon=float(f.number("rms_norm_eps", 0, 1)),
        qkv_bias=f.flag("attention_bias"),
        weights=weights,
        rope_pairs=pairs,
        rope_scaling=scaling,
    )


def latent_config(f: Fields, weights: FloatType, experts: Experts) -> ModelConfig:
    """Fields of a model with multi-head latent attention.

    Every head reads the one vector that is kept, so there is one key head. The file's head_dim is
    not used: it says the width of the rotated part in one model, of the other part in the next.

    Raises:
        FileError: as `common_config`.
    """
    f.refuse({"attention_bias": (None, False)})
    latent = Latent(
        q_rank=f.integer("q_lora_rank"),
        kv_rank=f.integer("kv_lora_rank", 1 << 16),
        nope_dim=f.integer("qk_nope_head_dim", 4096),
        rope_dim=f.integer("qk_rope_head_dim", 4096),
        value_dim=f.integer("v_head_dim", 4096),
        norm_epsilon=1e-6,  # not rms_norm_eps: that of transformers' class, which is given none
    )
    plain = Fields(f.arch, {**f.values, "head_dim": latent.nope_dim + latent.rope_dim})
    config = common_config(plain, weights, rotary=1.0, pairs=Pairs.ADJACENT)
    return replace(config, n_kv_heads=1, rotary_dim=latent.rope_dim, latent=latent, experts=experts)


def glm_experts(f: Fields, dense_layers: int) -> Experts:
    """Fields of GLM's mixture of experts; `dense_layers` where the file does not say."""
    f.refuse(
        {
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
        }
    )
    ffn_dim = f.integer("moe_intermediate_size")
    if f.has("first_k_dense_replace"):
        dense_layers = f.integer("first_k_dense_replace", 1024, low=0)
    n_layers = f.integer("num_hidden_layers", 1024)
    return Experts(
        count=f.integer("n_routed_experts", 4096),
        active=f.integer("num_experts_per_tok", 256),
        ffn_dim=ffn_dim,
        shared_ffn_dim=ffn_dim * f.integer("n_shared_experts", 64, low=0),
        dense_layers=_dense_layers(f, min(dense_layers, n_layers), n_layers),
        scoring=Scoring.SIGMOID,
        bias=True,
        groups=f.integer("n_group", 4096) if f.has("n_group") else 1,
        active_groups=f.integer("topk_group", 4096) if f.has("topk_group") else 1,
        normalize=f.flag("norm_topk_prob", True),
        scale=float(f.number("routed_scaling_factor", 0, 1e6)),
    )


def _dense_layers(f: Fields, default: int, n_layers: int) -> int:
    """How many layers come first that have no experts; transformers 5 lists the kind of each."""
    kinds = f.values.get("mlp_layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise FileError(f"config.json: mlp_layer_types does not list {n_layers} layers")
    dense = kinds.index("sparse") if "sparse" in kinds else n_layers
    if kinds != ["dense"] * dense + ["sparse"] * (n_layers - dense):
        raise FileError(
            "config.json: mlp_layer_types has dense layers after others, not implemented"
        )
    return dense


def _refuse_window(f: Fields) -> None:
    """Refuses attention that sees the last positions only.

    Where there are types of layers they decide; else a window counts unless it is switched off,
    as it is in Qwen's where nothing is said.
    """
    kinds = f.values.get("layer_types")
    if isinstance(kinds, list) and (other := [kind for kind in kinds if kind not in _ATTENTION]):
        raise FileError(
            f"config.json: layer_types has {other[0]!r}, which is not implemented for {f.arch}"
        )
    used = f.flag("use_sliding_window", f.arch not in (Arch.QWEN3, Arch.QWEN3_MOE))
    if used and not kinds:
        f.refuse({"sliding_window": (None,)})
        if f.has("use_sliding_window") and "sliding_window" not in f.values:
            f.refuse({"use_sliding_window": ()})


def _rope(f: Fields, rotary: float, scalable: bool) -> tuple[Fields, RopeScaling | None]:
    """Rope fields: top level in older files, `rope_parameters` since transformers 5."""
    values: dict[str, object] = {"rope_theta": 10000.0, "partial_rotary_factor": rotary}
    values |= {key: f.values[key] for key in values if f.has(key)}
    scaling = None
    for key in ("rope_scaling", "rope_parameters"):
        group = f.values.get(key)
        if group is None:
            continue
        if not isinstance(group, Mapping):
            raise FileError(f"config.json: {key} is {group!r}, expected an object")
        group = _of_all_layers(group, key)
        kind = group.get("rope_type", group.get("type", "default"))
        if kind == "llama3" and scalable:
            scaling = _llama3(Fields(f.arch, group))
        elif kind != "default":
            raise FileError(
                f"config.json: {key} asks for rope scaling of type {kind!r}, which is not "
                f"implemented; remove it to run without scaling, up to the trained length"
            )
        values |= {key: group[key] for key in values if group.get(key) is not None}
    return Fields(f.arch, values), scaling


def _of_all_layers(group: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The rope fields of all layers, where a file may give some for each type of layer."""
    kinds = [kind for kind, value in group.items() if isinstance(value, Mapping)]
    if not kinds:
        return group
    full = group.get("full_attention")
    if kinds != ["full_attention"] or not isinstance(full, Mapping):
        raise FileError(
            f"config.json: {key} has fields for {', '.join(kinds)}, of which only full_attention "
            f"is implemented"
        )
    return full


def _llama3(f: Fields) -> RopeScaling:
    return RopeScaling(
        factor=float(f.number("factor", 1, 1e6)),
        low_freq_factor=float(f.number("low_freq_factor", 1e-3, 1e6)),
        high_freq_factor=float(f.number("high_freq_factor", 1e-3, 1e6)),
        original_max_seq_len=f.integer("original_max_position_embeddings"),
    )

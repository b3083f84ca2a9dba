"""Reads the fields of a Hugging Face `config.json` that a dense GLM model needs."""

from collections.abc import Mapping

from pyllama_dist.config import Arch, FloatType, ModelConfig
from pyllama_dist.errors import FileError

# Fields that would change the numbers, with the values under which they do not.
_INERT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "vision_config": (None,),
}


def _number(hf: Mapping[str, object], key: str, low: float, high: float) -> float:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FileError(
            f"config.json: {key} is {value!r}, expected a number; is the file complete?"
        )
    if not low <= value <= high:
        raise FileError(f"config.json: {key} is {value}, expected {low:g} to {high:g}")
    return value


def _rope(hf: Mapping[str, object]) -> dict[str, object]:
    """Rope fields: top level in older files, `rope_parameters` since transformers 5."""
    fields: dict[str, object] = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    fields |= {key: hf[key] for key in fields if hf.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        group = hf.get(key)
        if group is None:
            continue
        if not isinstance(group, Mapping):
            raise FileError(f"config.json: {key} is {group!r}, expected an object")
        kind = group.get("rope_type", group.get("type", "default"))
        if kind != "default":
            raise FileError(
                f"config.json: {key} asks for rope scaling of type {kind!r}, which is not "
                f"implemented; remove it to run without scaling, up to the trained length"
            )
        fields |= {key: group[key] for key in fields if group.get(key) is not None}
    return fields


def dense_config(arch: Arch, hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration of a `glm` or `glm4` checkpoint.

    Args:
        arch: the architecture.
        hf: the parsed `config.json`.
        weights: the number format that the matrices will have.

    Raises:
        FileError: a field is missing, out of bounds, or asks for something not implemented.
    """
    for key, accepted in _INERT.items():
        if key in hf and hf[key] not in accepted:
            raise FileError(
                f"config.json: {key} is {hf[key]!r}, which is not implemented for {arch}"
            )
    if any(hf.get(key) for key in ("mlp_bias", "attention_out_bias")):
        raise FileError(f"config.json: biases outside q, k and v are not implemented for {arch}")

    def integer(key: str, high: int = 1 << 24) -> int:
        value = _number(hf, key, 1, high)
        if value != int(value):
            raise FileError(f"config.json: {key} is {value}, expected a whole number")
        return int(value)

    dim, n_heads = integer("hidden_size"), integer("num_attention_heads", 4096)
    n_kv_heads = integer("num_key_value_heads", 4096) if "num_key_value_heads" in hf else n_heads
    head_dim = integer("head_dim", 4096) if hf.get("head_dim") is not None else dim // n_heads
    if n_heads % n_kv_heads:
        raise FileError(
            f"config.json: {n_heads} query heads do not share {n_kv_heads} key heads evenly"
        )
    rope = _rope(hf)
    return ModelConfig(
        arch=arch,
        dim=dim,
        ffn_dim=integer("intermediate_size"),
        n_layers=integer("num_hidden_layers", 1024),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _number(rope, "partial_rotary_factor", 0, 1)),
        vocab_size=integer("vocab_size"),
        max_seq_len=integer("max_position_embeddings"),
        rope_theta=float(_number(rope, "rope_theta", 1, 1e12)),
        norm_epsilon=float(_number(hf, "rms_norm_eps", 0, 1)),
        qkv_bias=bool(hf.get("attention_bias", False)),
        weights=weights,
    )

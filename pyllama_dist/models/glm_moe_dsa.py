"""GLM-5 (`model_type` glm_moe_dsa): latent attention that sees what an indexer picks, and experts.

Source of the equations: modeling_glm_moe_dsa.py of transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import replace

from pyllama_dist.config import Arch, FloatType, Indexer, ModelConfig, Tensor
from pyllama_dist.errors import FileError
from pyllama_dist.models.fields import Fields, glm_experts, latent_config
from pyllama_dist.models.layers import build_pre_norm
from pyllama_dist.models.tensors import PRE_NORMS, model_tensors


def config_from_hf(hf: Mapping[str, object], weights: FloatType) -> ModelConfig:
    """Configuration from a parsed `config.json`."""
    fields = Fields(Arch.GLM_MOE_DSA, hf)
    fields.refuse({"indexer_rope_interleave": (None, True)})
    config = latent_config(fields, weights, glm_experts(fields, dense_layers=3))
    indexer = Indexer(
        n_heads=fields.integer("index_n_heads", 4096),
        head_dim=fields.integer("index_head_dim", 4096),
        rotary_dim=config.rotary_dim,
        top_k=fields.integer("index_topk"),
        layers=_indexed_layers(fields, config.n_layers),
    )
    return replace(config, indexer=indexer)


def tensors(c: ModelConfig) -> list[Tensor]:
    """The tensors of a `.m` file, in their order."""
    return model_tensors(c, norms=PRE_NORMS)


build = build_pre_norm


def _indexed_layers(f: Fields, n_layers: int) -> tuple[bool, ...]:
    """Which layers pick: listed, written as a pattern of F and S, or every so many after some."""
    kinds = f.values.get("indexer_types")
    pattern = f.values.get("index_topk_pattern")
    if kinds is None and pattern is not None:
        kinds = [{"F": "full", "S": "shared"}.get(str(kind), kind) for kind in _items(pattern)]
    if kinds is None:
        every = max(1, f.integer("index_topk_freq", 1024, low=0)) if f.has("index_topk_freq") else 1
        key = "index_skip_topk_offset"
        offset = f.integer(key, 1024, low=0) if f.has(key) else 2
        return tuple(max(layer - offset + 1, 0) % every == 0 for layer in range(n_layers))
    known = isinstance(kinds, list) and all(kind in ("full", "shared") for kind in kinds)
    if not isinstance(kinds, list) or len(kinds) != n_layers or not known:
        raise FileError(
            f"config.json: indexer_types is {kinds!r}, expected full or shared, {n_layers} times"
        )
    if kinds[0] != "full":
        raise FileError("config.json: the first layer shares the choice of none before it")
    return tuple(kind == "full" for kind in kinds)


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, str | list) else [value]

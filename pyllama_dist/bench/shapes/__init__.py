"""Shapes of real models, to ask what a model would do before downloading it.

A shape is the part of a checkpoint's `config.json` that decides about sizes and speed, in a file
beside this one, and is read by the same code as the checkpoint's. Not all could be checked against
the real file: of glm-edge-4b the heads, `intermediate_size` and rope are as reported; what is not
GLM is from memory, as are the fields of glm-5.2 that say which layers have an indexer.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pyllama_dist.config import FloatType, ModelConfig
from pyllama_dist.errors import UsageError
from pyllama_dist.files import read_json
from pyllama_dist.models import CHECKPOINTS

SHAPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {path.stem: read_json(path) for path in sorted(Path(__file__).parent.glob("*.json"))}
)


def fields_of(shape: str) -> Mapping[str, object]:
    """The fields of a shape's `config.json`.

    Raises:
        UsageError: there is no shape of this name.
    """
    if shape not in SHAPES:
        raise UsageError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    return SHAPES[shape]


def config_of(shape: str) -> ModelConfig:
    """The configuration of a shape, with Q40 weights.

    Raises:
        UsageError: there is no shape of this name.
    """
    fields = fields_of(shape)
    return CHECKPOINTS[str(fields["model_type"])].config_from_hf(fields, FloatType.Q40)


def with_layers(config: ModelConfig, n_layers: int) -> ModelConfig:
    """A model cut off after its first layers.

    Raises:
        UsageError: it has fewer, or those that are left have no experts although the model does.
    """
    least = config.experts.dense_layers + 1 if config.experts else 1
    if not least <= n_layers <= config.n_layers:
        raise UsageError(
            f"{n_layers} layers of this shape cannot be run; choose {least} to {config.n_layers}"
        )
    indexer = config.indexer and replace(config.indexer, layers=config.indexer.layers[:n_layers])
    return replace(config, n_layers=n_layers, indexer=indexer)

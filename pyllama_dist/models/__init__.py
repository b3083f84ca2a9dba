"""One file for each architecture; `ARCHITECTURES` finds it by Hugging Face's `model_type`."""

from collections.abc import Callable
from dataclasses import dataclass

from pyllama_dist.config import Arch, Architecture, ModelConfig
from pyllama_dist.models import glm, glm4
from pyllama_dist.models.plan import Plan
from pyllama_dist.program import Program


@dataclass(frozen=True)
class Model(Architecture):
    """An architecture, with the way to write a node's program."""

    build: Callable[[ModelConfig, Plan, int], Program]


ARCHITECTURES: dict[Arch, Model] = {
    Arch.GLM: Model(glm.config_from_hf, glm.tensors, glm.build),
    Arch.GLM4: Model(glm4.config_from_hf, glm4.tensors, glm4.build),
}

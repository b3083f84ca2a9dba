"""One file for each architecture; `ARCHITECTURES` finds it by Hugging Face's `model_type`."""

from collections.abc import Callable
from dataclasses import dataclass

from pyllama_dist.config import Arch, Architecture, ModelConfig
from pyllama_dist.models import (
    chatglm,
    glm,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    llama,
    qwen3,
    qwen3_moe,
)
from pyllama_dist.models.plan import ShardingPlan
from pyllama_dist.program import Program


@dataclass(frozen=True)
class Model(Architecture):
    """An architecture, with the function that builds a node's program."""

    build: Callable[[ModelConfig, ShardingPlan, int], Program]


ARCHITECTURES: dict[Arch, Model] = {
    arch: Model(module.config_from_hf, module.tensors, module.build)
    for arch, module in {
        Arch.GLM: glm,
        Arch.GLM4: glm4,
        Arch.GLM4_MOE: glm4_moe,
        Arch.GLM4_MOE_LITE: glm4_moe_lite,
        Arch.GLM_MOE_DSA: glm_moe_dsa,
        Arch.LLAMA: llama,
        Arch.QWEN3: qwen3,
        Arch.QWEN3_MOE: qwen3_moe,
    }.items()
}

# What can be converted: architectures by `model_type`, and others that become one of them.
CHECKPOINTS: dict[str, Architecture] = {
    **{str(arch): model for arch, model in ARCHITECTURES.items()},
    "chatglm": Architecture(chatglm.config_from_hf, chatglm.tensors),
    "mistral": ARCHITECTURES[Arch.LLAMA],
}

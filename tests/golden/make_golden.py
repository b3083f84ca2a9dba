"""Makes the tiny random checkpoints beside this file, and what transformers computes with them.

Run it in an environment of its own, as it needs more than the project does:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_golden.py

With names of folders behind it, it makes those only. It is deterministic: run again, it leaves the
same files. Each folder is a checkpoint as transformers saves it, with `golden.npz` beside it, which
holds

- `tokens`, [40] int64: a random prompt;
- `logits`, [40, vocab] float32: the logits after each token of the prompt, computed in float32 from
  the weights as they are stored;
- `greedy`, [16] int64: the most likely token after the prompt and after each of these.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GlmConfig,
    GlmMoeDsaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

HERE = Path(__file__).parent
VOCAB = 331
PROMPT, STEPS = 40, 16
LEAST_MARGIN = 0.01  # between the best two logits of a greedy step: rounding must not swap them


@dataclass(frozen=True)
class Variant:
    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    seed: int
    shard: str = "1GB"
    old_rope_keys: bool = False  # at the top level of config.json, as before transformers 5


def config(
    kind: type[GlmConfig | Glm4Config],
    *,
    head_dim: int,
    kv_heads: int,
    ffn: int,
    layers: int = 2,
    bias: bool,
    rotary: float = 0.5,
    theta: float = 1e4,
    eps: float = 1e-5,
    tied: bool = False,
) -> GlmConfig | Glm4Config:
    return kind(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_bias=bias,
        rms_norm_eps=eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": rotary,
        },
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=[0, 5, 7],
    )


def experts(**fields: object) -> dict[str, object]:
    """Fields of a mixture of experts, and what all tiny models with one have in common."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": [0, 5, 7],
    } | fields


def grouped_heads(*, qk_norm: bool) -> dict[str, object]:
    return {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": qk_norm,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
        },
    }


def latent_heads(heads: int) -> dict[str, object]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


# Many heads: a score that relu makes 0 for all of them would be a tie, which anyone may break.
INDEXER = {"index_n_heads": 16, "index_head_dim": 32}

VARIANTS = (
    Variant(
        "glm_f32",
        config(GlmConfig, head_dim=16, kv_heads=2, ffn=96, bias=True, eps=1.5625e-7),
        torch.float32,
        seed=1,
    ),
    Variant(
        "glm_tied_bf16",
        config(GlmConfig, head_dim=32, kv_heads=8, ffn=160, bias=False, rotary=1.0, tied=True),
        torch.bfloat16,
        seed=2,
    ),
    Variant(
        "glm_f16",
        config(GlmConfig, head_dim=16, kv_heads=2, ffn=288, bias=True, theta=5e6),
        torch.float16,
        seed=3,
        old_rope_keys=True,
    ),
    Variant(
        "glm4_bias_bf16",
        config(Glm4Config, head_dim=32, kv_heads=2, ffn=352, bias=True),
        torch.bfloat16,
        seed=24,
    ),
    Variant(
        "glm4_nobias_bf16",
        config(Glm4Config, head_dim=32, kv_heads=1, ffn=160, bias=False),
        torch.bfloat16,
        seed=5,
    ),
    Variant(
        "glm4_sharded_bf16",
        config(Glm4Config, head_dim=16, kv_heads=2, ffn=160, layers=3, bias=True),
        torch.bfloat16,
        seed=6,
        shard="250KB",
    ),
    Variant(
        "glm4_moe_f32",
        Glm4MoeConfig(**experts(**grouped_heads(qk_norm=False))),
        torch.float32,
        seed=7,
    ),
    Variant(
        "glm4_moe_groups_bf16",
        Glm4MoeConfig(
            **experts(
                **grouped_heads(qk_norm=True),
                n_routed_experts=12,
                n_group=4,
                topk_group=2,
                n_shared_experts=2,
                first_k_dense_replace=0,
                num_hidden_layers=2,
            )
        ),
        torch.bfloat16,
        seed=8,
    ),
    Variant(
        "glm4_moe_lite_bf16",
        Glm4MoeLiteConfig(**experts(**latent_heads(9))),
        torch.bfloat16,
        seed=9,
    ),
    Variant(
        "glm_moe_dsa_dense_bf16",
        GlmMoeDsaConfig(**experts(**latent_heads(11), **INDEXER, index_topk=512)),
        torch.bfloat16,
        seed=10,
    ),
    Variant(
        "glm_moe_dsa_sparse_bf16",
        GlmMoeDsaConfig(
            **experts(
                **latent_heads(11),
                **INDEXER,
                index_topk=12,
                num_hidden_layers=4,
                indexer_types=["full", "full", "shared", "full"],
            )
        ),
        torch.bfloat16,
        seed=11,
    ),
)


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights under which every mistake shows: spread logits, norms away from 1, large biases."""
    biases = [item for item in model.named_buffers() if item[0].endswith("correction_bias")]
    for name, weight in [*model.named_parameters(), *biases]:
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            weight.copy_(0.5 * noise)
        elif "norm" in name:
            weight.copy_(1 + 0.25 * noise)
        elif "lm_head" in name or "embed_tokens" in name:
            weight.copy_(noise * 2 / weight.shape[1] ** 0.5)
        else:
            weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)


@torch.no_grad()
def make(variant: Variant) -> None:
    generator = torch.Generator().manual_seed(variant.seed)
    model = AutoModelForCausalLM.from_config(variant.config, attn_implementation="eager")
    randomise(model, generator)
    folder = HERE / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(variant.dtype).save_pretrained(folder, max_shard_size=variant.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if variant.old_rope_keys:
        file = folder / "config.json"
        fields = json.loads(file.read_text())
        rope = fields.pop("rope_parameters")
        fields |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)

    # Loaded again, so that the numbers come from the rounded weights.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if model.config.rope_parameters != variant.config.rope_parameters:
        raise SystemExit(f"{variant.name}: transformers reads other rope fields than were meant")
    tokens = torch.randint(VOCAB, (1, PROMPT), generator=generator)
    text = tokens
    for _ in range(STEPS):
        best = model(text).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < LEAST_MARGIN:
            raise SystemExit(f"{variant.name}: a greedy step is nearly a tie, choose another seed")
        text = torch.cat((text, best.indices[None, :1]), dim=1)
    logits = model(tokens).logits[0]
    np.savez(
        folder / "golden.npz",
        tokens=tokens[0].numpy(),
        logits=logits.numpy(),
        greedy=text[0, PROMPT:].numpy(),
    )
    print(
        f"{variant.name}: std of logits {logits.std():.2f}, "
        f"greedy {text[0, PROMPT:].tolist()}, "
        f"{sum(file.stat().st_size for file in folder.iterdir())} bytes"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [variant.name for variant in VARIANTS]
    for variant in VARIANTS:
        if variant.name in wanted:
            make(variant)

"""Makes the tiny random checkpoints beside this file, and what transformers computes with them.

Run it in an environment of its own, as it needs more than the project does:

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/make_golden.py

It is deterministic: run again, it leaves the same files. Each folder is a checkpoint as
transformers saves it, with `golden.npz` beside it, which holds

- `tokens`, [40] int64: a random prompt;
- `logits`, [40, vocab] float32: the logits after each token of the prompt, computed in float32 from
  the weights as they are stored;
- `greedy`, [16] int64: the most likely token after the prompt and after each of these.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig, PreTrainedModel

HERE = Path(__file__).parent
VOCAB = 331
PROMPT, STEPS = 40, 16
LEAST_MARGIN = 0.01  # between the best two logits of a greedy step: rounding must not swap them


@dataclass(frozen=True)
class Variant:
    name: str
    config: GlmConfig | Glm4Config
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
)


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights under which every mistake shows: spread logits, norms away from 1, large biases."""
    for name, weight in model.named_parameters():
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
    for variant in VARIANTS:
        make(variant)

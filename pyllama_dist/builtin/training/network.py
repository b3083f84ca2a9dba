"""GLM-4 (`glm4`) in torch, as small as training needs it, with Q40 rounding that gradients pass.

The equations are those of Hugging Face's `Glm4ForCausalLM`; `train.py` compares the two at the end.
Shapes in comments: B conversations, T tokens, H query heads, G key heads, D width of a head.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 32  # values in a quantized block


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, named as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 1024


def round_q40(weight: Tensor) -> Tensor:
    """What a matrix becomes in a Q40 file: blocks of 32 along each row, a float16 scale, 4 bits.

    weight: [rows, width] float32, width a multiple of 32. The formula is distributed-llama's
    `writer.py`: the scale is the value of the largest magnitude, with its sign, over -8.
    """
    blocks = weight.detach().view(-1, BLOCK)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scale = torch.where(-low > high, low, high) / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    level = (blocks * inverse + 8.5).clamp(0, 15.999).floor() - 8
    return (level * scale.half().float()).view_as(weight)


def round_q80(x: Tensor) -> Tensor:
    """What activations become in Q80: blocks of 32, a float16 scale, 8 bits. x: [..., width]."""
    blocks = x.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((blocks * inverse).round() * scale.half().float()).view_as(x)


class Linear(nn.Linear):
    """A matrix that can act as if it were stored in Q40 and fed with Q80."""

    q40 = False
    q80 = False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.q40:  # straight through: rounded forwards, the plain weight backwards
            weight = weight + (round_q40(weight) - weight.detach())
        return functional.linear(round_q80(x) if self.q80 else x, weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (2i, 2i+1) of the first values of each head. x: [B, T, heads, D]."""
    width = 2 * cos.shape[-1]
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((turned.flatten(-2), x[..., width:]), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        q_dim = shape.num_attention_heads * shape.head_dim
        kv_dim = shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, q_dim)
        self.k_proj = Linear(shape.hidden_size, kv_dim)
        self.v_proj = Linear(shape.hidden_size, kv_dim)
        self.o_proj = Linear(q_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = (rows, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin) * self.head_dim**-0.5  # [B, T, H, D]
        k = rotate(self.k_proj(x).view(heads), cos, sin)  # [B, T, G, D]
        v = self.v_proj(x).view(heads).transpose(1, 2)  # [B, G, T, D]
        # The queries that share a key head are one tall matrix: [B, G, H/G * T, D].
        q = q.transpose(1, 2).reshape(rows, v.shape[1], -1, self.head_dim)
        scores = (q @ k.permute(0, 2, 3, 1)).view(rows, -1, length, length)  # [B, H, T, T]
        future = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
        shares = (scores + future).softmax(-1)
        z = shares.to(v.dtype).view(rows, v.shape[1], -1, length) @ v
        return self.o_proj(z.view(rows, -1, length, self.head_dim).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=False)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape)
        self.post_self_attn_layernorm = RMSNorm(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.post_mlp_layernorm = RMSNorm(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.post_self_attn_layernorm(a)
        m = self.mlp(self.post_attention_layernorm(x))
        return x + self.post_mlp_layernorm(m)


class Glm4(nn.Module):
    """Token ids [B, T] to logits [B, T, vocab_size]; names of parameters are the checkpoint's."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers)),
                "norm": RMSNorm(shape),
            }
        )
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        rotary = int(shape.head_dim * shape.partial_rotary_factor)
        turns = shape.rope_theta ** (-torch.arange(0, rotary, 2).float() / rotary)
        angle = torch.arange(shape.max_position_embeddings)[:, None] * turns  # [T, rotary/2]
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)  # [T, 1, rotary/2]
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head is given: [B, T, hidden_size]."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.dropout(self.model["embed_tokens"](tokens))
        for layer in self.model["layers"]:
            x = layer(x, cos, sin)
        return self.model["norm"](x)

    def act_quantized(self, *, q40: bool, q80: bool = False) -> None:
        """Rounds weights (and activations) from now on as the engine's files do."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.q40, module.q80 = q40, q80


def save(network: Glm4, out: Path, eos: list[int]) -> None:
    """Writes config.json and model.safetensors as Hugging Face's Glm4ForCausalLM reads them."""
    config = {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        **asdict(network.shape),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": eos,
        "pad_token_id": eos[0],
        "torch_dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

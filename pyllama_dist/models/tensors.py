"""The tensors of a `.m` file in their order, which is distributed-llama's with additions.

Biases follow the attention matrices, and the norms of a layer stand at its end: of query and key
heads, then those of whole rows in the order in which they act. `lm_head` falls back to the
embedding: a tied head is stored as a copy of its own, rounded to the format of the weights.
"""

from collections.abc import Iterator

from pyllama_dist.config import Experts, FloatType, Indexer, Latent, ModelConfig, Order, Tensor

# Norms of a layer that has one before each half; the second is that of the FFN, whatever its name.
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


def model_tensors(
    c: ModelConfig, norms: tuple[str, ...], *, fused: bool = False, order: Order = Order.SAME
) -> list[Tensor]:
    """The tensors of a model.

    Args:
        c: the configuration.
        norms: Hugging Face's names of a layer's norms, in the order in which they act.
        fused: whether the checkpoint keeps gate and up in one matrix, gate first.
        order: of the rows of query and key heads, against the checkpoint's.
    """
    tensors = [_tensor("embed_tokens.weight", c.vocab_size, c.dim)]
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        if c.latent is None:
            tensors += _attention(c, f"{at}self_attn.", order)
        else:
            tensors += _latent_attention(c, c.latent, f"{at}self_attn.")
        if c.indexer is not None and c.indexer.layers[layer]:
            tensors += _indexer(c, c.indexer, c.latent, f"{at}self_attn.indexer.")
        if c.experts is None or layer < c.experts.dense_layers:
            tensors += _ffn(c, f"{at}mlp.", c.ffn_dim, fused)
        else:
            tensors += _experts(c, c.experts, f"{at}mlp.")
        if c.qk_norm:
            tensors.append(_tensor(f"{at}self_attn.q_norm.weight", c.head_dim))
            tensors.append(_tensor(f"{at}self_attn.k_norm.weight", c.head_dim))
        tensors += [_tensor(f"{at}{norm}.weight", c.dim) for norm in norms]
    tensors.append(_tensor("norm.weight", c.dim))
    head = ("lm_head.weight", "model.embed_tokens.weight")
    tensors.append(Tensor("lm_head.weight", (c.vocab_size, c.dim), c.weights, head))
    return tensors


def _tensor(
    name: str,
    *shape: int,
    float_type: FloatType = FloatType.F32,
    source: str | None = None,
    rows: tuple[int, int] | None = None,
    heads: int = 1,
    order: Order = Order.SAME,
) -> Tensor:
    return Tensor(name, shape, float_type, (f"model.{source or name}",), rows, heads, order)


def _attention(c: ModelConfig, at: str, order: Order) -> Iterator[Tensor]:
    widths = {"q": c.q_dim, "k": c.kv_dim, "v": c.kv_dim}
    heads = {"q": c.n_heads, "k": c.n_kv_heads} if order is Order.ADJACENT else {}
    orders = dict.fromkeys(heads, order)
    for name, width in widths.items():
        yield _tensor(
            f"{at}{name}_proj.weight",
            width,
            c.dim,
            float_type=c.weights,
            heads=heads.get(name, 1),
            order=orders.get(name, Order.SAME),
        )
    yield _tensor(f"{at}o_proj.weight", c.dim, c.q_dim, float_type=c.weights)
    if c.qkv_bias:
        for name, width in widths.items():
            yield _tensor(f"{at}{name}_proj.bias", width)


def _latent_attention(c: ModelConfig, latent: Latent, at: str) -> Iterator[Tensor]:
    """Matrices are kept cut where their outputs part ways.

    The key half of `kv_b_proj` is kept transposed, head by head: it is applied to queries, so that
    only the latent vector is needed of each position (DeepSeek-V2, 2024, section 2.1.2).
    """
    n, r = c.n_heads, latent.kv_rank
    nope, rope, value = latent.nope_dim, latent.rope_dim, latent.value_dim
    q_b, kv_a, kv_b = (f"{at}{x}.weight" for x in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))

    def part(
        name: str,
        shape: tuple[int, int],
        source: str,
        rows: tuple[int, int],
        heads: int = 1,
        order: Order = Order.SAME,
    ) -> Tensor:
        return _tensor(
            at + name,
            *shape,
            float_type=c.weights,
            source=source,
            rows=rows,
            heads=heads,
            order=order,
        )

    yield _tensor(f"{at}q_a_proj.weight", latent.q_rank, c.dim, float_type=c.weights)
    yield _tensor(f"{at}q_a_layernorm.weight", latent.q_rank)
    yield part("q_b_proj_nope.weight", (n * nope, latent.q_rank), q_b, (0, nope), n)
    yield part("q_b_proj_rope.weight", (n * rope, latent.q_rank), q_b, (nope, nope + rope), n)
    yield part("kv_a_proj_latent.weight", (r, c.dim), kv_a, (0, r))
    yield part("kv_a_proj_rope.weight", (rope, c.dim), kv_a, (r, r + rope))
    yield _tensor(f"{at}kv_a_layernorm.weight", r)
    yield part("k_b_proj.weight", (n * r, nope), kv_b, (0, nope), n, Order.TRANSPOSED)
    yield part("v_b_proj.weight", (n * value, r), kv_b, (nope, nope + value), n)
    yield _tensor(f"{at}o_proj.weight", c.dim, n * value, float_type=c.weights)


def _indexer(c: ModelConfig, i: Indexer, latent: Latent | None, at: str) -> Iterator[Tensor]:
    if latent is None:
        raise TypeError("an indexer without latent attention")
    yield _tensor(f"{at}wq_b.weight", i.n_heads * i.head_dim, latent.q_rank, float_type=c.weights)
    yield _tensor(f"{at}wk.weight", i.head_dim, c.dim, float_type=c.weights)
    yield _tensor(f"{at}k_norm.weight", i.head_dim)
    yield _tensor(f"{at}k_norm.bias", i.head_dim)
    yield _tensor(f"{at}weights_proj.weight", i.n_heads, c.dim)


def _ffn(c: ModelConfig, at: str, width: int, fused: bool = False) -> Iterator[Tensor]:
    source = f"{at}gate_up_proj.weight" if fused else None
    gate, up = ((0, width), (width, 2 * width)) if fused else (None, None)
    w = c.weights
    yield _tensor(f"{at}gate_proj.weight", width, c.dim, float_type=w, source=source, rows=gate)
    yield _tensor(f"{at}down_proj.weight", c.dim, width, float_type=w)
    yield _tensor(f"{at}up_proj.weight", width, c.dim, float_type=w, source=source, rows=up)


def _experts(c: ModelConfig, experts: Experts, at: str) -> Iterator[Tensor]:
    """The router stays float32: a choice that flips costs more than digits do."""
    yield _tensor(f"{at}gate.weight", experts.count, c.dim)
    for expert in range(experts.count):
        yield from _ffn(c, f"{at}experts.{expert}.", experts.ffn_dim)
    if experts.bias:
        yield _tensor(f"{at}gate.e_score_correction_bias", experts.count)
    if experts.shared_ffn_dim:
        yield from _ffn(c, f"{at}shared_experts.", experts.shared_ffn_dim)

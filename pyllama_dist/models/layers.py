"""The pieces of which every architecture's `build()` writes one node's program."""

from collections.abc import Iterable, Iterator

from pyllama_dist.config import Experts, FloatType, Indexer, Latent, ModelConfig
from pyllama_dist.models.plan import Plan
from pyllama_dist.program import (
    Add,
    Attention,
    Buffer,
    Cache,
    Combine,
    Concat,
    Dispatch,
    ExpertMatmul,
    ExpertWeight,
    Gather,
    LayerNorm,
    Matmul,
    Merge,
    Op,
    Pipe,
    Program,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    Rows,
    Segment,
    Select,
    SiluMul,
    Span,
    Store,
    Sync,
    SyncKind,
    Weight,
)

Step = Op | Sync


class Layers:
    """One node's part of a model.

    A model is written down as one stream of ops and syncs; `program` cuts it into segments after
    each sync. Memory that all pieces use: `x` is the residual, `y` its normed copy, `partials` the
    pipe on which nodes exchange their parts of a sum over the inputs of `o_proj` and `down_proj`,
    `sum` that sum: of a single node, all there is.
    """

    def __init__(self, config: ModelConfig, plan: Plan, node: int) -> None:
        self.c, self.plan, self.node = config, plan, node
        self.share = plan.shares[node]
        self.quantized = config.weights is not FloatType.F32
        self.alone = plan.n_nodes == 1
        # As long as every position fits, all are selected: there is nothing to pick.
        wanted = config.indexer is not None and plan.seq_len > config.indexer.top_k
        self.indexer = config.indexer if wanted else None

    def start(self) -> Iterator[Step]:
        """The embedded rows go out: the root reads them from the file, workers have no table."""
        yield Sync("x", SyncKind.WITH_ROOT)

    def pre_norm(self) -> Iterator[Step]:
        """The whole of a model whose layers have a norm before each half: all but GLM-4-0414."""
        yield from self.start()
        for layer in range(self.c.n_layers):
            yield self.norm("x", "y", f"layers.{layer}.input_layernorm")
            yield from self.mix_positions(layer)
            yield from self.all_reduce()
            yield Add("sum", "x")
            yield self.norm("x", "y", f"layers.{layer}.post_attention_layernorm")
            yield from self.mix_values(layer)
            yield from self.all_reduce()
            yield Add("sum", "x")
        yield from self.head()

    def mix_positions(self, layer: int) -> Iterator[Step]:
        """y -> partials: the first half of a layer, attention of the model's kind."""
        if self.c.latent is None:
            return self.attention(layer)
        return self.latent_attention(layer, self.c.latent)

    def mix_values(self, layer: int) -> Iterator[Step]:
        """y -> partials: the second half of a layer, one FFN or experts."""
        if self.c.experts is None or layer < self.c.experts.dense_layers:
            return self.ffn(layer)
        return self.experts(layer, self.c.experts)

    def norm(self, source: str, target: str, tensor: str) -> Op:
        """RMS norm of a row; every node holds the whole weight."""
        return self._norm(source, target, tensor, self.c.dim, self.c.norm_epsilon)

    def attention(self, layer: int) -> Iterator[Step]:
        """y -> partials: this node's query heads, and its columns of `o_proj`."""
        c, heads, kv_heads = self.c, self.share.heads, self.share.kv_heads
        at, n = f"layers.{layer}.self_attn.", c.head_dim
        keys, values = f"k.{layer}", f"v.{layer}"

        yield from self._input("y")
        for name, units in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield self._rows("y", name, f"{at}{name}_proj", _times(units, n), c.dim, c.qkv_bias)
        for name in ("q", "k"):
            if c.qk_norm:
                yield self._norm(name, name, f"{at}{name}_norm", n, c.norm_epsilon)
            yield self._rope(name, n, c.rotary_dim)
        yield Store("k", keys, keys=True)
        yield Store("v", values, keys=False)
        group = c.n_heads // c.n_kv_heads
        first = heads[0] - kv_heads[0] * group
        yield Attention("q", "z", keys, values, group, first, scale=n**-0.5)
        yield from self._partial("z", f"{at}o_proj", _times(heads, n))

    def latent_attention(self, layer: int, latent: Latent) -> Iterator[Step]:
        """y -> partials: as `attention`, with keys and values in their short form.

        A head's keys are a matrix times the latent vector, so that matrix can be applied to the
        query instead, and the value matrix to the weighted sum of latent vectors: every head reads
        the same cache, which is whole on every node. Source: DeepSeek-V2, 2024, section 2.1.
        """
        c, heads = self.c, self.share.heads
        at, count = f"layers.{layer}.self_attn.", heads[1] - heads[0]
        r, nope, rope, value = latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim

        yield from self._input("y")
        yield self._rows("y", "q_a", f"{at}q_a_proj", (0, latent.q_rank), c.dim)
        yield self._norm("q_a", "q_a", f"{at}q_a_layernorm", latent.q_rank, latent.norm_epsilon)
        yield from self._input("q_a")
        for name, width in (("nope", nope), ("rope", rope)):
            tensor = f"{at}q_b_proj_{name}"
            yield self._rows("q_a", f"q_{name}", tensor, _times(heads, width), latent.q_rank)
        yield self._rope("q_rope", rope, rope)
        yield from self._input("q_nope", count)
        yield self._heads("q_nope", "q_latent", f"{at}k_b_proj", _times(heads, r), nope)
        yield Concat("q_latent", "q_rope", "q", max(1, count))

        yield self._rows("y", "latent", f"{at}kv_a_proj_latent", (0, r), c.dim)
        yield self._norm("latent", "latent", f"{at}kv_a_layernorm", r, latent.norm_epsilon)
        yield self._rows("y", "k_rope", f"{at}kv_a_proj_rope", (0, rope), c.dim)
        yield self._rope("k_rope", rope, rope)
        yield Concat("latent", "k_rope", "kept", 1)
        cache = f"kv.{layer}"
        yield Store("kept", cache, keys=True)

        selection = None
        if self.indexer is not None:
            selection = "selection"
            yield from self._select(layer, self.indexer)
        scale = (nope + rope) ** -0.5
        yield Attention("q", "z_latent", cache, cache, c.n_heads, heads[0], scale, selection)
        yield from self._input("z_latent", count)
        yield self._heads("z_latent", "z", f"{at}v_b_proj", _times(heads, value), r)
        yield from self._partial("z", f"{at}o_proj", _times(heads, value))

    def ffn(self, layer: int) -> Iterator[Step]:
        """y -> partials: this node's blocks of the FFN, and its columns of `down_proj`."""
        yield from self._input("y")
        yield from self._gated(f"layers.{layer}.mlp.", "", self.share.ffn)
        yield from self._partial("hidden", f"layers.{layer}.mlp.down_proj", self.share.ffn)

    def experts(self, layer: int, experts: Experts) -> Iterator[Step]:
        """y -> partials: this node's blocks of every expert, chosen and shared, in one sum."""
        c, at, blocks = self.c, f"layers.{layer}.mlp.", self.share.experts
        router = Weight(f"{at}gate.weight", FloatType.F32, (0, experts.count), (0, c.dim))
        bias = Weight(
            f"{at}gate.e_score_correction_bias", FloatType.F32, (0, 1), (0, experts.count)
        )
        yield Matmul("y", "scores", router)
        yield Route(
            "scores",
            "route",
            bias if experts.bias else None,
            experts.scoring,
            experts.active,
            experts.groups,
            experts.active_groups,
            experts.normalize,
            experts.scale,
        )
        yield Dispatch("y", "route", "expert_y")
        yield from self._input("expert_y")
        for name in ("gate", "up"):
            weight = self._each(f"{at}experts.{{}}.{name}_proj", experts, blocks, (0, c.dim))
            yield ExpertMatmul(self._name("expert_y"), "route", f"expert_{name}", weight)
        yield SiluMul("expert_gate", "expert_up", "expert_hidden")
        yield from self._input("expert_hidden")
        weight = self._each(f"{at}experts.{{}}.down_proj", experts, (0, c.dim), blocks)
        yield ExpertMatmul(self._name("expert_hidden"), "route", "expert_out", weight)

        if not experts.shared_ffn_dim:
            yield Combine("expert_out", "route", self._into)
        else:
            shared = f"{at}shared_experts."
            yield from self._input("y")
            yield from self._gated(shared, "shared_", self.share.shared)
            yield from self._input("shared_hidden")
            yield self._columns(
                "shared_hidden", self._into, f"{shared}down_proj", self.share.shared
            )
            yield Combine("expert_out", "route", "routed")
            yield Add("routed", self._into)
        yield from self._send()

    def all_reduce(self) -> Iterator[Step]:
        """partials -> sum: every node sends its partial sums to all, and adds up all of them."""
        if not self.alone:
            yield Sync("partials", SyncKind.NODE_SLICES)
            yield Merge("partials", "sum")

    def head(self) -> Iterator[Step]:
        """x -> logits, of the rows that need them; the root collects the nodes' parts."""
        yield Gather("x", "last")
        yield self.norm("last", "last_y", "norm")
        yield from self._input("last_y")
        yield self._rows("last_y", "logits", "lm_head", self.share.vocab, self.c.dim)
        yield Sync("logits", SyncKind.NODE_SLICES_EXCEPT_ROOT)

    def program(self, steps: Iterable[Step]) -> Program:
        """The program of this node."""
        plan = self.plan
        return Program(
            n_nodes=plan.n_nodes,
            node=self.node,
            max_rows=plan.max_rows,
            max_logits=plan.max_logits,
            n_experts=self.c.experts.active if self.c.experts else 0,
            n_seqs=plan.n_seqs,
            n_blocks=plan.n_blocks,
            seq_len=plan.seq_len,
            pipes=self._pipes(),
            buffers=tuple(self._buffers()),
            caches=tuple(self._caches()),
            segments=tuple(_segments(steps, alone=self.alone)),
        )

    def _select(self, layer: int, indexer: Indexer) -> Iterator[Op]:
        """y and q_a -> selection; every node selects for itself, and all of them the same.

        A layer that does not pick takes what the last one that did has left in `selection`.
        """
        if not indexer.layers[layer]:
            return
        c, at, n = self.c, f"layers.{layer}.self_attn.indexer.", indexer.head_dim
        width = indexer.n_heads * n
        q_rank = c.latent.q_rank if c.latent else 0
        cache = f"i.{layer}"
        yield self._rows("q_a", "index_q", f"{at}wq_b", (0, width), q_rank)
        yield self._rope("index_q", n, indexer.rotary_dim)
        yield self._rows("y", "index_k", f"{at}wk", (0, n), c.dim)
        weight, bias = (
            Weight(f"{at}k_norm.{kind}", FloatType.F32, (0, 1), (0, n))
            for kind in ("weight", "bias")
        )
        yield LayerNorm("index_k", "index_k", weight, bias, _INDEX_EPSILON)
        yield self._rope("index_k", n, indexer.rotary_dim)
        yield Store("index_k", cache, keys=True)
        weights = Weight(
            f"{at}weights_proj.weight", FloatType.F32, (0, indexer.n_heads), (0, c.dim)
        )
        yield Matmul("y", "index_w", weights)
        scale = (indexer.n_heads * n) ** -0.5
        yield Select("index_q", "index_w", cache, "selection", indexer.top_k, scale)

    def _pipes(self) -> tuple[Pipe, ...]:
        vocab = tuple(share.vocab[1] - share.vocab[0] for share in self.plan.shares)
        partials = Pipe("partials", self.plan.sync, (self.c.dim,) * self.plan.n_nodes)
        return (
            Pipe("x", FloatType.F32, (self.c.dim,)),
            *(() if self.alone else (partials,)),
            Pipe("logits", FloatType.F32, vocab, rows="logits"),
        )

    def _buffers(self) -> Iterator[Buffer]:
        """Memory of the pieces; of what a matrix reads, a rounded copy too."""
        inputs = {"y", "z", "hidden", "last_y", "shared_hidden", "expert_y", "expert_hidden"}
        inputs |= {"q_a", "q_nope", "z_latent"}
        widths: list[tuple[Rows, dict[str, int]]] = [
            ("batch", self._widths()),
            ("logits", {"last": self.c.dim, "last_y": self.c.dim}),
        ]
        if self.c.experts is not None:
            widths.append(("experts", self._expert_widths()))
        for rows, named in widths:
            for name, width in named.items():
                yield Buffer(name, FloatType.F32, width, rows)
                if self.quantized and name in inputs:
                    yield Buffer(f"{name}_q80", FloatType.Q80, width, rows)

    def _widths(self) -> dict[str, int]:
        c, share = self.c, self.share
        heads, kv_heads, ffn = (_length(span) for span in (share.heads, share.kv_heads, share.ffn))
        widths = dict.fromkeys(("y", "sum"), c.dim) | {"z": heads * c.value_dim}
        if c.latent is None:
            widths |= {"q": heads * c.head_dim} | dict.fromkeys("kv", kv_heads * c.head_dim)
        else:
            kept = c.latent.kv_rank + c.latent.rope_dim
            widths |= {
                "q_a": c.latent.q_rank,
                "q_nope": heads * c.latent.nope_dim,
                "q_rope": heads * c.latent.rope_dim,
                "q_latent": heads * c.latent.kv_rank,
                "q": heads * kept,
                "latent": c.latent.kv_rank,
                "k_rope": c.latent.rope_dim,
                "kept": kept,
                "z_latent": heads * c.latent.kv_rank,
            }
        if self.indexer is not None:
            widths |= {
                "index_q": self.indexer.n_heads * self.indexer.head_dim,
                "index_k": self.indexer.head_dim,
                "index_w": self.indexer.n_heads,
                "selection": self.plan.seq_len,
            }
        if c.experts is None or c.experts.dense_layers:
            widths |= dict.fromkeys(("gate", "up", "hidden"), ffn)
        if c.experts is not None:
            widths |= dict.fromkeys(("scores", "route"), c.experts.count) | {"routed": c.dim}
            shared = ("shared_gate", "shared_up", "shared_hidden")
            widths |= dict.fromkeys(shared, _length(share.shared))
        return widths

    def _expert_widths(self) -> dict[str, int]:
        ffn = dict.fromkeys(
            ("expert_gate", "expert_up", "expert_hidden"), _length(self.share.experts)
        )
        return {"expert_y": self.c.dim} | ffn | {"expert_out": self.c.dim}

    def _caches(self) -> Iterator[Cache]:
        c, kind = self.c, self.plan.cache
        for layer in range(c.n_layers):
            if c.latent is not None:
                yield Cache(f"kv.{layer}", kind, 1, c.latent.kv_rank + c.latent.rope_dim)
            else:
                for name in "kv":
                    yield Cache(f"{name}.{layer}", kind, _length(self.share.kv_heads), c.head_dim)
            if self.indexer is not None and self.indexer.layers[layer]:
                yield Cache(f"i.{layer}", kind, 1, self.indexer.head_dim)

    @property
    def _into(self) -> str:
        """Where partial sums are made: in the pipe, if they travel as they are."""
        return "partials" if self.plan.sync is FloatType.F32 and not self.alone else "sum"

    def _send(self) -> Iterator[Op]:
        """Rounds partial sums where they travel as Q80."""
        if self._into == "sum" and not self.alone:
            yield Quantize("sum", "partials")

    def _name(self, source: str) -> str:
        """What a matrix reads: the rounded copy where the weights are quantized."""
        return f"{source}_q80" if self.quantized else source

    def _input(self, source: str, heads: int = 1) -> Iterator[Op]:
        """Rounds a matrix's input where the weights are quantized."""
        if self.quantized:
            yield Quantize(source, f"{source}_q80", max(1, heads))

    def _norm(self, source: str, target: str, tensor: str, width: int, epsilon: float) -> Op:
        weight = Weight(f"{tensor}.weight", FloatType.F32, (0, 1), (0, width))
        return RmsNorm(source, target, weight, epsilon)

    def _rope(self, target: str, head_dim: int, rotary_dim: int) -> Op:
        c = self.c
        return Rope(target, head_dim, rotary_dim, c.rope_theta, c.rope_pairs, c.rope_scaling)

    def _rows(
        self, source: str, target: str, tensor: str, rows: Span, width: int, bias: bool = False
    ) -> Op:
        """All inputs to a share of the outputs."""
        return Matmul(
            self._name(source),
            target,
            Weight(f"{tensor}.weight", self.c.weights, rows, (0, width)),
            Weight(f"{tensor}.bias", FloatType.F32, (0, 1), rows) if bias else None,
        )

    def _heads(self, source: str, target: str, tensor: str, rows: Span, width: int) -> Op:
        """Each head's inputs to its outputs."""
        weight = Weight(f"{tensor}.weight", self.c.weights, rows, (0, width))
        return Matmul(self._name(source), target, weight, heads=max(1, _length(self.share.heads)))

    def _columns(self, source: str, target: str, tensor: str, cols: Span) -> Op:
        """A share of the inputs to a partial sum of all outputs."""
        weight = Weight(f"{tensor}.weight", self.c.weights, (0, self.c.dim), cols)
        return Matmul(self._name(source), target, weight)

    def _partial(self, source: str, tensor: str, cols: Span) -> Iterator[Op]:
        """A partial sum, ready to be sent."""
        yield from self._input(source)
        yield self._columns(source, self._into, tensor, cols)
        yield from self._send()

    def _gated(self, at: str, prefix: str, blocks: Span) -> Iterator[Op]:
        """y -> hidden: silu(gate) * up, of this node's blocks."""
        for name in ("gate", "up"):
            yield self._rows("y", f"{prefix}{name}", f"{at}{name}_proj", blocks, self.c.dim)
        yield SiluMul(f"{prefix}gate", f"{prefix}up", f"{prefix}hidden")

    def _each(self, tensor: str, experts: Experts, rows: Span, cols: Span) -> ExpertWeight:
        return ExpertWeight(f"{tensor}.weight", experts.count, self.c.weights, rows, cols)


def build_pre_norm(c: ModelConfig, plan: Plan, node: int) -> Program:
    """The program of one node of a model whose layers have a norm before each half."""
    layers = Layers(c, plan, node)
    return layers.program(layers.pre_norm())


_INDEX_EPSILON = 1e-6  # of the LayerNorm of an indexer's keys: a constant of modeling_glm_moe_dsa


def _length(span: Span) -> int:
    return span[1] - span[0]


def _times(span: Span, width: int) -> Span:
    return span[0] * width, span[1] * width


def _segments(steps: Iterable[Step], *, alone: bool) -> Iterator[Segment]:
    """Cuts a stream of ops and syncs after each sync; a segment is named after its last matrix."""
    ops: list[Op] = []
    for step in steps:
        match step:
            case Sync():
                if not alone:
                    yield Segment(_name(ops), tuple(ops), (step,))
                    ops = []
            case _:
                ops.append(step)
    if ops:
        yield Segment(_name(ops), tuple(ops))


def _name(ops: list[Op]) -> str:
    matrices = [op.weight.tensor for op in ops if isinstance(op, Matmul | ExpertMatmul)]
    return matrices[-1].removesuffix(".weight") if matrices else "start"

"""The pieces of which every architecture's `build()` writes one node's program."""

from collections.abc import Iterable, Iterator

from pyllama_dist.config import Experts, FloatType, Indexer, Latent, ModelConfig
from pyllama_dist.models.plan import ShardingPlan
from pyllama_dist.ops import (
    Add,
    Attention,
    Combine,
    Concat,
    Dispatch,
    ExpertMatmul,
    ExpertWeight,
    Gather,
    LayerNorm,
    Matmul,
    Quantize,
    QuantizeExperts,
    RmsNorm,
    Rope,
    Route,
    Select,
    SiluMul,
    Store,
)
from pyllama_dist.program import (
    AllReduce,
    Cache,
    Op,
    Pipe,
    Program,
    Segment,
    Shapes,
    Span,
    Sync,
    SyncKind,
    Weight,
)

Instruction = Op | Sync | AllReduce


class Layers:
    """One node's part of a model.

    A model is one stream of instructions, ops and syncs; `program` cuts it into segments after each
    sync. Common buffers: `x` is the residual stream, `y` its normed copy, and `sum` the all-reduced
    output of `o_proj` or `down_proj`. `partials` is the pipe for the nodes' partial sums of that
    output; a single node writes `sum` at once.
    """

    def __init__(self, config: ModelConfig, plan: ShardingPlan, node: int) -> None:
        self.c, self.plan, self.node = config, plan, node
        self.shard = plan.shards[node]
        self.quantized = config.weights is not FloatType.F32
        self.alone = plan.n_nodes == 1
        # As long as every position fits, all are selected: there is nothing to pick.
        wanted = config.indexer is not None and plan.seq_len > config.indexer.top_k
        self.indexer = config.indexer if wanted else None

    def start(self) -> Iterator[Instruction]:
        """Broadcasts the embedded rows: the root alone has the embedding, in its file."""
        yield Sync("x", SyncKind.WITH_ROOT)

    def pre_norm(self) -> Iterator[Instruction]:
        """The whole of a model whose layers have a norm before each half: all but GLM-4-0414."""
        yield from self.start()
        for layer in range(self.c.n_layers):
            yield self.norm("x", "y", f"layers.{layer}.input_layernorm")
            yield from self.attention_block(layer)
            yield from self.all_reduce()
            yield Add("sum", "x")
            yield self.norm("x", "y", f"layers.{layer}.post_attention_layernorm")
            yield from self.mlp_block(layer)
            yield from self.all_reduce()
            yield Add("sum", "x")
        yield from self.head()

    def attention_block(self, layer: int) -> Iterator[Instruction]:
        """y -> partials: the first half of a layer, attention of the model's kind."""
        if self.c.latent is None:
            return self.attention(layer)
        return self.latent_attention(layer, self.c.latent)

    def mlp_block(self, layer: int) -> Iterator[Instruction]:
        """y -> partials: the second half of a layer, one FFN or experts."""
        if self.c.experts is None or layer < self.c.experts.dense_layers:
            return self.ffn(layer)
        return self.experts(layer, self.c.experts)

    def norm(self, source: str, target: str, tensor: str) -> Op:
        """RMS norm of a row; every node holds the whole weight."""
        return self._norm(source, target, tensor, self.c.dim, self.c.norm_epsilon)

    def attention(self, layer: int) -> Iterator[Instruction]:
        """y -> partials: this node's query heads, and its columns of `o_proj`."""
        c, heads, kv_heads = self.c, self.shard.heads, self.shard.kv_heads
        at, n = f"layers.{layer}.self_attn.", c.head_dim
        keys, values = f"k.{layer}", f"v.{layer}"

        yield from self.rounded("y")
        for name, units in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield self.all_to_sharded(
                "y", name, f"{at}{name}_proj", _times(units, n), c.dim, c.qkv_bias
            )
        for name in ("q", "k"):
            if c.qk_norm:
                yield self._norm(name, name, f"{at}{name}_norm", n, c.norm_epsilon)
            yield self._rope(name, n, c.rotary_dim)
        yield Store("k", keys, keys=True)
        yield Store("v", values, keys=False)
        group = c.n_heads // c.n_kv_heads
        first = heads[0] - kv_heads[0] * group
        yield Attention("q", "z", keys, values, n, group, first, scale=n**-0.5)
        yield from self.sharded_to_all("z", f"{at}o_proj", _times(heads, n))

    def latent_attention(self, layer: int, latent: Latent) -> Iterator[Instruction]:
        """y -> partials: as `attention`, with keys and values in their short form.

        A head's keys are a matrix times the latent vector, so that matrix can be applied to the
        query instead, and the value matrix to the weighted sum of latent vectors: every head reads
        the same cache, which is whole on every node. Source: DeepSeek-V2, 2024, section 2.1.
        """
        c, heads = self.c, self.shard.heads
        at, count = f"layers.{layer}.self_attn.", heads[1] - heads[0]
        r, nope, rope, value = latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim

        yield from self.rounded("y")
        yield self.all_to_sharded("y", "q_a", f"{at}q_a_proj", (0, latent.q_rank), c.dim)
        yield self._norm("q_a", "q_a", f"{at}q_a_layernorm", latent.q_rank, latent.norm_epsilon)
        yield from self.rounded("q_a")
        for name, width in (("nope", nope), ("rope", rope)):
            tensor = f"{at}q_b_proj_{name}"
            yield self.all_to_sharded(
                "q_a", f"q_{name}", tensor, _times(heads, width), latent.q_rank
            )
        yield self._rope("q_rope", rope, rope)
        yield from self.rounded("q_nope", count)
        yield self._heads("q_nope", "q_latent", f"{at}k_b_proj", _times(heads, r), nope)
        yield Concat("q_latent", "q_rope", "q", max(1, count))

        yield self.all_to_sharded("y", "latent", f"{at}kv_a_proj_latent", (0, r), c.dim)
        yield self._norm("latent", "latent", f"{at}kv_a_layernorm", r, latent.norm_epsilon)
        yield self.all_to_sharded("y", "k_rope", f"{at}kv_a_proj_rope", (0, rope), c.dim)
        yield self._rope("k_rope", rope, rope)
        yield Concat("latent", "k_rope", "kept", 1)
        cache = f"kv.{layer}"
        yield Store("kept", cache, keys=True)

        selection = None
        if self.indexer is not None:
            selection = "selection"
            yield from self._select(layer, self.indexer)
        scale = (nope + rope) ** -0.5
        yield Attention("q", "z_latent", cache, cache, r, c.n_heads, heads[0], scale, selection)
        yield from self.rounded("z_latent", count)
        yield self._heads("z_latent", "z", f"{at}v_b_proj", _times(heads, value), r)
        yield from self.sharded_to_all("z", f"{at}o_proj", _times(heads, value))

    def ffn(self, layer: int) -> Iterator[Instruction]:
        """y -> partials: this node's blocks of the FFN, and its columns of `down_proj`."""
        yield from self.rounded("y")
        yield from self._gated(f"layers.{layer}.mlp.", "", self.shard.ffn)
        yield from self.sharded_to_all("hidden", f"layers.{layer}.mlp.down_proj", self.shard.ffn)

    def experts(self, layer: int, experts: Experts) -> Iterator[Instruction]:
        """y -> partials: this node's blocks of every expert, chosen and shared, in one sum."""
        c, at, blocks = self.c, f"layers.{layer}.mlp.", self.shard.experts
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
        yield from self._rounded_experts("expert_y")
        for name in ("gate", "up"):
            weight = self._each(f"{at}experts.{{}}.{name}_proj", experts, blocks, (0, c.dim))
            yield ExpertMatmul(self._name("expert_y"), "route", f"expert_{name}", weight)
        yield SiluMul("expert_gate", "expert_up", "expert_hidden")
        yield from self._rounded_experts("expert_hidden")
        weight = self._each(f"{at}experts.{{}}.down_proj", experts, (0, c.dim), blocks)
        yield ExpertMatmul(self._name("expert_hidden"), "route", "expert_out", weight)

        if not experts.shared_ffn_dim:
            yield Combine("expert_out", "route", self._into)
        else:
            shared = f"{at}shared_experts."
            yield from self.rounded("y")
            yield from self._gated(shared, "shared_", self.shard.shared)
            yield from self.rounded("shared_hidden")
            yield self._columns(
                "shared_hidden", self._into, f"{shared}down_proj", self.shard.shared
            )
            yield Combine("expert_out", "route", "routed")
            yield Add("routed", self._into)
        yield from self._send()

    def all_reduce(self) -> Iterator[Instruction]:
        """partials -> sum: on every node, the sum of the parts of all."""
        if not self.alone:
            yield AllReduce("partials", "sum")

    def head(self) -> Iterator[Instruction]:
        """x -> logits, of the rows that need them; the root collects the nodes' parts."""
        yield Gather("x", "last")
        yield self.norm("last", "last_y", "norm")
        yield from self.rounded("last_y")
        yield self.all_to_sharded("last_y", "logits", "lm_head", self.shard.vocab, self.c.dim)
        yield Sync("logits", SyncKind.NODE_SLICES_EXCEPT_ROOT)

    def rounded(self, source: str, heads: int = 1) -> Iterator[Op]:
        """Rounds a matrix's input where the weights are quantized; each head by itself."""
        if self.quantized:
            yield Quantize(source, f"{source}_q80", max(1, heads))

    def all_to_sharded(
        self, source: str, target: str, tensor: str, rows: Span, width: int, bias: bool = False
    ) -> Op:
        """A matrix cut by rows: all of its inputs, `width` of them, to some of its outputs.

        The source must be `rounded` before.
        """
        return Matmul(
            self._name(source),
            target,
            Weight(f"{tensor}.weight", self.c.weights, rows, (0, width)),
            Weight(f"{tensor}.bias", FloatType.F32, (0, 1), rows) if bias else None,
        )

    def sharded_to_all(self, source: str, tensor: str, cols: Span) -> Iterator[Op]:
        """source -> partials: a matrix cut by columns, some of its inputs to all of its outputs.

        What it makes is a partial sum, ready to be sent: `all_reduce` follows.
        """
        yield from self.rounded(source)
        yield self._columns(source, self._into, tensor, cols)
        yield from self._send()

    def program(self, steps: Iterable[Instruction]) -> Program:
        """The program of this node."""
        plan, pipes, caches = self.plan, self._pipes(), tuple(self._caches())
        segments = tuple(_segments(steps, alone=self.alone))
        shapes = Shapes(pipes, caches, node=self.node, seq_len=plan.seq_len)
        for segment in segments:
            for op in (*segment.ops, *segment.syncs):
                if not isinstance(op, Sync):
                    shapes.add(op)
        return Program(
            n_nodes=plan.n_nodes,
            node=self.node,
            max_rows=plan.max_rows,
            max_logits=plan.max_logits,
            n_experts=self.c.experts.count if self.c.experts else 0,
            n_active_experts=self.c.experts.active if self.c.experts else 0,
            n_seqs=plan.n_seqs,
            n_blocks=plan.n_blocks,
            seq_len=plan.seq_len,
            pipes=pipes,
            buffers=shapes.buffers,
            caches=caches,
            segments=segments,
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
        yield self.all_to_sharded("q_a", "index_q", f"{at}wq_b", (0, width), q_rank)
        yield self._rope("index_q", n, indexer.rotary_dim)
        yield self.all_to_sharded("y", "index_k", f"{at}wk", (0, n), c.dim)
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
        vocab = tuple(shard.vocab[1] - shard.vocab[0] for shard in self.plan.shards)
        partials = Pipe("partials", self.plan.sync, (self.c.dim,) * self.plan.n_nodes)
        return (
            Pipe("x", FloatType.F32, (self.c.dim,)),
            *(() if self.alone else (partials,)),
            Pipe("logits", FloatType.F32, vocab, rows="logits"),
        )

    def _caches(self) -> Iterator[Cache]:
        c, kind = self.c, self.plan.cache
        for layer in range(c.n_layers):
            if c.latent is not None:
                yield Cache(f"kv.{layer}", kind, 1, c.latent.kv_rank + c.latent.rope_dim)
            else:
                for name in "kv":
                    yield Cache(f"{name}.{layer}", kind, _length(self.shard.kv_heads), c.head_dim)
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

    def _rounded_experts(self, source: str) -> Iterator[Op]:
        """Likewise, of the experts' matrices."""
        if self.quantized:
            yield QuantizeExperts(source, "route", f"{source}_q80")

    def _norm(self, source: str, target: str, tensor: str, width: int, epsilon: float) -> Op:
        weight = Weight(f"{tensor}.weight", FloatType.F32, (0, 1), (0, width))
        return RmsNorm(source, target, weight, epsilon)

    def _rope(self, target: str, head_dim: int, rotary_dim: int) -> Op:
        c = self.c
        return Rope(target, head_dim, rotary_dim, c.rope_theta, c.rope_pairs, c.rope_scaling)

    def _heads(self, source: str, target: str, tensor: str, rows: Span, width: int) -> Op:
        """Each head's inputs to its outputs."""
        weight = Weight(f"{tensor}.weight", self.c.weights, rows, (0, width))
        return Matmul(self._name(source), target, weight, heads=max(1, _length(self.shard.heads)))

    def _columns(self, source: str, target: str, tensor: str, cols: Span) -> Op:
        """Multiplies a shard of the inputs: a partial sum of all outputs."""
        weight = Weight(f"{tensor}.weight", self.c.weights, (0, self.c.dim), cols)
        return Matmul(self._name(source), target, weight)

    def _gated(self, at: str, prefix: str, blocks: Span) -> Iterator[Op]:
        """y -> hidden: silu(gate) * up, of this node's blocks."""
        for name in ("gate", "up"):
            yield self.all_to_sharded(
                "y", f"{prefix}{name}", f"{at}{name}_proj", blocks, self.c.dim
            )
        yield SiluMul(f"{prefix}gate", f"{prefix}up", f"{prefix}hidden")

    def _each(self, tensor: str, experts: Experts, rows: Span, cols: Span) -> ExpertWeight:
        return ExpertWeight(f"{tensor}.weight", experts.count, self.c.weights, rows, cols)


def build_pre_norm(c: ModelConfig, plan: ShardingPlan, node: int) -> Program:
    """The program of one node of a model whose layers have a norm before each half."""
    layers = Layers(c, plan, node)
    return layers.program(layers.pre_norm())


_INDEX_EPSILON = 1e-6  # of the LayerNorm of an indexer's keys: a constant of modeling_glm_moe_dsa


def _length(span: Span) -> int:
    return span[1] - span[0]


def _times(span: Span, width: int) -> Span:
    return span[0] * width, span[1] * width


def _segments(steps: Iterable[Instruction], *, alone: bool) -> Iterator[Segment]:
    """Cuts a stream of ops and syncs after each sync; a segment is named after its last matrix."""
    ops: list[Op] = []
    for step in steps:
        match step:
            case Sync() | AllReduce():
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

"""What the dense GLM models have in common: the list of tensors and the ops of a layer."""

from collections.abc import Iterable, Iterator

from pyllama_dist.config import FloatType, ModelConfig, Tensor
from pyllama_dist.models.plan import Plan
from pyllama_dist.program import (
    Attention,
    Buffer,
    Cache,
    Gather,
    Matmul,
    Merge,
    Op,
    Pipe,
    Program,
    Quantize,
    RmsNorm,
    Rope,
    Segment,
    SiluMul,
    Span,
    StoreKv,
    Sync,
    SyncKind,
    Weight,
)

Step = Op | Sync


def dense_tensors(c: ModelConfig, norms: tuple[str, ...]) -> list[Tensor]:
    """The tensors of a `.m` file in their order, which is distributed-llama's with additions.

    Biases follow the attention matrices, and the norms of a layer stand at its end in the order in
    which they act. `lm_head` falls back to the embedding: a tied head is stored as a copy of its
    own, rounded to the format of the weights.

    Args:
        c: the configuration.
        norms: Hugging Face's names of a layer's norms, in the order in which they act.
    """
    tensors: list[Tensor] = []

    def add(
        name: str,
        *shape: int,
        float_type: FloatType = FloatType.F32,
        source: str | None = None,
        source_rows: tuple[int, int] | None = None,
    ) -> None:
        prefix = "" if name.startswith("lm_head") else "model."
        sources: tuple[str, ...] = (prefix + (source or name),)
        if name == "lm_head.weight":
            sources += ("model.embed_tokens.weight",)
        tensors.append(Tensor(name, shape, float_type, sources, source_rows))

    add("embed_tokens.weight", c.vocab_size, c.dim)
    for layer in range(c.n_layers):
        attn, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        add(attn + "q_proj.weight", c.q_dim, c.dim, float_type=c.weights)
        add(attn + "k_proj.weight", c.kv_dim, c.dim, float_type=c.weights)
        add(attn + "v_proj.weight", c.kv_dim, c.dim, float_type=c.weights)
        add(attn + "o_proj.weight", c.dim, c.q_dim, float_type=c.weights)
        if c.qkv_bias:
            add(attn + "q_proj.bias", c.q_dim)
            add(attn + "k_proj.bias", c.kv_dim)
            add(attn + "v_proj.bias", c.kv_dim)
        # The checkpoint fuses gate and up into one matrix, gate first.
        fused, f = mlp + "gate_up_proj.weight", c.ffn_dim
        add(
            mlp + "gate_proj.weight",
            f,
            c.dim,
            float_type=c.weights,
            source=fused,
            source_rows=(0, f),
        )
        add(mlp + "down_proj.weight", c.dim, f, float_type=c.weights)
        add(
            mlp + "up_proj.weight",
            f,
            c.dim,
            float_type=c.weights,
            source=fused,
            source_rows=(f, 2 * f),
        )
        for norm in norms:
            add(f"layers.{layer}.{norm}.weight", c.dim)
    add("norm.weight", c.dim)
    add("lm_head.weight", c.vocab_size, c.dim, float_type=c.weights)
    return tensors


class Dense:
    """The pieces of which a dense model's `build()` writes one node's program.

    A model is written down as one stream of ops and syncs; `program` cuts it into segments after
    each sync. Memory that all pieces use: `x` is the residual, `y` its normed copy, `partials` the
    pipe on which nodes exchange their parts of a sum over the inputs of `o_proj` and `down_proj`,
    `sum` that sum.
    """

    def __init__(self, config: ModelConfig, plan: Plan, node: int) -> None:
        self.c, self.plan, self.node = config, plan, node
        self.share = plan.shares[node]

    def start(self) -> Iterator[Step]:
        """The embedded rows go out: the root reads them from the file, workers have no table."""
        yield Sync("x", SyncKind.WITH_ROOT)

    def norm(self, source: str, target: str, tensor: str) -> Op:
        """RMS norm; every node holds the whole weight."""
        whole = Weight(f"{tensor}.weight", FloatType.F32, (0, 1), (0, self.c.dim))
        return RmsNorm(source, target, whole, self.c.norm_epsilon)

    def attention(self, at: str) -> Iterator[Step]:
        """y -> partials: this node's query heads, and its columns of `o_proj`."""
        c, heads, kv_heads = self.c, self.share.heads, self.share.kv_heads
        q_rows = (heads[0] * c.head_dim, heads[1] * c.head_dim)
        kv_rows = (kv_heads[0] * c.head_dim, kv_heads[1] * c.head_dim)
        bias = c.qkv_bias
        layer = at.removeprefix("layers.").removesuffix(".")
        keys, values = f"k.{layer}", f"v.{layer}"

        yield from self._input("y")
        yield self._rows("y", "q", f"{at}self_attn.q_proj", q_rows, c.dim, bias)
        yield self._rows("y", "k", f"{at}self_attn.k_proj", kv_rows, c.dim, bias)
        yield self._rows("y", "v", f"{at}self_attn.v_proj", kv_rows, c.dim, bias)
        yield Rope("q", c.head_dim, c.rotary_dim, c.rope_theta)
        yield Rope("k", c.head_dim, c.rotary_dim, c.rope_theta)
        yield StoreKv("k", "v", keys, values)
        group = c.n_heads // c.n_kv_heads
        yield Attention("q", "z", keys, values, group, first=heads[0] - kv_heads[0] * group)
        yield from self._input("z")
        yield from self._partial("z", f"{at}self_attn.o_proj", q_rows)

    def ffn(self, at: str) -> Iterator[Step]:
        """y -> partials: this node's blocks of the FFN, and its columns of `down_proj`."""
        blocks = self.share.ffn
        yield from self._input("y")
        yield self._rows("y", "gate", f"{at}mlp.gate_proj", blocks, self.c.dim)
        yield self._rows("y", "up", f"{at}mlp.up_proj", blocks, self.c.dim)
        yield SiluMul("gate", "up", "hidden")
        yield from self._input("hidden")
        yield from self._partial("hidden", f"{at}mlp.down_proj", blocks)

    def all_reduce(self, target: str) -> Iterator[Step]:
        """partials -> target: every node sends its partial sums to all, and adds up all of them."""
        yield Sync("partials", SyncKind.NODE_SLICES)
        yield Merge("partials", target)

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
            n_slots=plan.n_slots,
            seq_len=plan.seq_len,
            pipes=self._pipes(),
            buffers=self._buffers(),
            caches=self._caches(),
            segments=tuple(_segments(steps, alone=plan.n_nodes == 1)),
        )

    def _pipes(self) -> tuple[Pipe, ...]:
        vocab = tuple(share.vocab[1] - share.vocab[0] for share in self.plan.shares)
        return (
            Pipe("x", FloatType.F32, (self.c.dim,)),
            Pipe("partials", self.plan.partials, (self.c.dim,) * self.plan.n_nodes),
            Pipe("logits", FloatType.F32, vocab, rows="logits"),
        )

    def _buffers(self) -> tuple[Buffer, ...]:
        c, share, f32 = self.c, self.share, FloatType.F32
        q = (share.heads[1] - share.heads[0]) * c.head_dim
        kv = (share.kv_heads[1] - share.kv_heads[0]) * c.head_dim
        ffn = share.ffn[1] - share.ffn[0]
        buffers = [
            *(Buffer(name, f32, c.dim) for name in ("y", "sum")),
            *(Buffer(name, f32, q) for name in ("q", "z")),
            *(Buffer(name, f32, kv) for name in ("k", "v")),
            *(Buffer(name, f32, ffn) for name in ("gate", "up", "hidden")),
            *(Buffer(name, f32, c.dim, rows="logits") for name in ("last", "last_y")),
        ]
        if c.weights is not FloatType.F32:
            inputs = {"y", "z", "hidden", "last_y"}
            buffers += [
                Buffer(f"{b.name}_q80", FloatType.Q80, b.width, b.rows)
                for b in buffers
                if b.name in inputs
            ]
        return tuple(buffers)

    def _caches(self) -> tuple[Cache, ...]:
        kv_heads = self.share.kv_heads[1] - self.share.kv_heads[0]
        return tuple(
            Cache(f"{kind}.{layer}", self.plan.cache, kv_heads, self.c.head_dim)
            for layer in range(self.c.n_layers)
            for kind in "kv"
        )

    def _input(self, source: str) -> Iterator[Op]:
        """Rounds a matrix's input where the weights are quantized."""
        if self.c.weights is not FloatType.F32:
            yield Quantize(source, f"{source}_q80")

    def _input_name(self, source: str) -> str:
        return source if self.c.weights is FloatType.F32 else f"{source}_q80"

    def _rows(
        self, source: str, target: str, tensor: str, rows: Span, width: int, bias: bool = False
    ) -> Op:
        """All inputs to a share of the outputs."""
        return Matmul(
            self._input_name(source),
            target,
            Weight(f"{tensor}.weight", self.c.weights, rows, (0, width)),
            Weight(f"{tensor}.bias", FloatType.F32, (0, 1), rows) if bias else None,
        )

    def _partial(self, source: str, tensor: str, cols: Span) -> Iterator[Op]:
        """A share of the inputs to a partial sum of all outputs, ready to be sent."""
        weight = Weight(f"{tensor}.weight", self.c.weights, (0, self.c.dim), cols)
        if self.plan.partials is FloatType.F32:
            yield Matmul(self._input_name(source), "partials", weight)
        else:
            yield Matmul(self._input_name(source), "sum", weight)
            yield Quantize("sum", "partials")


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
    matrices = [op.weight.tensor for op in ops if isinstance(op, Matmul)]
    return matrices[-1].removesuffix(".weight") if matrices else "start"

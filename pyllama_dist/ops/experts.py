"""A mixture of experts: routing, dispatch of rows, and products with each expert's matrices."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from msgspec import Meta

from pyllama_dist.config import FloatType, Scoring
from pyllama_dist.executor.arena import U8
from pyllama_dist.executor.lowering import Cut, Lowering, Row, address
from pyllama_dist.executor.memory import F32, I64, Constant, Memory
from pyllama_dist.ops.matmul import check_factor, multiply
from pyllama_dist.program import Buffer, Count, Name, Op, Part, Program, Shapes, Span, Weight
from pyllama_dist.validate import Check, require
from pyllama_kernels import reference
from pyllama_kernels.blocks import BLOCK
from pyllama_kernels.layout import ROW_BYTES
from pyllama_kernels.plans import PAIRS, lists, new_plan, plan_words, spans

MAX_ROUTED = 4096  # experts that a row is chosen from


class ExpertWeight(Part, frozen=True):
    """The parts of the same matrix of every expert; `{}` in the tensor's name is the expert."""

    tensor: Name
    count: Annotated[int, Meta(ge=1, le=MAX_ROUTED)]
    float_type: FloatType
    rows: Span
    cols: Span

    @property
    def each(self) -> tuple[Weight, ...]:
        """The weight of each expert."""
        return tuple(self.of(expert) for expert in range(self.count))

    def of(self, expert: int) -> Weight:
        """The weight of one expert."""
        name = self.tensor.replace("{}", str(expert))
        return Weight(name, self.float_type, self.rows, self.cols)


def _key(route: str) -> tuple[str, str]:
    """The key of a route's dispatch plan in `Memory.constants`."""
    return "plan", route


def _plan(memory: Memory, route: str) -> I64:
    plan: I64 = memory.constants[_key(route)]
    return plan


def _check_route(check: Check, name: str) -> None:
    """Checks that experts were chosen before, so that there is a plan for these rows."""
    require(name in check.written_routes, f"{name} is not what a route before was written to")


def _check_expert_rows(check: Check, *names: str) -> None:
    for name in names:
        require(check.find(name).rows == "experts", f"{name} has no rows for experts")


class Route(Part, Op, frozen=True, tag="route"):
    """target = the weight of each expert in a row, 0 for those that are not chosen.

    Scores are computed from the source. Scores plus bias select the experts: first the groups whose
    two best experts have the largest sum, then the `active` best experts in them. The weights are
    the scores without bias. The op also writes the dispatch plan, which lists the rows of each
    expert: see `pyllama_kernels.plans`.
    Source: modeling_glm4_moe.py of transformers; DeepSeek-V3, 2024.
    """

    source: Name
    target: Name
    bias: Weight | None
    scoring: Scoring
    active: Count
    groups: Count
    active_groups: Count
    normalize: bool
    scale: float

    def weights(self) -> tuple[Weight, ...]:
        """See `Op`."""
        return () if self.bias is None else (self.bias,)

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield shapes.like(self.target, self.source)

    def constants(self, program: Program) -> Iterator[Constant]:
        """The plan."""
        n_experts, pairs = program.n_experts, program.rows_of("experts")
        words = plan_words(n_experts, pairs)

        def make() -> I64:
            return new_plan(n_experts, pairs, np.zeros(words, np.int64))

        yield Constant(_key(self.target), 8 * words, make)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        program, experts = check.program, check.f32(self.source)
        check.same(self.source, self.target)
        check.batch_rows(self.source)
        require(isinstance(check.find(self.target), Buffer), "a route must be a buffer")
        require(0 < experts == program.n_experts, f"{self.source} is not one number an expert")
        require(experts <= MAX_ROUTED, f"{experts} experts, at most {MAX_ROUTED}")
        if self.bias is not None:
            check.weight(self.bias, (1, experts), FloatType.F32)
        active = program.n_active_experts
        require(self.active == active, "another number of experts is active")
        require(experts % self.groups == 0, "groups are not whole")
        require(self.active_groups <= self.groups, "more groups than there are")
        members = experts // self.groups
        require(self.active <= self.active_groups * members, "more experts than there are")
        require(self.groups == 1 or members >= 2, "groups of one expert")
        check.number("scale", self.scale, 0)
        check.written_routes.add(self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        bias = np.empty(0, np.float32) if self.bias is None else memory.vector(self.bias)
        source, out = memory.f32(self.source), memory.f32(self.target)
        softmax, groups = self.scoring is Scoring.SOFTMAX, (self.groups, self.active_groups)
        how = self.active, *groups, self.normalize, self.scale
        reference.route(source, bias, softmax, *how, out)
        reference.make_plan(out, self.active, _plan(memory, self.target))

    def lower(self, table: Lowering) -> list[Row]:
        """The choice, and the plan that one thread makes of it."""
        n = table.width(self.source)
        route = table.row(
            "route",
            self.target,
            Cut.ROWS,
            cost=n * self.active,
            a=table.at(self.source),
            c=table.weight(self.bias) if self.bias is not None else 0,
            n=n,
            kind=self.scoring is Scoring.SOFTMAX,
            active=self.active,
            group=self.groups,
            active_groups=self.active_groups,
            normalize=self.normalize,
            scale=self.scale,
            plan=address(_plan(table.memory, self.target)),
        )
        return [route, route | {"entry": "make_plan", "cut": Cut.ONE}]


class Dispatch(Part, Op, frozen=True, tag="dispatch"):
    """target = the rows of source, once for each expert chosen for them."""

    source: Name
    route: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield Buffer(self.target, FloatType.F32, shapes.width(self.source), "experts")

    def validate(self, check: Check) -> None:
        """See `Op`."""
        require(check.f32(self.source) == check.f32(self.target), "widths differ")
        check.batch_rows(self.source)
        _check_route(check, self.route)
        _check_expert_rows(check, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        plan = _plan(memory, self.route)
        index = lists(plan)[3][: plan[PAIRS]]
        out = memory.f32(self.target)[: plan[PAIRS]]
        reference.gather(memory.f32(self.source), index, out)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        a, n = table.at(self.source), table.width(self.source)
        plan = address(_plan(table.memory, self.route))
        return [table.row("dispatch", self.target, Cut.ROWS, cost=n, a=a, n=n, plan=plan)]


class QuantizeExperts(Part, Op, frozen=True, tag="quantize_experts"):
    """target = source, rounded to Q80; the rows of each expert become tiles of their own."""

    source: Name
    route: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        width, rows = shapes.width(self.source), shapes.rows(self.source)
        yield Buffer(self.target, FloatType.Q80, width, rows)

    def validate(self, check: Check) -> None:
        """See `Op`."""
        target = check.find(self.target)
        require(isinstance(target, Buffer), "rows for experts are in a buffer")
        require(target.float_type is FloatType.Q80, "target is not Q80")
        require(check.width(self.target) == check.f32(self.source), "widths differ")
        _check_route(check, self.route)
        _check_expert_rows(check, self.source, self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        plan = _plan(memory, self.route)
        reference.quantize_experts(memory.f32(self.source), plan, memory.q80(self.target))

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        a, n = table.at(self.source), table.width(self.source)
        plan, cut = address(_plan(table.memory, self.route)), Cut.NUMBERS
        name, target = "quantize_experts", self.target
        return [table.row(name, target, cut, cost=n, by_block=True, a=a, n=n, plan=plan)]


class ExpertMatmul(Part, Op, frozen=True, tag="expert_matmul"):
    """target = source @ weight.T, each row with the weight of its expert."""

    source: Name
    route: Name
    target: Name
    weight: ExpertWeight

    def weights(self) -> tuple[Weight, ...]:
        """See `Op`."""
        return self.weight.each

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        width = self.weight.of(0).shape[0]
        yield Buffer(self.target, FloatType.F32, width, "experts")

    def validate(self, check: Check) -> None:
        """See `Op`."""
        check_factor(check, self.source, self.weight.float_type)
        _check_route(check, self.route)
        _check_expert_rows(check, self.source, self.target)
        count, tensor = self.weight.count, self.weight.tensor
        require(tensor.count("{}") == 1, "a tensor of experts has one {} in its name")
        require(count == check.program.n_experts, "another number of experts is routed")
        shape = check.f32(self.target), check.width(self.source)
        check.weight(self.weight.of(0), shape, self.weight.float_type)
        require(shape[1] % self.weight.float_type.block == 0, "columns are not whole blocks")

    def run(self, memory: Memory) -> None:
        """The product, expert by expert."""
        out, float_type = memory.f32(self.target), self.weight.float_type
        no_bias = np.empty(0, np.float32)
        for expert, pairs, tile in spans(_plan(memory, self.route)):
            weight = self.weight.of(expert)
            if float_type is FloatType.F32:
                x: F32 | U8 = memory.f32(self.source)[pairs]
            else:
                x = memory.q80(self.source)[tile * (weight.shape[1] // BLOCK) * ROW_BYTES :]
            multiply(float_type, x, memory.matrix(weight), no_bias, out[pairs])

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        addresses = np.array([table.weight(weight) for weight in self.weight.each], np.int64)
        m, n = self.weight.of(0).shape
        return [
            table.row(
                "multiply",
                self.target,
                Cut.PRODUCTS,
                a=table.at(self.source),
                w=table.keep(addresses),
                n=n,
                m=m,
                heads=1,
                kind=self.weight.float_type,
                plan=address(_plan(table.memory, self.route)),
            )
        ]


class Combine(Part, Op, frozen=True, tag="combine"):
    """target = for each row of the batch, the sum of its experts' rows times their weights."""

    source: Name
    route: Name
    target: Name

    def outputs(self, shapes: Shapes) -> Iterator[Buffer]:
        """See `Op`."""
        yield Buffer(self.target, FloatType.F32, shapes.width(self.source))

    def validate(self, check: Check) -> None:
        """See `Op`."""
        require(check.f32(self.source) == check.f32(self.target), "widths differ")
        _check_expert_rows(check, self.source)
        _check_route(check, self.route)
        check.batch_rows(self.target)

    def run(self, memory: Memory) -> None:
        """See `Op`."""
        source, route, out = map(memory.f32, (self.source, self.route, self.target))
        active = memory.program.n_active_experts
        reference.combine(source, route, _plan(memory, self.route), active, out)

    def lower(self, table: Lowering) -> list[Row]:
        """See `Op`."""
        n, active = table.width(self.source), table.program.n_active_experts
        return [
            table.row(
                "combine",
                self.target,
                Cut.NUMBERS,
                cost=n * active,
                a=table.at(self.source),
                b=table.at(self.route),
                n=n,
                active=active,
                plan=address(_plan(table.memory, self.route)),
            )
        ]

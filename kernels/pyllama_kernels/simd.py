"""LLVM vectors with Python's operators: what the inner loops of the fast kernels are written in.

Code in these terms runs when Numba compiles a kernel, and leaves machine code behind: a Python
loop here is an unrolled loop there, and a list of vectors is a set of registers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()


@dataclass(frozen=True)
class Value:
    """A vector or scalar of the program being built."""

    asm: "Asm"
    llvm: ir.Value

    @property
    def type(self) -> Any:
        """LLVM's type of it."""
        return self.llvm.type

    def _is_float(self) -> bool:
        element = self.type.element if isinstance(self.type, ir.VectorType) else self.type
        return element in (F16, F32)

    def _binary(self, other: "Value", integer: str, floating: str = "") -> "Value":
        operation = floating if self._is_float() else integer
        return Value(self.asm, getattr(self.asm.builder, operation)(self.llvm, other.llvm))

    def __add__(self, other: "Value") -> "Value":
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: "Value") -> "Value":
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: "Value") -> "Value":
        return self._binary(other, "mul", "fmul")

    def __and__(self, other: "Value") -> "Value":
        return self._binary(other, "and_")

    def __or__(self, other: "Value") -> "Value":
        return self._binary(other, "or_")

    def __xor__(self, other: "Value") -> "Value":
        return self._binary(other, "xor")

    def __lshift__(self, other: "Value") -> "Value":
        return self._binary(other, "shl")

    def __rshift__(self, other: "Value") -> "Value":
        return self._binary(other, "lshr")

    def over(self, other: "Value") -> "Value":
        """Floats divided by floats."""
        return Value(self.asm, self.asm.builder.fdiv(self.llvm, other.llvm))

    def high_product(self, other: "Value") -> "Value":
        """The high halves of products of signed integers."""
        width = self.type.element.width
        wide = ir.VectorType(ir.IntType(2 * width), self.type.count)
        product = self.widened(wide, signed=True) * other.widened(wide, signed=True)
        return (product >> self.asm.constant(wide, width)).narrowed(self.type)

    def plus(self, count: "Value | int", size: int = 1) -> "Value":
        """An address `count` times `size` bytes further; `count` is a Value or a Python number."""
        if isinstance(count, int):
            count = self.asm.constant(I64, count)
        return self + count * self.asm.constant(I64, size)

    def bits_as(self, kind: Any) -> "Value":
        """The same bits as another type."""
        return Value(self.asm, self.asm.builder.bitcast(self.llvm, kind))

    def widened(self, kind: Any, signed: bool = False) -> "Value":
        """The same integers in a wider type."""
        convert = self.asm.builder.sext if signed else self.asm.builder.zext
        return Value(self.asm, convert(self.llvm, kind))

    def as_floats(self) -> "Value":
        """Signed integers as float32."""
        kind = ir.VectorType(F32, self.type.count)
        return Value(self.asm, self.asm.builder.sitofp(self.llvm, kind))

    def as_integers(self) -> "Value":
        """Float32 that are whole numbers as int32."""
        kind = ir.VectorType(I32, self.type.count)
        return Value(self.asm, self.asm.builder.fptosi(self.llvm, kind))

    def narrowed(self, kind: Any) -> "Value":
        """The low bits of integers, as a narrower type."""
        return Value(self.asm, self.asm.builder.trunc(self.llvm, kind))

    def larger(self, other: "Value") -> "Value":
        """The larger of two floats, lane by lane; which one of NaN and a number is open."""
        is_larger = self.asm.builder.fcmp_ordered(">", self.llvm, other.llvm)
        return Value(self.asm, self.asm.builder.select(is_larger, self.llvm, other.llvm))

    def across(self, operation: str) -> "Value":
        """All lanes of integers in one: "add" or "umax"; of floats: "fmax"."""
        name = f"llvm.vector.reduce.{operation}.{_suffix(self.type)}"
        kind = ir.FunctionType(self.type.element, [self.type])
        function = cgutils.get_or_insert_function(self.asm.builder.module, kind, name)
        flags = ("nnan",) if self._is_float() else ()
        return Value(self.asm, self.asm.builder.call(function, [self.llvm], fastmath=flags))

    def sum_across(self) -> "Value":
        """The sum of all lanes of floats, halves added to halves."""
        total, lanes = self, self.type.count
        while lanes > 1:
            lanes //= 2
            total = total.part(*range(lanes)) + total.part(*range(lanes, 2 * lanes))
        return Value(self.asm, self.asm.builder.extract_element(total.llvm, ir.Constant(I32, 0)))

    def halves_as_floats(self, in_hardware: bool = True) -> "Value":
        """The bits of float16 as float32; finite ones only where the CPU has no instruction."""
        floats = ir.VectorType(F32, self.type.count)
        if in_hardware:
            halves = self.bits_as(ir.VectorType(F16, self.type.count))
            return Value(self.asm, self.asm.builder.fpext(halves.llvm, floats))
        kind = ir.VectorType(I32, self.type.count)
        wide, number = self.widened(kind), partial(self.asm.constant, kind)
        magnitude = (wide & number(0x7FFF)) << number(13)
        # The exponent is off by 112; a multiplication mends it for subnormal numbers too.
        value = magnitude.bits_as(floats) * self.asm.constant(floats, 2.0**112)
        sign = (wide & number(0x8000)) << number(16)
        return (value.bits_as(kind) | sign).bits_as(floats)

    def part(self, *lanes: int) -> "Value":
        """Some lanes, in this order."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        return Value(self.asm, self.asm.builder.shuffle_vector(self.llvm, self.llvm, mask))

    def lanes_with(self, other: "Value", *lanes: int) -> "Value":
        """Some lanes of this vector and, numbered on, of another one."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        return Value(self.asm, self.asm.builder.shuffle_vector(self.llvm, other.llvm, mask))


@dataclass(frozen=True)
class Asm:
    """Where a kernel's instructions go."""

    builder: ir.IRBuilder

    def constant(self, kind: Any, value: float) -> Value:
        """A constant; of a vector, the same in every lane."""
        if isinstance(kind, ir.VectorType):
            lanes = [ir.Constant(kind.element, value)] * kind.count
            return Value(self, ir.Constant(kind, lanes))
        return Value(self, ir.Constant(kind, value))

    def _pointer(self, kind: Any, address: Value, offset: int) -> Any:
        start = self.builder.inttoptr(address.llvm, I8.as_pointer())
        place = self.builder.gep(start, [ir.Constant(I64, offset)])
        return self.builder.bitcast(place, kind.as_pointer())

    def load(self, kind: Any, address: Value, offset: int = 0) -> Value:
        """What lies so many bytes after an address, at any alignment."""
        return Value(self, self.builder.load(self._pointer(kind, address, offset), align=1))

    def store(self, value: Value, address: Value, offset: int = 0) -> None:
        """Puts it so many bytes after an address, at any alignment."""
        place = self._pointer(value.type, address, offset)
        self.builder.store(value.llvm, place, align=1)

    def splat(self, scalar: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        kind = ir.VectorType(scalar.type, lanes)
        first = self.builder.insert_element(
            ir.Constant(kind, ir.Undefined), scalar.llvm, ir.Constant(I32, 0)
        )
        mask = ir.Constant(ir.VectorType(I32, lanes), [ir.Constant(I32, 0)] * lanes)
        return Value(
            self, self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)
        )

    def call(self, name: str, result: Any, *arguments: Value | bool) -> Value:
        """An LLVM intrinsic; a Python bool is an `i1` that LLVM must know."""
        values = [
            ir.Constant(ir.IntType(1), int(a)) if isinstance(a, bool) else a.llvm for a in arguments
        ]
        kind = ir.FunctionType(result, [value.type for value in values])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Value(self, self.builder.call(function, values))

    def fused(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the CPU can."""
        return self.call(f"llvm.fmuladd.{_suffix(a.type)}", a.type, a, b, c)

    def prefetch(self, address: Value, offset: int, near: int = 2) -> None:
        """Asks for a cache line.

        Args:
            address: what the offset counts from.
            offset: bytes.
            near: LLVM's locality. 2: in the second level; 3: in the first; 0: in the first, and
                out of the others' way, since it is read once.
        """
        place = self._pointer(I8, address, offset)
        kind = ir.FunctionType(VOID, [place.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        read, locality, data = (ir.Constant(I32, i) for i in (0, near, 1))
        self.builder.call(function, [place, read, locality, data])

    def variable(self, value: Value) -> "Variable":
        """A register that a loop changes."""
        return Variable(self, cgutils.alloca_once_value(self.builder, value.llvm))

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """A loop of the machine's; gives the index."""
        with cgutils.for_range(self.builder, count.llvm, intp=I64) as loop:
            yield Value(self, loop.index)


@dataclass(frozen=True)
class Variable:
    """A place that LLVM turns into a register."""

    asm: Asm
    place: ir.Value

    def get(self) -> Value:
        """What it holds."""
        return Value(self.asm, self.asm.builder.load(self.place))

    def set(self, value: Value) -> None:
        """Changes it."""
        self.asm.builder.store(value.llvm, self.place)


def _suffix(kind: Any) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    return {F32: "f32", F16: "f16"}.get(kind) or f"i{kind.width}"

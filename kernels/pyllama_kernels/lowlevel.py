"""What Numba lacks: bit casts, pointers from addresses, atomics, and a polite spin.

Each function here is one or two LLVM instructions.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pyllama_kernels.simd import Asm, Value

LINE = 64  # bytes that come from memory together

_i64 = ir.IntType(64)


@intrinsic
def bits_of_float(typingctx, value):
    """The bits of a float32, as uint32."""
    if value != types.float32:
        return None

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def float_of_bits(typingctx, value):
    """The float32 with the given bits (any integer; its low 32 bits count)."""
    if not isinstance(value, types.Integer):
        return None

    def codegen(context, builder, signature, args):
        bits = args[0]
        if bits.type.width > 32:
            bits = builder.trunc(bits, ir.IntType(32))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), codegen


def _pointer_to(numba_type):
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), codegen

    return pointer


float32_pointer = _pointer_to(types.float32)
float64_pointer = _pointer_to(types.float64)
int8_pointer = _pointer_to(types.int8)
int32_pointer = _pointer_to(types.int32)
uint16_pointer = _pointer_to(types.uint16)
uint8_pointer = _pointer_to(types.uint8)
int64_pointer = _pointer_to(types.int64)


def _element(context, builder, array_type, array, index):
    """Pointer to `array[index]` of a one-dimensional int64 array."""
    data = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, data, [index], wraparound=False)


@intrinsic
def atomic_load(typingctx, array, index):
    """`array[index]`, with everything that was written before it."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args)
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def atomic_store(typingctx, array, index, value):
    """`array[index] = value`, after everything that was written before."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx, array, index, value):
    """Adds to `array[index]` and returns what was there before."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def address_of(typingctx, array):
    """The address of an array's first element."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _i64)

    return types.int64(array), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx, nbytes):
    """The address of so many bytes (a literal) of the function's own stack, at a cache line."""
    if not isinstance(nbytes, types.IntegerLiteral):
        return None
    size = nbytes.literal_value

    def codegen(context, builder, signature, args):
        # Not `alloca_once`, which writes zeros: LLVM takes seconds over those of some KiB.
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(ir.IntType(8), size))
        room.align = 64
        return builder.ptrtoint(room, _i64)

    return types.int64(nbytes), codegen


@intrinsic
def prefetch(typingctx, address):
    """Asks for the cache line at an address, to be near in the second level."""

    def codegen(context, builder, signature, args):
        Asm(builder).prefetch(Value(Asm(builder), args[0]), 0)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "AMD64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (ir.Constant(ir.IntType(32), 1),)),
    "arm64": ("llvm.aarch64.hint", (ir.Constant(ir.IntType(32), 1),)),
}.get(platform.machine())


@intrinsic
def pause(typingctx):
    """Tells the core that this is a spin loop."""

    def codegen(context, builder, signature, args):
        if _PAUSE is not None:
            name, operands = _PAUSE
            kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, operands)
        return context.get_dummy_value()

    return types.void(), codegen


# From the C library of the running process.
sched_yield = types.ExternalFunction("sched_yield", types.intc())
usleep = types.ExternalFunction("usleep", types.intc(types.uintc))

"""float16, which Numba does not know: its bits to float32 and back, rounded to the nearest even."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from typing import Any

from llvmlite import ir
from numba import float32, types, uint32
from numba.extending import intrinsic

from pyllama_kernels.cpu import features
from pyllama_kernels.jit import kernel
from pyllama_kernels.lowlevel import bits_of_float, float_of_bits


@kernel
def half_to_float_in_software(half: Any) -> Any:
    """The value of a float16, given as its bits; infinities and NaN included."""
    magnitude = uint32(half & 0x7FFF) << uint32(13)
    # The exponent is off by 112; a multiplication mends it for subnormal numbers too.
    value = float_of_bits(magnitude) * float32(2.0**112)
    if magnitude >= uint32(0x0F800000):
        value = float_of_bits(magnitude | uint32(0x7F800000))
    return float_of_bits(bits_of_float(value) | (uint32(half & 0x8000) << uint32(16)))


@kernel
def float_to_half_in_software(value: Any) -> Any:
    """The bits of the nearest float16, ties to even; beyond the largest: infinity."""
    bits = bits_of_float(value)
    sign = (bits >> uint32(16)) & uint32(0x8000)
    bits &= uint32(0x7FFFFFFF)
    if bits > uint32(0x7F800000):
        half = uint32(0x7E00)
    elif bits >= uint32(0x477FF000):  # 65520 and above round to infinity
        half = uint32(0x7C00)
    elif bits < uint32(0x38800000):
        # Subnormal: adding 0.5 leaves the rounded value in the low bits.
        half = bits_of_float(float_of_bits(bits) + float32(0.5)) - uint32(0x3F000000)
    else:
        odd = (bits >> uint32(13)) & uint32(1)
        half = (bits - uint32(0x38000000) + uint32(0xFFF) + odd) >> uint32(13)
    return sign | half


@intrinsic
def _half_to_float_in_hardware(typingctx, half):
    def codegen(context, builder, signature, args):
        bits = args[0]
        if bits.type.width > 16:
            bits = builder.trunc(bits, ir.IntType(16))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

    return types.float32(half), codegen


@intrinsic
def _float_to_half_in_hardware(typingctx, value):
    def codegen(context, builder, signature, args):
        half = builder.fptrunc(args[0], ir.HalfType())
        return builder.bitcast(half, ir.IntType(16))

    return types.uint16(types.float32), codegen


# LLVM would call a library for the conversion where the CPU has no instruction for it.
IN_HARDWARE = bool(features() & {"f16c", "neon"})

half_to_float = _half_to_float_in_hardware if IN_HARDWARE else half_to_float_in_software
float_to_half = _float_to_half_in_hardware if IN_HARDWARE else float_to_half_in_software

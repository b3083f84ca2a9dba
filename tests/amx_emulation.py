"""AMX instructions for a CPU that has none, so that the kernel made of them runs all the same.

Such a CPU raises SIGILL at each of them. The handler here, a function that Numba compiled, reads
the instruction, does to memory and to tiles of its own what it says, and steps over it. What it
does not know, or would fault, ends the process as SIGILL always does.

The tiles exist once: one thread at a time may use them. What is left out: a start row (after a page
fault), STTILECFG, TDP* other than TDPBF16PS, and tiles of rows longer than 64 bytes.

TDPBF16PS rounds each sum to nearest even; what is denormal counts as zero, before and after. A
product is rounded before it is added, which matters only where the product is denormal.

Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, the six
instructions and chapter 2 (VEX, ModR/M, SIB); Linux, asm/sigcontext.h and asm/ucontext.h.
"""

import ctypes
import signal

import numpy as np
from numba import carray, cfunc, float32, int64, njit, types, uint32

from pyllama_kernels.lowlevel import (
    float32_pointer,
    float_of_bits,
    int8_pointer,
    int32_pointer,
    int64_pointer,
    uint8_pointer,
    uint16_pointer,
)

_TILES, _ROWS, _ROW = 8, 16, 64  # registers, rows of one, bytes of a row
_TILE = _ROWS * _ROW

# State: the tiles, their shape as LDTILECFG gave it (64 bytes), two rows of sums, a counter.
_state = np.zeros(_TILES * _TILE + 64 + 2 * _ROW + 8, np.uint8)
_AT = _state.ctypes.data
_SHAPES = _AT + _TILES * _TILE
_SUMS = _SHAPES + 64
_COUNT = _SUMS + 2 * _ROW

# Where Linux puts registers 0 (rax) to 15 in a ucontext, in words of 8 bytes.
_PLACES = (18, 19, 17, 16, 20, 15, 14, 13, 5, 6, 7, 8, 9, 10, 11, 12)
_RIP = 21
_TINY = np.float32(2.0**-126)  # what is smaller is denormal

_signal = types.ExternalFunction("signal", types.int64(types.intc, types.int64))


@njit
def _byte(address):
    return int64(carray(uint8_pointer(address), (1,))[0])


@njit
def _offset(address, size):
    """A signed number of 0, 1 or 4 bytes in an instruction."""
    if size == 1:
        return int64(carray(int8_pointer(address), (1,))[0])
    return int64(carray(int32_pointer(address), (1,))[0]) if size == 4 else int64(0)


@njit
def _register(context, number):
    return carray(int64_pointer(context), (22,))[_PLACES[number]]


@njit
def _shape(tile):
    """Rows, and bytes of a row; 0 of what has none."""
    width = carray(uint16_pointer(_SHAPES + 16), (_TILES,))[tile]
    return int64(_byte(_SHAPES + 48 + tile)), int64(width)


@njit
def _memory(context, code):
    """What ModR/M and SIB say: address, bytes between rows, length of the instruction."""
    mod, low = _byte(code + 4) >> 6, _byte(code + 4) & 7
    extended = ~_byte(code + 1)
    end, stride = code + 5, int64(0)
    size = (int64(0), int64(1), int64(4))[mod]
    number = low | (extended >> 5 & 1) << 3
    if low == 4:
        sib = _byte(end)
        end += 1
        low = sib & 7
        number = low | (extended >> 5 & 1) << 3
        index = sib >> 3 & 7 | (extended >> 6 & 1) << 3
        if index != 4:
            stride = _register(context, index) << (sib >> 6)
        if low == 5 and mod == 0:
            return _offset(end, 4), stride, end + 4 - code
    elif low == 5 and mod == 0:
        return end + 4 + _offset(end, 4), stride, end + 4 - code  # from the next instruction on
    start = _register(context, number)
    return start + _offset(end, size), stride, end + size - code


@njit
def _clear(first, count):
    tiles = carray(uint8_pointer(first), (count,))
    for i in range(count):
        tiles[i] = 0


@njit
def _configure(address):
    source, shapes = carray(uint8_pointer(address), (64,)), carray(uint8_pointer(_SHAPES), (64,))
    for i in range(64):
        shapes[i] = source[i]
    _clear(_AT, _TILES * _TILE)
    for tile in range(_TILES):
        rows, width = _shape(tile)
        if source[0] != 1 or rows > _ROWS or width > _ROW:
            return False
    return True


@njit
def _load(tile, address, stride):
    rows, width = _shape(tile)
    _clear(_AT + tile * _TILE, _TILE)
    for row in range(rows):
        source = carray(uint8_pointer(address + row * stride), (_ROW,))
        target = carray(uint8_pointer(_AT + tile * _TILE + row * _ROW), (_ROW,))
        for i in range(width):
            target[i] = source[i]


@njit
def _store(tile, address, stride):
    rows, width = _shape(tile)
    for row in range(rows):
        source = carray(uint8_pointer(_AT + tile * _TILE + row * _ROW), (_ROW,))
        target = carray(uint8_pointer(address + row * stride), (_ROW,))
        for i in range(width):
            target[i] = source[i]


@njit
def _flushed(value):
    return value * float32(0) if abs(value) < _TINY else value


@njit
def _number(half):
    """A bf16 as float32."""
    return _flushed(float_of_bits(uint32(half) << uint32(16)))


@njit
def _multiply(out, a, b):
    """out += a * b: each sum is that of the even inputs plus that of the odd ones."""
    rows, width = _shape(out)
    for row in range(rows):
        left = carray(uint16_pointer(_AT + a * _TILE + row * _ROW), (32,))
        even = carray(float32_pointer(_SUMS), (16,))
        odd = carray(float32_pointer(_SUMS + _ROW), (16,))
        even[:], odd[:] = 0, 0
        for k in range(_shape(a)[1] // 4):
            right = carray(uint16_pointer(_AT + b * _TILE + k * _ROW), (32,))
            for i in range(width // 4):
                even[i] = _flushed(even[i] + _number(left[2 * k]) * _number(right[2 * i]))
                odd[i] = _flushed(odd[i] + _number(left[2 * k + 1]) * _number(right[2 * i + 1]))
        sums = carray(float32_pointer(_AT + out * _TILE + row * _ROW), (16,))
        for i in range(width // 4):
            sums[i] = _flushed(_flushed(sums[i]) + _flushed(even[i] + odd[i]))


@njit
def _fit(out, a, b):
    """Whether three tiles have the shapes of a product."""
    rows, width = _shape(out)
    distinct = out != a and out != b and a != b
    return distinct and rows > 0 and _shape(a) == (rows, 4 * _shape(b)[0]) and _shape(b)[1] == width


@njit
def _emulate(context, code):
    """Length of the instruction there, once it is done; 0: it is none of those known here."""
    # Three bytes of VEX: C4; R, X, B (inverted) and map 0F38; W, vvvv (inverted), L, prefix.
    if _byte(code) != 0xC4 or _byte(code + 1) & 0x1F != 2 or _byte(code + 2) & 0x84:
        return 0
    prefix = _byte(code + 2) & 3  # none, 66, F3, F2
    third = ~_byte(code + 2) >> 3 & 15
    opcode, mod = _byte(code + 3), _byte(code + 4) >> 6
    tile, second = _byte(code + 4) >> 3 & 7, _byte(code + 4) & 7
    if not _byte(code + 1) & 0x80:
        return 0  # there are eight tiles only

    if opcode == 0x5C and prefix == 2 and mod == 3 and third < _TILES:
        if not _byte(code + 1) & 0x20 or not _fit(tile, second, third):
            return 0
        _multiply(tile, second, third)
        carray(int64_pointer(_COUNT), (1,))[0] += 1
        return 5
    if third:
        return 0
    if opcode == 0x49 and prefix == 0 and mod == 3 and tile == 0 and second == 0:
        _clear(_AT, _TILES * _TILE + 64)  # TILERELEASE
        return 5
    if opcode == 0x49 and prefix == 0 and mod != 3 and tile == 0:
        address, _, length = _memory(context, code)
        return length if _configure(address) else 0
    if _shape(tile)[0] == 0:
        return 0
    if opcode == 0x49 and prefix == 3 and mod == 3 and second == 0:
        _clear(_AT + tile * _TILE, _TILE)  # TILEZERO
        return 5
    if opcode == 0x4B and prefix != 0 and mod != 3 and second == 4:
        address, stride, length = _memory(context, code)
        if prefix == 2:
            _store(tile, address, stride)
        else:
            _load(tile, address, stride)
        return length
    return 0


@cfunc(types.void(types.intc, types.int64, types.int64))
def _handler(number, info, context):
    registers = carray(int64_pointer(context), (22,))
    length = _emulate(context, registers[_RIP])
    if length:
        registers[_RIP] += length
    else:
        _signal(number, 0)  # the default action, as soon as the instruction is tried again


class _Action(ctypes.Structure):
    """glibc's struct sigaction on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO = 4


def install() -> None:
    """From now on this process has AMX."""
    libc = ctypes.CDLL(None, use_errno=True)
    action = _Action(handler=_handler.address, flags=_SA_SIGINFO)
    if libc.sigaction(int(signal.SIGILL), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction")


def products() -> int:
    """How many TDPBF16PS were done here."""
    return int(_state[_COUNT - _AT :].view(np.int64)[0])

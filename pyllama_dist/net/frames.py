"""Bytes of the wire: control messages as msgpack maps, exchanges with a head of 16 bytes."""

import struct
from typing import Any

import msgpack
import msgspec

from pyllama_dist.errors import ProtocolError
from pyllama_dist.net.messages import Message
from pyllama_dist.program import Op, ops_by_tag

MAX_CONTROL = 1 << 20  # bytes of a control frame; unpacked it may take a hundred times that
MAX_RAW = 1 << 20  # bytes of a raw frame
HARD_LIMIT = 4 << 20  # ZeroMQ drops a public connection that sends a larger frame
MAX_DATA = 64 << 20  # bytes of an exchange

HEAD = 16  # bytes before the data of an exchange
_HEAD = struct.Struct(">BBIBIBI")
_ARRAY_OF_3, _UINT32, _BIN32 = 0x93, 0xCE, 0xC6


def encode(message: Message) -> bytes:
    """A control frame."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    return packed


def decode(frame: bytes | memoryview) -> Message:
    """The message in a control frame, checked in full.

    Raises:
        ProtocolError: the frame is too large, not msgpack, or not a message.
    """
    if len(frame) > MAX_CONTROL:
        raise ProtocolError(
            f"a control frame of {len(frame)} bytes is above the limit of {MAX_CONTROL}"
        )
    try:
        plain: Any = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * 4096,  # bytes; characters are counted with the types
            max_bin_len=16,
            max_array_len=1 << 16,
            max_map_len=32,
            max_ext_len=0,
        )
        message: Message = msgspec.convert(
            plain, Message, builtin_types=(bytes,), dec_hook=_decode_op
        )
        return message
    except msgspec.ValidationError as error:
        raise ProtocolError(f"a frame is not a message of this protocol: {error}") from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is not msgpack: {error}") from None


def _decode_op(kind: type, plain: Any) -> Op:
    """The op that a map in a program stands for: called for what msgspec does not know."""
    if kind is not Op or not isinstance(plain, dict):
        raise ValueError(f"{type(plain).__name__} is no op")
    tag = plain.get("type")
    known = ops_by_tag()
    if not isinstance(tag, str) or tag not in known:
        raise ValueError(f"there is no op {tag!r}")
    op: Op = msgspec.convert(plain, known[tag], builtin_types=(bytes,))
    return op


def write_head(frame: memoryview, step: int, sync: int) -> None:
    """Writes the head of an exchange into the first 16 bytes of its frame."""
    length = len(frame) - HEAD
    _HEAD.pack_into(frame, 0, _ARRAY_OF_3, _UINT32, step, _UINT32, sync, _BIN32, length)


def check_head(frame: memoryview, received: int, step: int, sync: int) -> None:
    """Checks that `frame` holds the exchange that was expected, in full.

    Args:
        frame: as long as the expected frame.
        received: bytes of the frame that came; more than `frame` holds were cut off.
        step: number of the step.
        sync: place of the sync in the program.

    Raises:
        ProtocolError: it is another exchange, or of another length.
    """
    if received != len(frame):
        raise ProtocolError(f"an exchange has {received} bytes instead of {len(frame)}")
    expected = (_ARRAY_OF_3, _UINT32, step, _UINT32, sync, _BIN32, len(frame) - HEAD)
    found = _HEAD.unpack_from(frame)
    if found != expected:
        raise ProtocolError(
            f"out of step: expected step {step} sync {sync}, received step {found[2]} sync "
            f"{found[4]}"
        )

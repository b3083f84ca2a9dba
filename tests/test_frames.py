"""Whatever comes over the wire becomes a message or a ProtocolError, and takes little doing so."""

import binascii
import math
import struct
import tracemalloc
from contextlib import suppress

import msgpack
import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from pyllama_dist.config import FloatType
from pyllama_dist.errors import ProtocolError
from pyllama_dist.net.frames import (
    HEAD,
    MAX_CONTROL,
    check_frame,
    check_raw,
    checksum,
    decode,
    encode,
    seal,
    unseal,
    write_head,
)
from pyllama_dist.net.messages import (
    Allocated,
    AskUsage,
    Bound,
    Bye,
    Error,
    Hello,
    Join,
    Link,
    Meshed,
    Message,
    Net,
    NodeInfo,
    Peers,
    Phase,
    Ready,
    Step,
    Usage,
    WeightPart,
    WeightsEnd,
    Welcome,
)
from pyllama_dist.program import Batch, Program
from pyllama_dist.validate import check_program

KINDS = Message.__args__

texts = st.text(max_size=40) | st.just("x" * 4096)
sessions = st.binary(min_size=16, max_size=16)
int64s = st.integers(-(2**63), 2**63 - 1)
sizes = st.integers(0, 1 << 48)
nodes = st.integers(0, 255)
names = st.binary(min_size=16, max_size=16).map(lambda name: "@pyllama-dist-" + name.hex())
endpoints = st.tuples(st.integers(1, 65535), names | st.just(""))
endpoints = st.lists(endpoints, max_size=256).map(tuple)
widths = st.lists(st.integers(0, 1 << 24), max_size=20).map(tuple)
timeouts = st.floats(0, 86400, exclude_min=True)
infos = st.builds(
    NodeInfo, st.integers(1, 4096), st.integers(1, 4096), sizes, texts, texts, sessions
)

EMPTY = Program(
    n_nodes=1, node=0, max_rows=1, max_logits=1, n_experts=0, n_active_experts=0,
    n_seqs=1, n_blocks=1, seq_len=1,
    pipes=(), buffers=(), caches=(), segments=(),
)  # fmt: skip


@pytest.fixture(scope="module")
def programs(tiny):
    """Of both kinds of nodes, with quantized weights and with plain ones."""
    return [
        *tiny(weights=FloatType.Q40, n_layers=1).programs(2, sync=FloatType.Q80),
        *tiny(n_layers=1).programs(1),
    ]


messages = st.one_of(
    st.builds(Hello, int64s, texts, sessions),
    st.builds(Welcome, int64s, texts, sessions, infos),
    st.builds(Join, nodes, st.integers(2, 256)),
    st.builds(Bound, endpoints),
    st.builds(Peers, st.lists(texts, max_size=256).map(tuple), endpoints),
    st.builds(Link, sessions, nodes),
    st.just(Meshed()),
    st.builds(Net, st.just(EMPTY), texts, timeouts),
    st.builds(Allocated, sizes),
    st.builds(WeightPart, st.integers(0, 1 << 24), sizes, st.integers(0, 2**32 - 1)),
    st.just(WeightsEnd()),
    st.just(Ready()),
    st.builds(Step, st.integers(0, 2**32 - 1), st.builds(Batch, widths, widths, widths)),
    st.just(Bye()),
    st.builds(Error, st.sampled_from(Phase), texts, texts),
)

EXAMPLES = {
    Hello: Hello(1, "0.1.0", bytes(range(16))),
    Welcome: Welcome(1, "0.1.0", bytes(16), NodeInfo(4, 8, 1 << 33, "avx2", "a CPU", bytes(16))),
    Join: Join(1, 2),
    Bound: Bound(((1234, "@pyllama-dist-" + 32 * "a"), (65535, ""))),
    Peers: Peers(("the root", "10.0.0.2:9990"), ((4000, ""),)),
    Link: Link(bytes(16), 255),
    Meshed: Meshed(),
    Net: Net(EMPTY, "auto", 60.0),
    Allocated: Allocated(1 << 30),
    WeightPart: WeightPart(7, 1 << 20, 2**32 - 1),
    WeightsEnd: WeightsEnd(),
    Ready: Ready(),
    Step: Step(2**32 - 1, Batch((0, 1), (31, 0), (1,))),
    AskUsage: AskUsage(),
    Usage: Usage(1.5, 0.25, 1 << 40, 1 << 33),
    Bye: Bye(),
    Error: Error(Phase.NET, "no room", "10.0.0.2:9990"),
}


def decoded(packed: bytes) -> Message | None:
    """The message, or None if the frame was refused as it should be: in one line.

    Whoever means harm knows how to make a checksum.
    """
    try:
        return decode(seal(packed))
    except ProtocolError as refusal:
        reason = str(refusal)
    assert "\n" not in reason
    return None


# --- what is said is understood


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_travels(kind):
    message = EXAMPLES[kind]
    frame = encode(message)
    assert decode(frame) == message
    assert type(decode(memoryview(frame))) is kind
    assert msgpack.unpackb(unseal(frame))["type"] == kind.__struct_config__.tag


@given(messages)
def test_what_is_encoded_is_decoded(message):
    assert decode(encode(message)) == message


def test_programs_travel(programs):
    for program in programs:
        net = Net(program, "auto", 0.5)
        assert decode(encode(net)) == net


def test_the_least_and_the_most_are_understood():
    for message in (
        Net(EMPTY, "auto", 86400.0),
        Error(Phase.BYE, "ŋ" * 4096),
        Peers(("",) * 256, ((1, ""),) * 256),
        Step(0, Batch((0,) * 65536, (1 << 24,) * 65536, ())),
    ):
        assert decode(encode(message)) == message


# --- what is not understood is refused


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "hello"},
        {"protocol": 1, "version": "", "session": bytes(16)},
        {"type": "gossip"},
        {"type": 7},
        {"type": "bye", "extra": 1},
        {"type": "hello", "protocol": "1", "version": "", "session": bytes(16)},
        {"type": "hello", "protocol": 1.0, "version": "", "session": bytes(16)},
        {"type": "hello", "protocol": True, "version": "", "session": bytes(16)},
        {"type": "hello", "protocol": 1, "version": None, "session": bytes(16)},
        {"type": "hello", "protocol": 1, "version": "x" * 4097, "session": bytes(16)},
        {"type": "hello", "protocol": 1, "version": "", "session": bytes(15)},
        {"type": "hello", "protocol": 1, "version": "", "session": bytes(17)},
        {"type": "hello", "protocol": 1, "version": "", "session": "0123456789abcdef"},
        {"type": "welcome", "protocol": 1, "version": "", "n_threads": 0, "memory": 0},
        {"type": "welcome", "protocol": 1, "version": "", "n_threads": 1, "memory": -1},
        {"type": "join", "node": 256, "n_nodes": 256},
        {"type": "join", "node": 1, "n_nodes": 257},
        {"type": "bound", "endpoints": [[0, ""]]},
        {"type": "bound", "endpoints": [[65536, ""]]},
        {"type": "bound", "endpoints": [[1]]},
        {"type": "bound", "endpoints": [[1, "@another-program"]]},
        {"type": "bound", "endpoints": [[1, "/tmp/@pyllama-dist-" + 32 * "0"]]},
        {"type": "bound", "endpoints": [[1, "@pyllama-dist-" + 33 * "0"]]},
        {"type": "bound", "endpoints": [[1, "@pyllama-dist-" + 32 * "0" + "\n"]]},
        {"type": "bound", "endpoints": [[1, ""]] * 257},
        {"type": "bound", "endpoints": 1},
        {"type": "bound", "endpoints": {"0": [1, ""]}},
        {"type": "peers", "addresses": ["a:1"] * 257, "endpoints": []},
        {"type": "allocated", "nbytes": (1 << 48) + 1},
        {"type": "weight", "index": -1, "offset": 0, "checksum": 0},
        {"type": "weight", "index": (1 << 24) + 1, "offset": 0, "checksum": 0},
        {"type": "weight", "index": 0, "offset": (1 << 48) + 1, "checksum": 0},
        {"type": "weight", "index": 0, "offset": 0, "checksum": 1 << 32},
        {"type": "weight", "index": 0, "offset": 0},
        {"type": "step", "number": 1 << 32, "batch": {"seqs": [], "positions": [], "logits": []}},
        {"type": "step", "number": 1, "batch": {"seqs": [-1], "positions": [], "logits": []}},
        {"type": "step", "number": 1, "batch": {"seqs": [], "positions": []}},
        {"type": "step", "number": 1, "batch": None},
        {"type": "error", "phase": "LUNCH", "message": "", "culprit": ""},
        {"type": "error", "phase": "NET", "message": "x" * 4097, "culprit": ""},
    ],
    ids=str,
)
def test_fields_out_of_bounds_are_refused(fields):
    with pytest.raises(ProtocolError, match=r"not a message|not msgpack"):
        decode(seal(msgpack.packb(fields)))


@pytest.mark.parametrize("timeout", [0.0, -1.0, 86401.0, math.nan, math.inf, -math.inf, "1", None])
def test_a_timeout_is_a_bounded_number(timeout):
    plain = msgspec.to_builtins(Net(EMPTY, "auto", 1.0)) | {"timeout": timeout}
    with pytest.raises(ProtocolError):
        decode(seal(msgpack.packb(plain)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("field", ["epsilon", "theta"])
def test_numbers_that_are_none_do_not_pass_the_check_of_a_program(programs, field, value):
    def changed(op):
        return replace(op, **{field: value}) if hasattr(op, field) else op

    program = replace(
        programs[0],
        segments=tuple(
            replace(segment, ops=tuple(map(changed, segment.ops)))
            for segment in programs[0].segments
        ),
    )
    net = decode(encode(Net(program, "auto", 1.0)))
    with pytest.raises(ProtocolError, match=field):
        check_program(net.program)


@pytest.mark.parametrize("changes", [{"n_nodes": 0}, {"node": -1}, {"max_rows": 1 << 25},
                                     {"seq_len": 0}, {"pipes": None}, {"pipe": []},
                                     {"caches": [{"name": "", "kv_heads": 1, "head_dim": 1}]},
                                     {"buffers": [{"name": "b", "float_type": 9, "width": 1}]},
                                     {"segments": [{"name": "s", "ops": [{"type": "jump"}]}]}],
                         ids=str)  # fmt: skip
def test_fields_of_a_program_are_bounded(changes):
    plain = msgspec.to_builtins(Net(EMPTY, "auto", 1.0))
    plain["program"] |= changes
    with pytest.raises(ProtocolError, match="not a message"):
        decode(seal(msgpack.packb(plain)))


def test_lists_above_the_limit_are_refused():
    step = Step(1, Batch((0,) * 65537, (0,) * 65537, ()))
    with pytest.raises(ProtocolError, match="65537 exceeds max_array_len"):
        decode(encode(step))


def test_a_frame_above_the_limit_is_refused():
    with pytest.raises(ProtocolError, match=f"limit of {MAX_CONTROL}"):
        decode(bytes(MAX_CONTROL + 1))


def test_a_key_that_comes_twice_is_no_way_around_a_check():
    twice = b"\x83\xa4type\xa4join\xa4node\x01\xa4node\xcd\x01\x00"
    assert decoded(twice + b"\xa7n_nodes\x02") is None
    assert decoded(b"\x82\xa4type\xa5ready\xa4type\xa3bye") in (None, Bye())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x80",
        b"\x90",
        unseal(encode(Bye())).tobytes() + b"\x00",
        unseal(encode(Bye())).tobytes()[:-1],
        msgpack.packb({b"type": b"bye"}),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": "bye", (): 1}),
        msgpack.packb(["bye"]),
        msgpack.packb({"type": msgpack.ExtType(1, b"")}),
        msgpack.packb({"type": "bound", "endpoints": msgpack.ExtType(5, b"")}),
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x81\xa4type\xa3\xff\xff\xff",
        b"\x81\xa4type\xd9\xffbye",
        b"\x81\xd8" + bytes(17) + b"\xc0",
        struct.pack(">BI", 0xDF, 0xFFFFFFFF),
        struct.pack(">BI", 0xDD, 0xFFFFFFFF),
        struct.pack(">BI", 0xDB, 0xFFFFFFFF),
        struct.pack(">BI", 0xC6, 0xFFFFFFFF),
        struct.pack(">BI", 0xC9, 0xFFFFFFFF),
    ],
)
def test_other_bytes_are_refused(frame):
    assert decoded(frame) is None


HOSTILE = {
    "arrays in arrays": b"\x91" * (1 << 20),
    "maps in maps": b"\x81\xa1a" * (1 << 18),
    "long arrays in long arrays": b"\xdc\xff\xff" * 20_000,
    "longest arrays in arrays": b"\xdd\x00\x01\x00\x00" * 20_000,
    "a long array that ends early": b"\xdd\x00\x01\x00\x00",
    "endpoints without end": b"\x82\xa4type\xa5bound\xa9endpoints\xdd\x00\x01\x00\x00"
    + b"\x01" * 65536,
    "a map for each byte": b"\xdc\xff\xff" + b"\x80" * 65535,
    "text for each byte": b"\xdc\xff\xff" + b"\xa0" * 65535,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_take_little_memory(name):
    tracemalloc.start()
    try:
        assert decoded(HOSTILE[name]) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_do_no_harm(frame):
    decoded(frame)


@settings(max_examples=150)
@given(
    st.recursive(
        st.none() | st.booleans() | int64s | st.floats() | texts | st.binary(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(
                st.sampled_from(("type", "endpoints", "batch", "program", "seqs", "")),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    )
)
def test_random_msgpack_does_no_harm(value):
    decoded(msgpack.packb(value))


@settings(max_examples=300)
@given(st.sampled_from(list(EXAMPLES.values())), st.data())
def test_damaged_frames_do_no_harm(message, data):
    frame = bytearray(unseal(encode(message)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert"))):
            case "set":
                frame[place] = data.draw(st.integers(0, 255))
            case "cut" if len(frame) > 1:
                del frame[place]
            case "insert":
                frame.insert(place, data.draw(st.integers(0, 255)))
    found = decoded(bytes(frame))
    if found is not None:
        assert decode(encode(found)) == found


@settings(max_examples=150)
@given(st.data())
def test_damaged_programs_do_no_harm(programs, data):
    frame = bytearray(unseal(encode(Net(data.draw(st.sampled_from(programs)), "auto", 60.0))))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    found = decoded(bytes(frame))
    if isinstance(found, Net):
        with suppress(ProtocolError):
            check_program(found.program)


# --- checksums


def changes(data: st.DataObject, sent: bytes) -> bytes:
    """What a bad link makes of some bytes: up to 16 in a row are changed, gone, or come twice."""
    first = data.draw(st.integers(0, len(sent) - 1))
    last = data.draw(st.integers(first + 1, first + 16))
    damaged = sent[first:last]
    after = sent[last:]
    match data.draw(st.sampled_from(("change", "drop", "repeat"))):
        case "change":
            masks = data.draw(st.binary(min_size=len(damaged), max_size=len(damaged)))
            damaged = bytes(byte ^ mask for byte, mask in zip(damaged, masks, strict=True))
        case "drop":
            damaged = b""
        case "repeat":
            damaged += damaged
    return sent[:first] + damaged + after


@settings(max_examples=300)
@given(st.sampled_from(list(EXAMPLES.values())), st.data())
def test_a_control_frame_that_a_link_has_changed_is_refused(message, data):
    sent = encode(message)
    came = changes(data, sent)
    assume(came != sent)
    with pytest.raises(ProtocolError, match="does not match its checksum"):
        decode(came)


def test_a_control_frame_of_a_version_without_checksums_is_told_so():
    with pytest.raises(ProtocolError, match="another version of pyllama-dist"):
        decode(msgpack.packb({"type": "bye"}))


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=200), st.binary(min_size=16, max_size=16), st.data())
def test_a_data_frame_that_a_link_has_changed_is_refused(sent, after, data):
    """Bytes that are gone let those of the next frame move up."""
    frame = exchange(7, 8, 1, sent)
    came = (changes(data, bytes(frame)) + after)[: len(frame)]
    assume(came != frame)
    with pytest.raises(ProtocolError):
        check_frame(memoryview(came), len(frame), 7, 8, 1)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_raw_frame_that_a_link_has_changed_is_refused(sent, data):
    expected = checksum(sent)
    check_raw(sent, expected)
    came = changes(data, sent)
    assume(came != sent)
    with pytest.raises(ProtocolError, match="does not match its checksum"):
        check_raw(memoryview(came), expected)


# --- heads of exchanges

uint32s = st.integers(0, 2**32 - 1)
rounds = st.integers(0, 127)


def exchange(step: int, sync: int, number: int, data: bytes) -> memoryview:
    frame = memoryview(bytearray(HEAD) + bytearray(data))
    write_head(frame, step, sync, number)
    return frame


@given(uint32s, uint32s, rounds, st.binary(max_size=100))
def test_an_exchange_is_valid_msgpack(step, sync, number, data):
    frame = exchange(step, sync, number, data)
    assert msgpack.unpackb(frame) == [step, sync, number, binascii.crc32(data), data]
    check_frame(frame, len(frame), step, sync, number)


@pytest.mark.parametrize("bit", range(8 * (HEAD + 4)))
def test_a_flipped_bit_in_an_exchange_is_noticed(bit):
    frame = exchange(0x01020304, 77, 3, b"data")
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        check_frame(frame, len(frame), 0x01020304, 77, 3)


places = st.tuples(uint32s, uint32s, rounds)


@given(places, places)
def test_another_step_sync_or_round_is_named(place, other):
    assume(place != other)
    frame = exchange(*other, b"data")
    (step, sync, number), (other_step, other_sync, other_number) = place, other
    complaint = (
        f"expected step {step} sync {sync} round {number}, "
        f"received step {other_step} sync {other_sync} round {other_number}"
    )
    with pytest.raises(ProtocolError, match=complaint):
        check_frame(frame, len(frame), *place)


@pytest.mark.parametrize("received", [0, 21, 22, 25, 27, 1 << 20])
def test_an_exchange_of_another_length_is_refused(received):
    frame = exchange(1, 2, 0, b"data")
    with pytest.raises(ProtocolError, match=f"{received} bytes instead of 26"):
        check_frame(frame, received, 1, 2, 0)

"""The control messages, as in `PROTOCOL.md`. Bounds in the types are checked on arrival."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from pyllama_dist.program import Batch, Program

PROTOCOL = 6  # version of the protocol

Text = Annotated[str, Meta(max_length=4096)]
Port = Annotated[int, Meta(ge=1, le=65535)]
SocketName = Annotated[str, Meta(pattern=r"^(@pyllama-dist-[0-9a-f]{32})?\Z")]
Endpoints = Annotated[tuple[tuple[Port, SocketName], ...], Meta(max_length=256)]
NodeIndex = Annotated[int, Meta(ge=0, le=255)]
Count = Annotated[int, Meta(ge=1, le=4096)]
Size = Annotated[int, Meta(ge=0, le=1 << 48)]
Seconds = Annotated[float, Meta(ge=0)]
Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Phase(StrEnum):
    """Where a session stands."""

    HELLO = "HELLO"
    PEERS = "PEERS"
    NET = "NET"
    WEIGHTS = "WEIGHTS"
    READY = "READY"
    STEP = "STEP"
    BYE = "BYE"


class _Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all control messages."""


class Hello(_Message, frozen=True, tag="hello"):
    """Root: the versions it speaks, and the id of the new session."""

    protocol: int
    version: Text
    session: Bytes16


class NodeInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """The resources of a node."""

    n_threads: Count  # that compute
    cores: Count  # that it may use
    memory: Size  # bytes available
    kernels: Text  # the set that it runs
    cpu: Text
    machine: Bytes16  # equal where nodes share memory


class Welcome(_Message, frozen=True, tag="welcome"):
    """Worker: the versions it speaks, its identity and its resources."""

    protocol: int
    version: Text
    worker: Bytes16  # chosen by chance when it starts: equal if one worker has two addresses
    info: NodeInfo


class Join(_Message, frozen=True, tag="join"):
    """Root: the worker's place among the nodes."""

    node: NodeIndex
    n_nodes: Annotated[int, Meta(ge=2, le=256)]


class Bound(_Message, frozen=True, tag="bound"):
    """Worker: an endpoint for each lower node."""

    endpoints: Endpoints


class Peers(_Message, frozen=True, tag="peers"):
    """Root: where all nodes are, and the endpoints of the higher ones."""

    addresses: Annotated[tuple[Text, ...], Meta(max_length=256)]
    endpoints: Endpoints


class Link(_Message, frozen=True, tag="link"):
    """Both ends of a data connection: who they are."""

    session: Bytes16
    node: NodeIndex


class Meshed(_Message, frozen=True, tag="meshed"):
    """Worker: all its data connections stand."""


class Net(_Message, frozen=True, tag="net"):
    """Root: what to run, how sums travel, and the seconds that a round of an exchange may take."""

    program: Program
    collective: Text  # see `net.collectives`
    timeout: Annotated[float, Meta(gt=0, le=86400)]


class Allocated(_Message, frozen=True, tag="allocated"):
    """Worker: it has room for the weights."""

    nbytes: Size


class WeightPart(_Message, frozen=True, tag="weight"):
    """Root: the raw frame that follows belongs into this weight at this byte."""

    index: Annotated[int, Meta(ge=0, le=1 << 24)]
    offset: Size
    checksum: Annotated[int, Meta(ge=0, lt=1 << 32)]  # of the raw frame


class WeightsEnd(_Message, frozen=True, tag="weights_end"):
    """Root: that was all."""


class Ready(_Message, frozen=True, tag="ready"):
    """Worker: it can step."""


class Step(_Message, frozen=True, tag="step"):
    """Root: run the program once."""

    number: Annotated[int, Meta(ge=0, lt=1 << 32)]
    batch: Batch


class AskUsage(_Message, frozen=True, tag="ask_usage"):
    """Root: what have the steps of this session cost?"""


class Usage(_Message, frozen=True, tag="usage"):
    """Worker: what they have cost this node."""

    compute_seconds: Seconds
    sync_seconds: Seconds  # waiting for others included
    bytes_moved: Size  # by exchanges, sent and received
    peak_bytes: Size  # memory of the process, at most since it began


class Bye(_Message, frozen=True, tag="bye"):
    """Root: the session is over."""


class Error(_Message, frozen=True, tag="error"):
    """Either: the session is over, and why."""

    phase: Phase
    message: Text
    culprit: Text = ""


Message = (
    Hello
    | Welcome
    | Join
    | Bound
    | Peers
    | Link
    | Meshed
    | Net
    | Allocated
    | WeightPart
    | WeightsEnd
    | Ready
    | Step
    | AskUsage
    | Usage
    | Bye
    | Error
)

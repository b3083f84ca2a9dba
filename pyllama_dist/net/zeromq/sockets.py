"""What all our sockets have in common: options, deadlines, and an eye on their connections."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from pyllama_dist import errors
from pyllama_dist.net import frames as wire
from pyllama_dist.net.messages import Message
from pyllama_dist.net.transport import Raw

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]
Watched = tuple[Socket, int]  # a socket, and whether it is to be read or written

CLOSED = "its connection closed, or it fell silent"

CONNECT_SECONDS = 5.0
SEND_SECONDS = 60.0
GOODBYE_MS = 500  # for a last message to leave, and for one that explains a closed connection
WEIGHTS_AHEAD = 8  # raw frames that wait in a socket: memory of up to 8 MiB on each side

LOST = zmq.EVENT_DISCONNECTED
REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_HEARTBEAT_MS, _SILENCE_MS = 2_000, 10_000
_NAP = 0.25  # seconds

# Not every system has it.
yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))

# As numbers: pyzmq's names cost 1 us each time they are used.
NOBLOCK, _EVENTS, _POLLIN = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)


def open_context() -> Context:
    """A context whose I/O threads run under SCHED_BATCH, so that they do not preempt others.

    When a frame comes, libzmq's I/O thread need not preempt a thread that computes: the frame is
    not read before that thread is done. Measured with 4 nodes of one thread on two cores: 19 % more
    tokens/s, since the I/O thread then moves several frames each time it wakes up; with 2 nodes,
    4 %.
    """
    context = zmq.Context()
    if _may_use_batch():
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
    return context


def _may_use_batch() -> bool:
    """Whether SCHED_BATCH is permitted: libzmq aborts the process if it is not."""
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError:
        return False
    return True


def open_socket(context: Context, kind: int, limit: int, events: int) -> tuple[Socket, Socket]:
    """A socket with our options, and the monitor that reports these events of its connections.

    Raises:
        NodeError: the process may not open more files.
    """
    try:
        socket = context.socket(kind)
    except zmq.ZMQError as error:
        raise _exhausted(error) from None
    socket.linger = 0
    socket.ipv6 = True
    socket.immediate = 1
    socket.heartbeat_ivl = _HEARTBEAT_MS
    socket.heartbeat_timeout = _SILENCE_MS
    socket.maxmsgsize = limit
    try:
        return socket, socket.get_monitor_socket(events)
    except zmq.ZMQError as error:
        socket.close()
        raise _exhausted(error) from None


def _exhausted(error: zmq.ZMQError) -> errors.NodeError:
    return errors.NodeError(f"cannot open a socket: {error}; raise the limit (ulimit -n)")


def close_socket(socket: Socket, monitor: Socket, linger: int = 0) -> None:
    """Closes a socket; `linger` gives what was sent some milliseconds to leave."""
    socket.disable_monitor()
    monitor.close(linger=0)  # or the context waits for it without end
    socket.close(linger=linger)


def bind(socket: Socket, host: str, port: int) -> int:
    """Binds and returns the port, which ZeroMQ chooses if it is 0.

    Raises:
        NodeError: the port is taken, or the host is not this machine's.
    """
    try:
        socket.bind(f"tcp://{f'[{host}]' if ':' in host else host}:{port or '*'}")
    except zmq.ZMQError as error:
        remedy = (
            "another worker may be running; choose another --port, or 0 for any free one"
            if error.errno == zmq.EADDRINUSE
            else "is that an address of this machine?"
        )
        raise errors.NodeError(f"cannot listen on {host}:{port}: {error}; {remedy}") from None
    url = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    return int(url.rpartition(":")[2])


def connect(socket: Socket, url: str) -> None:
    """Begins to connect.

    Raises:
        NodeError: the address cannot be one.
    """
    try:
        socket.connect(url)
    except zmq.ZMQError as error:
        raise errors.NodeError(f"cannot connect to {url}: {error}; is the address right?") from None


def readable(socket: Socket) -> bool:
    """Whether a frame has come."""
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def poll(watched: Sequence[Watched], deadline: float | None) -> set[Socket]:
    """Those of the sockets that are ready; none at the deadline (`time.monotonic`).

    Waits in short naps: a signal that comes just before a wait begins does not end it, and is seen
    only when the wait is over.
    """
    while True:
        left = _NAP if deadline is None else min(_NAP, max(0.0, deadline - time.monotonic()))
        ready = {id(socket) for socket, _ in zmq.zmq_poll(list(watched), math.ceil(left * 1000))}
        if ready or (deadline is not None and time.monotonic() >= deadline):
            return {socket for socket, _ in watched if id(socket) in ready}


def events(monitor: Socket) -> Iterator[tuple[int, int]]:
    """What a monitor has to tell: events, and the connections (file descriptors) they concern."""
    while monitor.poll(0):
        message = recv_monitor_message(monitor)
        yield message["event"], message["value"]


def parse(frames: Sequence[zmq.Frame]) -> tuple[Message, Raw]:
    """A control message and its raw frame, which is empty if it has none.

    Raises:
        ProtocolError: it is neither.
    """
    if not 1 <= len(frames) <= 2:
        raise errors.ProtocolError(f"a message of {len(frames)} frames, expected 1 or 2")
    message = wire.decode(frames[0].buffer)
    raw: Raw = frames[1].buffer if len(frames) == 2 else b""
    if len(raw) > wire.MAX_RAW:
        raise errors.ProtocolError(
            f"a raw frame of {len(raw)} bytes is above the limit of {wire.MAX_RAW}"
        )
    return message, raw

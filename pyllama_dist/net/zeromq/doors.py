"""Where a node waits for another one's data connection: a port and, for those beside it, a name.

Through a name, frames need none of TCP's work. Measured with 4 nodes of one thread on two cores:
2 % more tokens/s while their memory is slow, 8 % while it is fast.
"""

import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from pyllama_dist.errors import NodeError
from pyllama_dist.net.transport import Address, Door
from pyllama_dist.net.zeromq.sockets import Socket, bind

_FILES = 1 << 14  # that a process with a name must be able to open


def open_door(socket: Socket, host: str, ports: Sequence[int] = (0,)) -> Door:
    """Binds to a port and, where the system has them, to a random name.

    Args:
        socket: what is bound.
        host: name or address of the interface.
        ports: the first of these that is free; 0: any free one.

    Raises:
        NodeError: none is free, or the host is not this machine's.
    """
    for port in ports[:-1]:
        with suppress(NodeError):
            return bind(socket, host, port), _bind_name(socket)
    try:
        return bind(socket, host, ports[-1]), _bind_name(socket)
    except NodeError as error:
        if len(ports) == 1 and not ports[0]:
            raise
        raise NodeError(
            f"no port is free in --data-ports {ports[0]}-{ports[-1]}: {error}; a worker takes one "
            f"for the root and for each worker named before it"
        ) from None


def endpoint(host: str, door: Door) -> str:
    """The way to a door, as ZeroMQ writes it."""
    port, name = door
    return f"ipc://{name}" if name and _is_known(name) else f"tcp://{Address(host, port)}"


def _bind_name(socket: Socket) -> str:
    """The name; empty if there is none."""
    if sys.platform != "linux" or not _may_open_many():
        return ""
    name = f"@pyllama-dist-{secrets.token_hex(16)}"  # @: in the kernel's memory, not in a folder
    try:
        socket.bind(f"ipc://{name}")
    except zmq.ZMQError:
        return ""
    return name


def _may_open_many() -> bool:
    """Whether nobody will exhaust this process's files by accident.

    libzmq 4.3.5 ends the process if somebody comes to a name while it may open no more; at a port
    he is only turned away. (Tried; `ipc_listener.cpp`, `accept`.)
    """
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, hard))
    return hard >= _FILES


def _is_known(name: str) -> bool:
    """Whether the name is one of this process's network namespace: see unix(7).

    Nobody has to say who is on which machine. A name that is random is known on one alone, and
    there to all but containers with a network of their own.
    """
    try:
        return name in Path("/proc/net/unix").read_text()
    except (OSError, ValueError):
        return False

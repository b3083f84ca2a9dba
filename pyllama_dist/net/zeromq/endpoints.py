"""Endpoints of data connections: a TCP port and, for peers on the same host, a Unix socket.

The Unix socket is an abstract one, known by its name. It saves the work of TCP: with 4 nodes of one
thread on two cores, 2 % more tokens/s while memory is slow, 8 % while it is fast.
"""

import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from pyllama_dist.errors import NodeError
from pyllama_dist.net.transport import Address, Endpoint
from pyllama_dist.net.zeromq.sockets import Socket, bind

_FILES = 1 << 14  # open files that a process with a Unix socket must be allowed


def bind_endpoint(socket: Socket, host: str, ports: Sequence[int] = (0,)) -> Endpoint:
    """Binds to a TCP port and, on Linux, to an abstract Unix socket of a random name.

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


def url(host: str, endpoint: Endpoint) -> str:
    """An endpoint of a host as ZeroMQ writes it: `ipc://...` for peers on the same host, or `tcp://...`."""
    port, name = endpoint
    return f"ipc://{name}" if name and _is_known(name) else f"tcp://{Address(host, port)}"


def _bind_name(socket: Socket) -> str:
    """Binds to an abstract Unix socket; returns its name, or "" if there is none."""
    if sys.platform != "linux" or not _may_open_many():
        return ""
    name = f"@pyllama-dist-{secrets.token_hex(16)}"  # @: in the kernel's memory, not in a folder
    try:
        socket.bind(f"ipc://{name}")
    except zmq.ZMQError:
        return ""
    return name


def _may_open_many() -> bool:
    """Whether the limit of open files is too high to be reached by accident.

    At that limit, libzmq 4.3.5 aborts the process when a peer connects to a Unix socket; on a TCP
    port it only refuses the peer. (Tried; `ipc_listener.cpp`, `accept`.)
    """
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, hard))
    return hard >= _FILES


def _is_known(name: str) -> bool:
    """Whether the name exists in this process's network namespace: see unix(7).

    As names are random, a name that exists here belongs to a peer on the same host. A container
    with a network namespace of its own does not see it and takes the TCP port.
    """
    try:
        return name in Path("/proc/net/unix").read_text()
    except (OSError, ValueError):
        return False

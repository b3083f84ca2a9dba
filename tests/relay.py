"""A TCP relay between nodes that damages what it carries, on command.

A link is one listening port whose connections are passed on to a target. `through` makes workers
whose data connections all come through the relay too: they announce the relay's ports instead of
their own, and no Unix sockets, as behind a port forwarding.
"""

import contextlib
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "cut",  # both directions of the connection end
    "half-close",  # this direction ends; the other goes on
    "freeze",  # this direction carries nothing more, and stays open
    "corrupt",  # up to `size` bytes are changed
    "drop",  # up to `size` bytes are left out
    "duplicate",  # up to `size` bytes come twice
    "garbage",  # `size` random bytes come in between
    "delay",  # everything waits `seconds`
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
HOST = "127.0.0.1"

# A worker whose `bound` names ports of the relay. It asks for each with a line "i-j port".
_WORKER = """
import socket
from pyllama_dist.cli import main
from pyllama_dist.net.zeromq.mesh import ZmqMesh

bind = ZmqMesh.bind

def through_relay(mesh, nodes):
    node, own = len(nodes), bind(mesh, nodes)
    with socket.create_connection(("{host}", {port})) as relay, relay.makefile("rw") as lines:
        for lower, (port, _) in zip(nodes, own):
            lines.write(f"{{lower}}-{{node}} {{port}}\\n")
        lines.flush()
        return [(int(lines.readline()), "") for _ in own]

ZmqMesh.bind = through_relay
main()
"""


@dataclass(frozen=True)
class Fault:
    """What happens to one direction of a link, once.

    Attributes:
        kind: what happens.
        after: bytes that pass before, counted from when the fault is set.
        size: bytes that are damaged.
        seconds: of a delay.
        seed: of the bytes that are made up.
    """

    kind: Kind
    after: int = 0
    size: int = 16
    seconds: float = 1.0
    seed: int = 0

    def damage(self, data: bytes) -> bytes:
        """What becomes of these bytes, which are at most `size`."""
        made_up = random.Random(self.seed)
        match self.kind:
            case "corrupt":
                return bytes(byte ^ made_up.randint(1, 255) for byte in data)
            case "drop":
                return b""
            case "duplicate":
                return data + data
            case "garbage":
                return made_up.randbytes(self.size) + data
            case _:
                return data


class Direction:
    """One way of a link: what all its connections carry from one end to the other."""

    def __init__(self) -> None:
        self.carried = 0  # bytes so far
        self.happened: list[Fault] = []
        self._fault: Fault | None = None
        self._lock = threading.Lock()

    def set(self, fault: Fault) -> None:
        """This is to happen, instead of what was set before."""
        with self._lock:
            self._fault = fault

    def meet(self, size: int) -> Fault | None:
        """Counts bytes that came; the fault that is among them, with `after` within them."""
        with self._lock:
            self.carried += size
            fault, self._fault = self._fault, None
            if fault is not None and fault.after >= size:
                self._fault, fault = replace(fault, after=fault.after - size), None
            if fault is not None:
                self.happened.append(fault)
            return fault


class Link:
    """A port that passes its connections on."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.forth = Direction()  # from who connects to who listens
        self.back = Direction()
        self._target = target
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="relay")]
        self._threads[0].start()

    @property
    def directions(self) -> tuple[Direction, Direction]:
        return self.forth, self.back

    def close(self) -> None:
        """Cuts all connections, and takes no more."""
        self._ended.set()
        _shut(self._listener)
        self._listener.close()
        self._threads[0].join()
        for end in self._sockets:
            _shut(end)
        for thread in self._threads[1:]:
            thread.join()
        for end in self._sockets:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    _shut(near)
                    continue
                self._sockets.append(far)
                for way, source, sink in ((self.forth, near, far), (self.back, far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    pump = threading.Thread(target=self._pump, args=(way, source, sink))
                    self._threads.append(pump)
                    pump.start()

    def _pump(self, way: Direction, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if (fault := way.meet(len(data))) is None:
                    sink.sendall(data)
                    continue
                first, last = fault.after, fault.after + fault.size
                sink.sendall(data[:first])
                match fault.kind:
                    case "cut":
                        break
                    case "half-close":
                        sink.shutdown(socket.SHUT_WR)
                        while source.recv(1 << 16):
                            pass
                        return
                    case "freeze":
                        self._ended.wait()
                        return
                    case "delay":
                        self._ended.wait(fault.seconds)
                sink.sendall(fault.damage(data[first:last]) + data[last:])
        _shut(source)
        _shut(sink)


class Relay:
    """Links by name: "0-1" is the data link of nodes 0 and 1; public ones are named by their user.

    A context: at its end nothing is open.
    """

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self._listener = socket.create_server((HOST, 0))
        self._thread = threading.Thread(target=self._serve, name="relay")
        self._thread.start()

    @property
    def worker(self) -> list[str]:
        """The command of a worker whose data connections come through this relay."""
        port = self._listener.getsockname()[1]
        return [sys.executable, "-c", _WORKER.format(host=HOST, port=port)]

    def link(self, name: str, target: tuple[str, int]) -> Link:
        """A new link; one of the same name, of a session before, is closed."""
        if before := self.links.get(name):
            before.close()
        self.links[name] = Link(target)
        return self.links[name]

    def public(self, name: str, address: str) -> str:
        """The address at which a worker is reached through a new link."""
        host, _, port = address.rpartition(":")
        return f"{HOST}:{self.link(name, (host, int(port))).port}"

    def wait(self, names: Sequence[str], carried: int, timeout: float = 60.0) -> None:
        """Waits until these links have carried so many bytes, forth and back."""
        deadline = time.monotonic() + timeout
        while not all(self._carried(name) >= carried for name in names):
            assert time.monotonic() < deadline, {name: self._carried(name) for name in names}
            time.sleep(0.01)

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self._thread.join()
        for link in self.links.values():
            link.close()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _carried(self, name: str) -> int:
        link = self.links.get(name)
        return 0 if link is None else sum(way.carried for way in link.directions)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile() as asked:
                    for line in asked:
                        name, port = line.split()
                        connection.sendall(b"%d\n" % self.link(name, (HOST, int(port))).port)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)

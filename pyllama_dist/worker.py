"""A worker: it serves one root after the other, and knows nothing of models.

The phases and messages are those of `net/PROTOCOL.md`.
"""

import gc
import logging
import secrets
from typing import TypeVar

import numpy as np

import pyllama_dist.ops  # noqa: F401 - the ops that programs are made of
from pyllama_dist import __version__
from pyllama_dist.errors import NodeError, ProtocolError, PyllamaError
from pyllama_dist.executor import Executor, make_executor
from pyllama_dist.executor.memory import planned_bytes
from pyllama_dist.memory_use import memory_here, resident_bytes
from pyllama_dist.net.collectives import ALGORITHMS, AUTO
from pyllama_dist.net.frames import check_raw
from pyllama_dist.net.messages import (
    PROTOCOL,
    Allocated,
    AskUsage,
    Bound,
    Bye,
    Error,
    Hello,
    Join,
    Meshed,
    Message,
    Net,
    Peers,
    Phase,
    Ready,
    Step,
    Usage,
    WeightPart,
    WeightsEnd,
    Welcome,
)
from pyllama_dist.net.transport import Address, Channel, Listener, LostError, Mesh, Raw
from pyllama_dist.node import Node
from pyllama_dist.node_info import node_info
from pyllama_dist.validate import check_batch, check_program

log = logging.getLogger("pyllama_dist")

_TALK_SECONDS = 20.0  # between messages while nodes get to know each other: the root's come first
_GREET_SECONDS = 15.0
_LOAD_SECONDS = 300.0  # between messages while weights are sent: other workers may be slower

_M = TypeVar("_M")


class _RootSaidBye(Exception):
    """The session is over in good order."""


def serve(listener: Listener, n_threads: int) -> None:
    """Serves roots until the listener is closed or the process is interrupted.

    Args:
        listener: where roots knock.
        n_threads: threads that compute, at least 1.
    """
    worker = secrets.token_bytes(16)
    while True:
        channel, first = listener.accept()
        _Session(worker, channel, listener.mesh(), n_threads).run(first)
        gc.collect()  # weights of the last session go before those of the next one come


class _Session:
    """One root, from its hello until it leaves."""

    def __init__(self, worker: bytes, channel: Channel, mesh: Mesh, n_threads: int) -> None:
        self.worker = worker
        self.channel, self.mesh, self.n_threads = channel, mesh, n_threads
        self.phase = Phase.HELLO
        self.last: Error | None = None  # why the session is over, for the root

    def run(self, first: Message) -> None:
        """Goes through the phases; whatever happens, the worker can serve the next root."""
        try:
            session = self.hello(first)
            node, n_nodes = self.peers(session)
            net = self.net(node, n_nodes)
            with make_executor(net.program, self.n_threads) as executor:
                self.weights(executor)
                self.steps(Node(net.program, executor, self.mesh, net.timeout, net.collective))
        except _RootSaidBye:
            log.info("the root said bye; listening again")
        except KeyboardInterrupt:
            self.last = Error(self.phase, "it was ended; start it again, then this root")
            raise
        except LostError as lost:
            log.warning("%s, in phase %s; listening again", lost, self.phase)
            self.last = Error(self.phase, lost.detail[:4096], lost.culprit)
        except PyllamaError as error:
            log.warning("%s, in phase %s; listening again", error, self.phase)
            self.last = Error(self.phase, str(error)[:4096])
        except MemoryError:
            log.warning("out of memory, in phase %s; listening again", self.phase)
            reason = "out of memory; use more nodes or a lower --max-seq-len"
            self.last = Error(self.phase, reason)
        except Exception as error:  # a worker outlives its roots, whatever they send
            log.exception("internal error in phase %s; listening again", self.phase)
            self.last = Error(self.phase, f"internal error: {type(error).__name__}: {error}"[:4096])
        finally:
            self.channel.close(self.last)  # before the mesh: the root is to hear the reason first
            self.mesh.close()

    def expect(self, kind: type[_M], timeout: float) -> _M:
        """The next message, which must be of this kind."""
        return self.of_kind(kind, self.channel.receive(timeout)[0])

    def of_kind(self, kind: type[_M], message: Message) -> _M:
        """The message, if it is of this kind.

        Raises:
            NodeError: the root ended the session with an error.
            ProtocolError: it is of another kind.
        """
        if isinstance(message, kind):
            return message
        match message:
            case Bye():
                raise _RootSaidBye
            case Error():
                raise NodeError(f"the root gave up: {message.message}")
            case _:
                found, wanted = type(message).__name__, kind.__name__
                raise ProtocolError(f"received {found}, expected {wanted}")

    def hello(self, first: Message) -> bytes:
        """HELLO: exchanges versions and identities with the root."""
        hello = self.of_kind(Hello, first)
        if hello.protocol != PROTOCOL:
            raise ProtocolError(
                f"the root speaks protocol {hello.protocol} (pyllama-dist {hello.version}), this "
                f"worker {PROTOCOL} (pyllama-dist {__version__}); install the same version on both"
            )
        info = node_info(self.n_threads)
        self.channel.send(Welcome(PROTOCOL, __version__, self.worker, info))
        return hello.session

    def peers(self, session: bytes) -> tuple[int, int]:
        """PEERS: connections with all others. Returns this node's place, and how many there are."""
        self.phase = Phase.PEERS
        join = self.expect(Join, _TALK_SECONDS)
        if not 0 < join.node < join.n_nodes:
            raise ProtocolError(f"node {join.node} of {join.n_nodes} is no worker")
        endpoints = self.mesh.bind(range(join.node))
        self.channel.send(Bound(tuple(endpoints)))
        peers = self.expect(Peers, _TALK_SECONDS)
        higher = range(join.node + 1, join.n_nodes)
        if len(peers.addresses) != join.n_nodes or len(peers.endpoints) != len(higher):
            raise ProtocolError(
                f"{len(peers.addresses)} addresses, {len(peers.endpoints)} endpoints"
            )
        self.mesh.connect(
            {
                node: (Address.parse(peers.addresses[node]).host, endpoint)
                for node, endpoint in zip(higher, peers.endpoints, strict=True)
            }
        )
        self.mesh.greet(session, join.node, peers.addresses, _GREET_SECONDS)
        self.channel.send(Meshed())
        log.info("node %d of %d, root %s", join.node, join.n_nodes, self.channel.address)
        return join.node, join.n_nodes

    def net(self, node: int, n_nodes: int) -> Net:
        """NET: the program, checked before anything is allocated."""
        self.phase = Phase.NET
        net = self.of_kind(Net, self.mesh.wait(self.channel, _LOAD_SECONDS)[0])
        if (net.program.node, net.program.n_nodes) != (node, n_nodes):
            raise ProtocolError(
                f"node {node} of {n_nodes} was sent the program of node {net.program.node} of "
                f"{net.program.n_nodes}"
            )
        if net.collective not in (AUTO, *ALGORITHMS):
            raise ProtocolError(f"collective {net.collective!r} is unknown")
        check_program(net.program)
        needed, available = planned_bytes(net.program), memory_here().available
        if needed > available:
            raise NodeError(
                f"needs {needed / 1e9:.2f} GB, {available / 1e9:.2f} GB are available; use more "
                f"nodes, or a lower --max-seq-len"
            )
        return net

    def weights(self, executor: Executor) -> None:
        """WEIGHTS: each weight in its place, in order and without gaps."""
        held = executor.memory.weights
        self.channel.send(Allocated(sum(weight.size for weight in held)))
        self.phase = Phase.WEIGHTS
        filled = [0] * len(held)
        while True:
            message, raw = self.mesh.wait(self.channel, _LOAD_SECONDS)
            if isinstance(message, WeightsEnd):
                break
            part = self.of_kind(WeightPart, message)
            self.take(part, raw, executor, filled)
        missing = [i for i, weight in enumerate(held) if filled[i] != weight.size]
        if missing:
            raise ProtocolError(f"{len(missing)} of {len(held)} weights are incomplete")
        self.phase = Phase.READY
        log.info("holding %.1f MB of weights", sum(filled) / 1e6)
        self.channel.send(Ready())

    @staticmethod
    def take(part: WeightPart, raw: Raw, executor: Executor, filled: list[int]) -> None:
        """Puts a part of a weight in its place."""
        held = executor.memory.weights
        if part.index >= len(held):
            raise ProtocolError(f"weight {part.index} of {len(held)}")
        end = part.offset + len(raw)
        if not raw:
            raise ProtocolError(f"weight {part.index} came without its bytes")
        check_raw(raw, part.checksum)
        if part.offset != filled[part.index] or end > held[part.index].size:
            raise ProtocolError(
                f"weight {part.index}: bytes {part.offset} to {end} after {filled[part.index]} of "
                f"{held[part.index].size}"
            )
        held[part.index][part.offset : end] = np.frombuffer(raw, np.uint8)
        filled[part.index] = end
        if end == held[part.index].size:
            executor.memory.settle(part.index)

    def steps(self, node: Node) -> None:
        """STEP after STEP, until the root says bye."""
        while True:
            message, _ = self.mesh.wait(self.channel, None)
            if isinstance(message, AskUsage):
                spent = node.spent
                self.channel.send(
                    Usage(
                        spent.compute_seconds,
                        spent.sync_seconds,
                        spent.bytes_moved,
                        resident_bytes(peak=True),
                    )
                )
                continue
            step = self.of_kind(Step, message)
            self.phase = Phase.STEP
            check_batch(node.program, step.batch, node.executor.memory.table)
            node.step(step.number, step.batch)
            self.phase = Phase.READY

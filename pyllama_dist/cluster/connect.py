"""Phases HELLO and PEERS: who is there, what each node has, and connections between all of them."""

import secrets
from collections.abc import Sequence

from pyllama_dist import __version__
from pyllama_dist.errors import NodeError, ProtocolError, UsageError
from pyllama_dist.net.messages import (
    PROTOCOL,
    Bound,
    Hello,
    Join,
    Meshed,
    NodeInfo,
    Peers,
    Phase,
    Welcome,
)
from pyllama_dist.net.transport import ROOT, Address, Dialer, Endpoint, LostError
from pyllama_dist.workers import Workers

_HELLO_SECONDS = 15.0
_GREET_SECONDS = 15.0
_PEERS_SECONDS = 20.0  # workers that miss each other for as long as a greeting may take can say so


def connect(workers: Workers, dialer: Dialer, addresses: Sequence[Address]) -> dict[str, NodeInfo]:
    """Connects all nodes with each other.

    Args:
        workers: told its channels and its mesh as they come to be.
        dialer: how workers are reached.
        addresses: where they listen, in the order of nodes.

    Returns:
        What each worker has, by name.

    Raises:
        UsageError: two addresses are one worker's.
        NodeError: a worker cannot be reached, or refuses.
        LostError: one is lost.
    """
    session = secrets.token_bytes(16)
    nodes = _hello(workers, dialer, addresses, session)
    _peers(workers, dialer, addresses, session)
    return nodes


def _hello(
    workers: Workers, dialer: Dialer, addresses: Sequence[Address], session: bytes
) -> dict[str, NodeInfo]:
    workers.begin(Phase.HELLO, _HELLO_SECONDS)
    for address in addresses:
        workers.channels.append(dialer.connect(address))
        if not workers.seconds_left:
            raise LostError(f"not connected after {_HELLO_SECONDS:.0f} s", str(address))
    workers.tell(Hello(PROTOCOL, __version__, session))
    known: dict[bytes, str] = {}
    nodes: dict[str, NodeInfo] = {}
    for channel in workers.channels:
        name = channel.address
        welcome = workers.expect(channel, Welcome)
        if welcome.protocol != PROTOCOL:
            raise NodeError(
                f"worker {name} speaks protocol {welcome.protocol} (pyllama-dist "
                f"{welcome.version}), this root {PROTOCOL} (pyllama-dist {__version__}); "
                f"install the same version on both"
            )
        if (other := known.setdefault(welcome.worker, name)) != name:
            raise UsageError(
                f"--workers names one worker twice: {other} and {name} are the same; a worker is "
                f"one node"
            )
        nodes[name] = welcome.info
    return nodes


def _peers(workers: Workers, dialer: Dialer, addresses: Sequence[Address], session: bytes) -> None:
    workers.begin(Phase.PEERS, _PEERS_SECONDS)
    n_nodes = len(addresses) + 1
    names = (ROOT, *map(str, addresses))
    endpoints: dict[int, tuple[Endpoint, ...]] = {}  # by worker: where each lower node reaches it
    for node, channel in enumerate(workers.channels, start=1):
        channel.send(Join(node, n_nodes))
        endpoints[node] = workers.expect(channel, Bound).endpoints
        if len(endpoints[node]) != node:
            raise ProtocolError(f"{channel.address} opened {len(endpoints[node])} endpoints")
    for node, channel in enumerate(workers.channels, start=1):
        higher = range(node + 1, n_nodes)
        channel.send(Peers(names, tuple(endpoints[peer][node] for peer in higher)))
    workers.mesh = dialer.mesh()
    workers.mesh.connect(
        {peer: (addresses[peer - 1].host, endpoints[peer][0]) for peer in range(1, n_nodes)}
    )
    workers.mesh.greet(session, 0, names, min(_GREET_SECONDS, workers.seconds_left))
    workers.expect_all(Meshed)

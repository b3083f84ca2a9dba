"""`pyllama-dist worker`."""

import ctypes
import logging
import os
import re
import signal
import sys
import threading

import click

from pyllama_dist.cli.options import option
from pyllama_dist.errors import UsageError

_PR_SET_PDEATHSIG = 1  # see prctl(2)

log = logging.getLogger("pyllama_dist")


@click.command("worker")
@option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Interface to listen on. 0.0.0.0 is all of them, and needs --trust-network.",
)
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=9990,
    show_default=True,
    help="0: any free one.",
)
@option(
    "--data-ports",
    metavar="FROM-TO",
    help="Ports for data connections, one for each node before this one. [default: any free ones]",
)
@option("--nthreads", type=click.IntRange(1, 1024), help="[default: the cores of this machine]")
@option(
    "--trust-network",
    is_flag=True,
    help="Listen beyond this machine, where whoever reaches the port may use this worker.",
)
@click.option("--attached", is_flag=True, hidden=True)
def command(
    host: str,
    port: int,
    data_ports: str | None,
    nthreads: int | None,
    trust_network: bool,
    attached: bool,
) -> None:
    """Serve a root with this machine's cores and memory.

    A worker needs no model: a root connects, sends its part of the weights and the program to run.
    It serves one root after the other until it is ended with ^C.
    """
    if attached:
        _end_with_parent()
    from pyllama_dist.cores import available_cores
    from pyllama_dist.executor import prepare
    from pyllama_dist.net.transport import Address
    from pyllama_dist.net.zeromq import ZmqListener
    from pyllama_dist.worker import serve

    ports = (0,) if data_ports is None else _ports(data_ports)
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 is written before a port
    if not (trust_network or Address(host, port).is_loopback):
        raise UsageError(
            f"--host {host} lets every machine that reaches it use this worker, unencrypted; add "
            f"--trust-network if the network is yours alone"
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    prepare(lambda text: click.echo(text, err=True))  # before a root can knock
    listener = ZmqListener(host, port, ports)
    try:
        n_threads = nthreads or available_cores()
        log.info("worker listens on %s, %d threads", listener.address, n_threads)
        if attached:
            click.echo(listener.port)
        serve(listener, n_threads)
    except KeyboardInterrupt:
        log.info("worker ends")
    finally:
        listener.close()


def _ports(text: str) -> range:
    """The ports of a range "9991-9999".

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 0 < first <= last < 65536:
        raise UsageError(f"--data-ports {text!r} is no range of ports; write for example 9991-9999")
    return range(first, last + 1)


def _end_with_parent() -> None:
    """From now on this process ends when whoever started it goes, in whatever way.

    Then its standard input closes. Where the system can (Linux), it kills this process too: one
    that was stopped cannot end by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_stdin, daemon=True).start()


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)

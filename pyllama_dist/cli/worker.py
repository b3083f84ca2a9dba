"""`pyllama-dist worker`."""

import logging
import os
import signal
import sys
import threading

import click

from pyllama_dist.cli.options import option
from pyllama_dist.errors import UsageError

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
@option("--nthreads", type=click.IntRange(1, 1024), help="[default: the cores of this machine]")
@option(
    "--trust-network",
    is_flag=True,
    help="Listen beyond this machine, where whoever reaches the port may use this worker.",
)
@click.option("--attached", is_flag=True, hidden=True)
def command(
    host: str, port: int, nthreads: int | None, trust_network: bool, attached: bool
) -> None:
    """Serve a root with this machine's cores and memory.

    A worker needs no model: a root connects, sends its part of the weights and the program to run.
    It serves one root after the other until it is ended with ^C.
    """
    from pyllama_dist.cores import available_cores
    from pyllama_dist.executor import prepare
    from pyllama_dist.net.transport import Address
    from pyllama_dist.net.zeromq import ZmqListener
    from pyllama_dist.worker import serve

    if not (trust_network or Address(host, port).is_loopback):
        raise UsageError(
            f"--host {host} lets every machine that reaches it use this worker, unencrypted; add "
            f"--trust-network if the network is yours alone"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepare(lambda text: click.echo(text, err=True))  # before a root can knock
    listener = ZmqListener(host, port)
    try:
        n_threads = nthreads or available_cores()
        log.info("worker listens on %s, %d threads", listener.address, n_threads)
        if attached:
            click.echo(listener.port)
            threading.Thread(target=_end_with_parent, daemon=True).start()
        serve(listener, n_threads)
    except KeyboardInterrupt:
        log.info("worker ends")
    finally:
        listener.close()


def _end_with_parent() -> None:
    """Ends this process when whoever started it goes, in whatever way: its end of stdin closes."""
    sys.stdin.read()
    os._exit(0)

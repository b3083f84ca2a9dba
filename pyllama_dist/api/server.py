"""The server's process: it listens at once, and serves when the model is there."""

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pyllama_dist import __version__, interrupt
from pyllama_dist.api.app import make_app
from pyllama_dist.api.bridge import Bridge
from pyllama_dist.api.errors import unavailable
from pyllama_dist.api.protocol import HttpProtocol
from pyllama_dist.api.security import Access
from pyllama_dist.api.service import Model, Service
from pyllama_dist.conversation import ModelParts
from pyllama_dist.engine.engine import Engine
from pyllama_dist.errors import UsageError
from pyllama_dist.executor import kernels
from pyllama_dist.root import Root

_END_SECONDS = 5  # for answers to be told that the server ends
_TAKE_DOWN_SECONDS = 5.0  # for the last step; what is being brought up is then interrupted
_HEADER_BYTES = 64 << 10
TEXT_THREADS = 2  # that tokenize and make grammars while the loop's thread goes on


@dataclass(frozen=True)
class Loaded:
    """A model whose nodes are ready."""

    parts: ModelParts
    root: Root
    nodes: tuple[str, ...]  # their addresses, the root first


Load = Callable[[], AbstractContextManager[Loaded]]


def serve(service: Service, access: Access, load: Load, host: str, port: int) -> None:
    """Listens until the process is interrupted.

    Args:
        service: which becomes ready here.
        access: who may ask.
        load: brings up the model; called in a thread of its own, which also takes it down.
        host: the address to listen at.
        port: the port; 0 for a free one.

    Raises:
        UsageError: the port is in use, or the address is not of this machine.
        PyllamaError: the model could not be brought up.
    """
    config = uvicorn_config(make_app(service, access), host, port)
    try:
        listener = bind(config)
    except (SystemExit, OSError) as error:
        raise UsageError(
            f"cannot listen at {host}:{port}: {error}; choose another --port or --host"
        ) from None
    model = _Model(service, load)
    try:
        asyncio.run(_run(_Server(config, service), [listener], model, service))
    finally:
        model.end()
        service.close()
        listener.close()
    if model.error is not None:
        raise model.error


def uvicorn_config(app: ASGIApp, host: str, port: int) -> uvicorn.Config:
    """How HTTP is spoken."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        http=HttpProtocol,
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=_END_SECONDS,
    )


def bind(config: uvicorn.Config) -> socket.socket:
    """The socket to listen at, whose connections send each token at once.

    Otherwise TCP keeps a token back until the one before is acknowledged, for up to 40 ms (Nagle's
    algorithm). asyncio sees to that only for sockets that name their protocol; uvicorn's do not.
    """
    listener = config.bind_socket()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
    return listener


def text_threads() -> ThreadPoolExecutor:
    """The threads of a loop that serves."""
    return ThreadPoolExecutor(TEXT_THREADS, "text")


async def _run(
    server: "_Server", sockets: list[socket.socket], model: "_Model", service: Service
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(text_threads())
    model.start(loop, server)
    watching = asyncio.create_task(service.watch())
    try:
        await server.serve(sockets)
    finally:
        watching.cancel()


class _Server(uvicorn.Server):
    """Tells those that are waiting for an answer when it has to end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stop(unavailable("the server ends", "shutting_down"))
        super().handle_exit(sig, frame)


class _Model:
    """The thread in which a model is brought up, and taken down at the end."""

    def __init__(self, service: Service, load: Load) -> None:
        self.error: Exception | None = None
        self._service, self._load = service, load
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop, server: uvicorn.Server) -> None:
        """Begins to bring the model up; if it cannot be, the server ends."""

        def run() -> None:
            try:
                self._serve(loop)
            except KeyboardInterrupt:
                pass  # while it was brought up
            except Exception as error:
                self.error = error
                server.should_exit = True

        self._thread = threading.Thread(target=run, name="model")
        self._thread.start()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        service = self._service
        bridge = Bridge(loop, service.metrics.step)
        with ExitStack() as stack:
            loaded = stack.enter_context(self._load())
            engine = stack.enter_context(
                Engine(loaded.root, parallel=service.limits.parallel, after_step=bridge.after_step)
            )
            n_nodes = len(loaded.nodes)
            service.metrics.describe(__version__, n_nodes, kernels())
            service.fingerprint = f"pyllama-dist-{__version__}-{n_nodes}"
            model = Model(loaded.parts, engine, bridge, loaded.nodes)
            loop.call_soon_threadsafe(service.begin, model)
            self._end.wait()

    def end(self) -> None:
        """Takes the model down, or stops bringing it up."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(_TAKE_DOWN_SECONDS)
            interrupt.thread(self._thread)
            self._thread.join()

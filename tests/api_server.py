"""The API's server within this process, in front of a root that says what a test wants."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx
import numpy as np
import uvicorn

from pyllama_dist.api.app import make_app
from pyllama_dist.api.bridge import Bridge
from pyllama_dist.api.metrics import Metrics
from pyllama_dist.api.security import Access
from pyllama_dist.api.server import TEXT_THREADS, text_threads, uvicorn_config
from pyllama_dist.api.service import Limits, Model, Service
from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.conversation import ModelParts, open_model
from pyllama_dist.engine.engine import Engine
from pyllama_dist.text.chat_template import ChatTemplate
from pyllama_dist.text.sandbox import SandboxedTemplate
from tests.fake_root import FakeRoot

OPEN, LIMITS = Access(), Limits(4, 8)
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
CHAT = "/v1/chat/completions"


class ScriptedRoot(FakeRoot):
    """Says the tokens of `says` after any prompt, and random ones if there are none.

    Attributes:
        says: token ids; the last one should end the answer.
        pause: seconds that a step takes.
    """

    def __init__(self, vocab_size: int, **sizes: int) -> None:
        sizes = {"n_seqs": 8, "n_blocks": 64, "block_size": 16, "seq_len": 512} | sizes
        super().__init__(max_rows=64, max_logits=8, vocab_size=vocab_size, **sizes)
        self.says: list[int] = []
        self.pause = 0.0

    def step(self, tokens, batch):
        time.sleep(self.pause)
        return super().step(tokens, batch)

    def logits_of(self, tokens):
        if not self.says:
            return super().logits_of(tokens)
        said = next(
            n for n in range(len(self.says), -1, -1) if tokens[-n:] == self.says[:n] or not n
        )
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.says[min(said, len(self.says) - 1)]] = 20
        return logits

    def usage(self):
        return []


@dataclass(frozen=True)
class Held:
    """What a server holds for clients: nothing of it may stay when they are gone."""

    sequences: int  # that run or wait, by the engine and by the service
    blocks: float  # share of the KV cache that sequences hold
    readers: int  # of streams
    tasks: int  # of asyncio
    connections: int


@dataclass
class Running:
    """A server that runs."""

    url: str
    root: ScriptedRoot
    service: Service
    engine: Engine
    parts: ModelParts
    server: uvicorn.Server

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def say(self, text: str, *, end: bool = True) -> None:
        """What the model answers from now on; tags that are tokens are such."""
        tokenizer = self.parts.tokenizer
        ids = tokenizer.encode(text)
        self.root.says = [*ids, min(tokenizer.eos_ids)] if end else ids

    def is_idle(self) -> bool:
        load = self.engine.load
        return load.running == load.waiting == 0

    def held(self) -> Held:
        load, service = self.engine.load, self.service
        state = self.server.server_state
        return Held(
            load.running + load.waiting + service._sequences + len(service._by_key),
            load.kv_used,
            len(service.model.bridge._readers),
            len(asyncio.all_tasks(service.model.bridge._loop)) - 1,  # that of the server
            len(state.connections),
        )

    def wait_empty(self, seconds: float = 10.0) -> None:
        """Until nothing is held for anyone."""
        deadline = time.monotonic() + seconds
        while (held := self.held()) != Held(0, 0, 0, 0, 0):
            assert time.monotonic() < deadline, held
            time.sleep(0.02)

    def wait_idle(self, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < deadline, self.engine.load
            time.sleep(0.01)


@contextmanager
def serving(
    access: Access = OPEN,
    limits: Limits = LIMITS,
    template: str | None = None,
    names: Sequence[str] = ("tiny",),
    **sizes: int,
) -> Iterator[Running]:
    """A server at a free port; it ends with the context."""
    with open_model(BUILTIN) as parts:
        if template is not None:
            sandboxed = SandboxedTemplate(template, "a test")
            parts = replace(parts, template=ChatTemplate(sandboxed, parts.tokenizer))
        root = ScriptedRoot(parts.tokenizer.vocab_size, **sizes)
        service = Service(names, limits, Metrics(names[0]))
        config = uvicorn_config(make_app(service, access), "127.0.0.1", 0)
        config.timeout_graceful_shutdown = 2
        server, ready = uvicorn.Server(config), threading.Event()
        engines: list[Engine] = []

        async def run() -> None:
            loop, all_begun = asyncio.get_running_loop(), threading.Barrier(TEXT_THREADS)
            loop.set_default_executor(text_threads())
            # All threads are there before a test counts them.
            await asyncio.gather(*(asyncio.to_thread(all_begun.wait) for _ in range(TEXT_THREADS)))
            bridge = Bridge(loop, service.metrics.step)
            engine = Engine(root, root.size, parallel=limits.parallel, after_step=bridge.after_step)
            engines.append(engine)
            service.begin(Model(parts, engine, bridge, ("the root",)))
            await server.serve()

        def main() -> None:
            asyncio.run(run())
            engines[0].close()
            service.close()

        server.install_signal_handlers = lambda: None
        thread = threading.Thread(target=main, name="server")
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            ready.set()
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            yield Running(url, root, service, engines[0], parts, server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def events(text: str) -> list[dict]:
    """The data of a stream, which must be complete."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    return found


def connect(server: Running) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def send(server: Running, body: dict, connection: socket.socket | None = None) -> socket.socket:
    """A connection on which a request was sent."""
    data = json.dumps(body).encode()
    connection = connection or connect(server)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def wait_until(is_so, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)

"""A model that a server and the bare engine run in turns; see `orders.py`.

{"load": {"shape": "glm-edge-1.5b", "layers": null, "threads": 2, "seq_len": 256, "parallel": 16}}
{"serve": {}}                            from now on the server answers
{"engine": {"asks": [...], "bias": {}}}  the same asks, without the server

Nodes, weights and caches are the same for both; each turn has an engine of its own. The server is
that of `pyllama-dist api`, in a thread. A shape has no tokenizer: its tokens are called by numbers.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue

import orders
import uvicorn
from serving_load import Ask, Heard, Json

from pyllama_dist.api.app import make_app
from pyllama_dist.api.bridge import Bridge
from pyllama_dist.api.metrics import Metrics
from pyllama_dist.api.security import Access
from pyllama_dist.api.server import bind, uvicorn_config
from pyllama_dist.api.service import Limits, Model, Service
from pyllama_dist.bench import machine
from pyllama_dist.bench.random_model import RandomModel
from pyllama_dist.bench.shapes import config_of, with_layers
from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.cluster import Cluster, open_root
from pyllama_dist.config import ModelConfig
from pyllama_dist.conversation import ModelParts, open_model
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sampler import F32, Sampler, Sampling
from pyllama_dist.engine.sequence import Request
from pyllama_dist.errors import PyllamaError
from pyllama_dist.executor import kernels
from pyllama_dist.text.tokenizer import Tokenizer
from pyllama_kernels.pages import seq_blocks

BUILTIN_NAME = "builtin"
_NEVER = -100.0  # the bias of tokens that give no text of their own


@dataclass(frozen=True)
class Numbers:
    """A vocabulary without texts: a token is its number."""

    size: int

    def normalize(self, text: str) -> str:
        return text

    def encode(self, text: str, first: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def piece(self, token: int, first: bool) -> bytes:
        return f" {token}".encode()


class Worker:
    """Keeps a model between orders."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._turn = ExitStack()

    def load(
        self, shape: str, layers: int | None, threads: int, seq_len: int, parallel: int
    ) -> Json:
        """Brings up a shape, or the built-in model, and a server that has no model yet."""
        self._parts = parts = self._open.enter_context(_parts(shape, layers))
        config = parts.file.config
        cluster = Cluster(
            n_threads=threads,
            max_seq_len=min(seq_len, config.max_seq_len),
            kv_blocks=parallel * (seq_blocks(seq_len) + 1),
        )
        self._root = self._open.enter_context(
            open_root(parts.file, cluster, lambda done, total: None)
        )
        self._service = Service((shape,), Limits(parallel, 64), Metrics(shape))
        self._loop, port = self._open.enter_context(_listening(self._service))
        stream = parts.tokenizer.stream
        silent = [id for id in range(parts.tokenizer.vocab_size) if not stream().push(id)]
        return {
            "url": f"http://127.0.0.1:{port}",
            "bias": {str(id): _NEVER for id in silent},
            "kernels": kernels(),
            "vocab_size": parts.tokenizer.vocab_size,
            "machine": machine.facts(),
            "versions": machine.versions(),
        }

    def serve(self) -> Json:
        """Begins the server's turn, with an empty cache."""
        bridge = Bridge(self._loop, self._service.metrics.step)
        engine = self._new_engine(bridge.after_step)
        self._service.begin(Model(self._parts, engine, bridge, self._root.names))
        return {}

    def engine(self, asks: Sequence[Json], bias: Mapping[str, float]) -> Json:
        """The engine's turn, with an empty cache: when each token was chosen."""
        engine = self._new_engine()
        sampling = Sampling(temperature=0, bias={int(id): value for id, value in bias.items()})
        vocab_size = self._parts.tokenizer.vocab_size
        began = time.perf_counter()
        streams, heard = [], []
        for one in (Ask(**ask) for ask in asks):
            time.sleep(max(0.0, began + one.at - time.perf_counter()))
            sent, pieces = time.perf_counter() - began, list[float]()
            sampler = Sampler(sampling, vocab_size)
            sampler.begin(one.prompt)
            noting = _noting(sampler, pieces, began)
            streams.append(engine.submit(Request(one.prompt, noting, max_tokens=one.tokens)))
            heard.append((sent, pieces))
        for stream in streams:
            for _ in stream:
                pass
        return {
            "heard": [
                asdict(Heard(sent, pieces, len(pieces), stream.timings.cached_tokens))
                for (sent, pieces), stream in zip(heard, streams, strict=True)
            ]
        }

    def close(self) -> None:
        """Takes everything down."""
        self._turn.close()
        self._open.close()

    def _new_engine(
        self, after_step: Callable[[int, float], None] = lambda rows, seconds: None
    ) -> Engine:
        """An engine in the place of the last one, which knows already what a row costs."""
        self._turn.close()
        parallel, rows = self._service.limits.parallel, self._root.node.program.max_rows
        engine = Engine(self._root, parallel=parallel, after_step=after_step)
        self._turn.enter_context(engine)
        prompt = [0] * min(rows, engine.seq_len)
        for _ in engine.submit(Request(prompt, lambda logits: 0, max_tokens=1)):
            pass
        return engine


def _noting(sampler: Sampler, when: list[float], began: float) -> Callable[[F32], int]:
    """A sampler that notes when it has chosen."""

    def choose(logits: F32) -> int:
        token = sampler(logits)
        when.append(time.perf_counter() - began)
        return token

    return choose


@contextmanager
def _parts(shape: str, layers: int | None) -> Iterator[ModelParts]:
    with open_model(BUILTIN) as parts:
        if shape == BUILTIN_NAME:
            yield parts
        else:
            config = config_here(shape, layers)
            tokenizer = Tokenizer(Numbers(config.vocab_size), (), ())
            # Of a file the server wants its configuration only.
            yield replace(parts, file=RandomModel(config), tokenizer=tokenizer, template=None)


def config_here(shape: str, layers: int | None) -> ModelConfig:
    """The configuration of a shape's first layers, or of the built-in model.

    Raises:
        UsageError: there is no such shape.
    """
    if shape == BUILTIN_NAME:
        with open_model(BUILTIN) as parts:
            return parts.file.config
    return config_of(shape) if layers is None else with_layers(config_of(shape), layers)


@contextmanager
def _listening(service: Service) -> Iterator[tuple[asyncio.AbstractEventLoop, int]]:
    """The server's loop and port, while the context lasts."""
    config = uvicorn_config(make_app(service, Access()), "127.0.0.1", 0)
    server, listener = uvicorn.Server(config), bind(config)
    listener.listen()  # who connects from now on waits for the loop
    loops: SimpleQueue[asyncio.AbstractEventLoop] = SimpleQueue()

    async def run() -> None:
        loops.put(asyncio.get_running_loop())
        await server.serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="server")
    thread.start()
    try:
        yield loops.get(), listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def main() -> None:
    worker = Worker()
    try:
        orders.serve(
            {"load": worker.load, "serve": worker.serve, "engine": worker.engine}, PyllamaError
        )
    finally:
        worker.close()


if __name__ == "__main__":
    main()

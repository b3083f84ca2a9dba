"""A tiny random model, workers in threads, and a watch over what tests leave behind."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import settings
from zmq.utils.garbage import GarbageCollectorThread

from pyllama_dist.config import (
    Arch,
    Experts,
    FloatType,
    Indexer,
    Latent,
    ModelConfig,
    Pairs,
    Scoring,
    Tensor,
)
from pyllama_dist.executor import prepare
from pyllama_dist.executor.memory import Memory, own_blocks
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.models.plan import ShardingPlan, shards
from pyllama_dist.net.inproc import Hub
from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.program import Batch, Program, Span, weights
from pyllama_dist.worker import serve
from pyllama_kernels.blocks import dequantize_q40, dequantize_q80, quantize_q40, quantize_q80
from pyllama_kernels.pages import seq_blocks

# A shell that starts tests in the background lets them, and all that they start, ignore ^C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In CI the same examples each time; elsewhere new ones.
settings.register_profile("quick", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("quick")


# Eight nodes can share it; from four on, some have no part of the FFN.
CONFIG = ModelConfig(
    arch=Arch.GLM4,
    dim=64,
    ffn_dim=96,
    n_layers=2,
    n_heads=16,
    n_kv_heads=4,
    head_dim=16,
    rotary_dim=8,
    vocab_size=101,
    max_seq_len=64,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    qkv_bias=True,
    weights=FloatType.F32,
)

EXPERTS = Experts(
    count=8,
    active=3,
    ffn_dim=64,
    shared_ffn_dim=64,
    dense_layers=1,
    scoring=Scoring.SIGMOID,
    bias=True,
    groups=4,
    active_groups=2,
    normalize=True,
    scale=1.8,
)
LATENT = {
    "n_kv_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "qkv_bias": False,
    "experts": EXPERTS,
    "latent": Latent(
        q_rank=96, kv_rank=32, nope_dim=32, rope_dim=32, value_dim=32, norm_epsilon=1e-6
    ),
}
SOFTMAX = replace(
    EXPERTS,
    shared_ffn_dim=0,
    dense_layers=0,
    scoring=Scoring.SOFTMAX,
    bias=False,
    groups=1,
    active_groups=1,
    scale=1.0,
)
# What sets an architecture apart from `CONFIG`.
FEATURES: dict[Arch, dict[str, object]] = {
    Arch.GLM4_MOE: {"rope_pairs": Pairs.HALVES, "qk_norm": True, "experts": EXPERTS},
    Arch.GLM4_MOE_LITE: LATENT,
    Arch.GLM_MOE_DSA: LATENT | {"indexer": Indexer(4, 32, 16, top_k=6, layers=(True, False))},
    Arch.LLAMA: {"qkv_bias": False},
    Arch.QWEN3: {"rope_pairs": Pairs.HALVES, "qk_norm": True, "qkv_bias": False},
    Arch.QWEN3_MOE: {
        "rope_pairs": Pairs.HALVES,
        "qk_norm": True,
        "qkv_bias": False,
        "experts": SOFTMAX,
    },
}


class TinyModel:
    """Random weights for a configuration; a `WeightSource`."""

    def __init__(self, config: ModelConfig, tensors: Sequence[Tensor] = ()) -> None:
        self.config = config
        self.tensors = {
            tensor.name: (tensor.float_type, _stored(tensor))
            for tensor in tensors or ARCHITECTURES[config.arch].tensors(config)
        }

    def slice(self, name: str, rows: Span, cols: Span) -> np.ndarray:
        float_type, stored = self.tensors[name]
        first, last = map(float_type.row_bytes, cols)
        return stored[rows[0] : rows[1], first:last]

    def raw(self, name: str) -> np.ndarray:
        return self.tensors[name][1]

    def drop_pages(self) -> None:
        pass

    def values(self, name: str) -> np.ndarray:
        """A tensor as float64, [rows, cols]."""
        float_type, stored = self.tensors[f"{name}.weight"]
        match float_type:
            case FloatType.Q40:
                return dequantize_q40(stored).astype(np.float64)
            case FloatType.Q80:
                return dequantize_q80(stored).astype(np.float64)
            case _:
                return stored.view(np.float32).astype(np.float64)

    def programs(
        self,
        n_nodes: int = 1,
        *,
        sync: FloatType = FloatType.F32,
        cache: FloatType = FloatType.F32,
        max_rows: int = 8,
        max_logits: int = 8,
        n_seqs: int = 2,
        seq_len: int = 32,
        n_blocks: int | None = None,
    ) -> list[Program]:
        c = self.config
        if n_blocks is None:
            n_blocks = n_seqs * seq_blocks(seq_len)
        limits = max_rows, max_logits, n_seqs, n_blocks, seq_len
        plan = ShardingPlan(shards(c, n_nodes), sync, cache, *limits)
        return [ARCHITECTURES[c.arch].build(c, plan, node) for node in range(n_nodes)]

    def fill(self, memory: Memory) -> None:
        """Gives a node its weights, and each sequence blocks of its own."""
        for seq, place, block in own_blocks(memory.program):
            memory.table[seq, place] = block
        for index, weight in enumerate(weights(memory.program)):
            part = self.slice(weight.tensor, weight.rows, weight.cols)
            memory.weights[index][:] = part.reshape(-1)
            memory.settle(index)

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        table: np.ndarray = self.raw("embed_tokens.weight").view(np.float32)
        return table[list(tokens)]


def _stored(tensor: Tensor) -> np.ndarray:
    """[rows, bytes] uint8."""
    rng = np.random.default_rng(list(tensor.name.encode()))
    values = rng.standard_normal((1, *tensor.shape)[-2:], np.float32)
    if "norm" in tensor.name:
        values = 1 + np.float32(0.1) * values
    elif "embed" not in tensor.name:
        values /= np.float32(np.sqrt(values.shape[1]))
    match tensor.float_type:
        case FloatType.Q40:
            return quantize_q40(values)
        case FloatType.Q80:
            return quantize_q80(values)
        case _:
            return values.view(np.uint8)


def pytest_collection_finish() -> None:
    prepare(print)  # kernels are compiled here, not within a test's time
    gc.freeze()  # workers collect garbage after each session: not all libraries each time


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TinyModel]:
    """Makes tiny models: `tiny(weights=FloatType.Q40)`. Equal ones are made once.

    An architecture brings its features: `tiny(arch=Arch.GLM4_MOE)` has experts.
    """

    @cache
    def make(**changes: object) -> TinyModel:
        features = FEATURES.get(changes.get("arch", CONFIG.arch), {})
        return TinyModel(replace(CONFIG, **features | changes))

    return make


@pytest.fixture(scope="session")
def run_of() -> Callable[[int, Sequence[int]], Batch]:
    """Makes the batch of tokens that follow each other: `run_of(start, tokens)`."""

    def make(start: int, tokens: Sequence[int], seq: int = 0) -> Batch:
        n = len(tokens)
        return Batch((seq,) * n, tuple(range(start, start + n)), tuple(range(n)))

    return make


@pytest.fixture(scope="session")
def serving() -> Callable[..., object]:
    """Makes workers in threads: `with serving(hub, 2) as addresses`."""

    @contextmanager
    def serve_for_a_while(hub: Hub, count: int, n_threads: int = 1) -> Iterator[list[Address]]:
        listeners = [hub.listen() for _ in range(count)]
        crashes: list[BaseException] = []

        def work(listener: object) -> None:
            try:
                with suppress(LostError):  # the listener was closed
                    serve(listener, n_threads)
            except BaseException as error:
                crashes.append(error)

        threads = [
            threading.Thread(target=work, args=(listener,), name="worker") for listener in listeners
        ]
        for thread in threads:
            thread.start()
        try:
            yield [Address("inproc", listener.port) for listener in listeners]
        finally:
            for listener in listeners:
                listener.close()
            for thread in threads:
                thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        assert not crashes, crashes

    return serve_for_a_while


@pytest.fixture(scope="module")
def server():
    """The API's server, before a root that says what a test wants."""
    from tests.api_server import serving

    with serving() as running:
        yield running


@pytest.fixture
def client(server):
    """A client of the server, whose model says "Hello there." unless it is told another text."""
    server.say("Hello there.")
    server.root.pause = 0.0
    with server.client() as client:
        yield client
    server.wait_idle()


def _threads() -> set[threading.Thread]:
    """The threads of this process that have to end.

    pyzmq keeps one from the first frame on that it does not copy.
    """
    threads = threading.enumerate()
    return {thread for thread in threads if not isinstance(thread, GarbageCollectorThread)}


def _children() -> set[psutil.Process]:
    """The processes that this one has started; by the kernel's list, where it keeps one."""
    try:
        lists = [task / "children" for task in Path("/proc/self/task").iterdir()]
        pids = [int(pid) for one in lists for pid in one.read_text().split()]
    except OSError:
        return set(psutil.Process().children())
    found = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(pid))
    return found


def _sockets() -> set[str]:
    """The sockets of this process, those with abstract names included; where Linux shows them."""
    try:
        files = list(Path("/proc/self/fd").iterdir())
    except OSError:
        return set()
    found = set()
    for file in files:
        with suppress(OSError):  # the one that listed them
            found.add(str(file.readlink()))
    return {name for name in found if name.startswith("socket:")}


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    """Threads, child processes and sockets end with the test that started them."""
    threads, processes = _threads(), _children()
    sockets = _sockets()
    yield
    for thread in _threads() - threads:
        thread.join(5)
    started = _children() - processes
    _, alive = psutil.wait_procs(started, timeout=5) if started else ([], [])
    left = [thread.name for thread in _threads() - threads]
    assert not left, f"threads left behind: {left}"
    assert not alive, f"processes left behind: {alive}"
    deadline = time.monotonic() + 5
    while (open_still := _sockets() - sockets) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not open_still, f"sockets left behind: {open_still}"

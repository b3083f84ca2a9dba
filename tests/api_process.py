"""Servers in processes of their own, so that what they take is theirs alone."""

import multiprocessing
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Protocol

import httpx
import psutil

from pyllama_dist.api.service import Limits
from tests.api_server import serving
from tests.test_processes import Process

MIB = 1 << 20
GROWN_MIB = 24.0  # what a heap may grow by as fragments
GRAMMAR = {  # the process that checks grammars stays with a server
    "messages": [{"role": "user", "content": "hello"}],
    "response_format": {"type": "json_object"},
    "max_tokens": 1,
}


class Server(Protocol):
    """A server that runs."""

    url: str
    pid: int

    def wait_empty(self) -> None:
        """Until it holds nothing for anyone."""


@dataclass(frozen=True)
class Taken:
    """What a process and those that it has started take."""

    mib: float  # resident
    descriptors: int
    threads: int
    processes: int

    @classmethod
    def by(cls, pid: int) -> "Taken":
        first = psutil.Process(pid)
        family = [first, *first.children(recursive=True)]
        return cls(
            round(sum(one.memory_info().rss for one in family) / MIB, 1),
            sum(one.num_fds() for one in family),
            sum(one.num_threads() for one in family),
            len(family),
        )


def grown(before: Taken, after: Taken) -> str:
    """What is taken that was not; nothing if memory has grown by what is usual."""
    more = {name: value - asdict(before)[name] for name, value in asdict(after).items()}
    allowed = {"mib": GROWN_MIB}
    over = {name: value for name, value in more.items() if value > allowed.get(name, 0)}
    return f"it takes more: {over}" if over else ""


@dataclass
class _Scripted:
    url: str
    pid: int
    pipe: Connection

    def wait_empty(self) -> None:
        self.pipe.send("wait")
        assert self.pipe.poll(60), "it does not answer"
        wrong = self.pipe.recv()
        assert not wrong, wrong


@dataclass
class _Real:
    url: str
    pid: int

    def wait_empty(self) -> None:
        deadline = time.monotonic() + 60
        while any(held := self._held()):
            assert time.monotonic() < deadline, held
            time.sleep(0.1)

    def _held(self) -> list[float]:
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        names = "num_requests_running|num_requests_waiting|kv_cache_usage_perc"
        found = re.findall(rf"vllm:(?:{names})\{{.*\}} (\S+)", text)
        assert len(found) == 3
        port = int(self.url.rpartition(":")[2])
        connections = psutil.Process(self.pid).net_connections("tcp")
        # The connection of this question is gone, or is still open from the server's side.
        open_ = [one for one in connections if one.laddr.port == port and one.status != "LISTEN"]
        return [*map(float, found), max(0, len(open_) - 1)]


@contextmanager
def scripted(limits: Limits = Limits(4, 60), pause: float = 0.0) -> Iterator[Server]:  # noqa: B008
    """The scripted server; each step takes `pause` seconds more."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, limits, pause))
    process.start()
    try:
        assert ours.poll(60), "it does not start"
        yield _Scripted(ours.recv(), process.pid or 0, ours)
        ours.send("end")
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, limits: Limits, pause: float) -> None:
    with serving(limits=limits) as running:
        running.say("Hello there, whoever you are.")
        running.root.pause = pause
        running.root.steps = deque(maxlen=1)
        pipe.send(running.url)
        while pipe.recv() != "end":
            try:
                running.wait_empty(30)
                pipe.send("")
            except AssertionError as error:
                pipe.send(f"it still holds {error}")


@contextmanager
def real(*flags: str) -> Iterator[Server]:
    """`pyllama-dist api` with two workers on this machine."""
    started = Process("api", "--port", "0", "--local-workers", "2", "--nthreads", "1", *flags)
    log = threading.Thread(target=_drain, args=(started.process.stderr.fileno(),), daemon=True)
    try:
        port = started.output(r"http://127\.0\.0\.1:(\d+)")[1]
        started.output("is ready on 3 nodes", timeout=200)
        log.start()
        yield _Real(f"http://127.0.0.1:{port}", started.pid)
        assert started.process.poll() is None
    finally:
        started.process.kill()
        if log.is_alive():
            log.join(10)
        started.stop()


def _drain(descriptor: int) -> None:
    """Reads a log, so that whoever writes it does not wait."""
    while os.read(descriptor, 65536):
        pass

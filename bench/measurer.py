"""Benchmark processes that measure on request, in lines of JSON. Linux only."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from platformdirs import user_cache_path

from pyllama_dist.bench import machine
from pyllama_dist.errors import NodeError

RESULTS = Path(__file__).parent / "results"
CACHE = user_cache_path("pyllama-dist")

Answer = dict[str, Any]
Starting = Callable[[str], None]  # told what runs next


class Measurer:
    """A process that answers each request, a line of JSON, with one line of JSON."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        if process.stdin is None or process.stdout is None:
            raise TypeError("a measurer without pipes")
        self.name, self.pid = name, process.pid
        self._process, self._log = process, log
        self._orders, self._answers = process.stdin, process.stdout

    def ask(self, **order: object) -> Answer:
        """Sends an order and waits for the answer.

        Raises:
            NodeError: the process answers with an error, or has ended.
        """
        try:
            print(json.dumps(order), file=self._orders, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise NodeError(f"{self.name} ended with {self._process.wait()}: see {self._log}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise NodeError(f"{self.name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Closes the process's input and waits until it has ended."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._process.wait()
        self._answers.close()


@contextmanager
def running(name: str, command: list[str | Path], **environment: str) -> Iterator[Measurer]:
    """A process that ends with the context; what it prints besides answers goes to a log."""
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / f"compare-{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        measurer = Measurer(name, process, log)
        try:
            yield measurer
        finally:
            measurer.end()


class Others:
    """CPU use by processes that are not measured."""

    def __init__(self, pids: list[int]) -> None:
        """Begins to count.

        Args:
            pids: what is measured, and must live until `cores`; their children count as they do.
        """
        own = [psutil.Process(pid) for pid in pids]
        self._processes = [*own, *(child for one in own for child in one.children(recursive=True))]
        self._start = self._now()

    def cores(self) -> float:
        """Cores that others have used since the beginning, on average."""
        seconds, used = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return round(max(0.0, used / seconds), 3)

    def _now(self) -> tuple[float, float]:
        """The time, and CPU seconds used by others, of the machine's host too."""
        total = psutil.cpu_times()
        busy = sum(total[:8]) - total.idle - total.iowait  # guests are in user
        # A process's own time; [2:4] are of children that have ended.
        own = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        return time.perf_counter(), busy - own


def result_file(kind: str) -> Path:
    """Where results of a kind, made now on this machine, go by default."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine.facts()["cpu"]).lower()).strip("-")
    return RESULTS / f"{datetime.now():%Y-%m-%d}-{slug}-{kind}.json"

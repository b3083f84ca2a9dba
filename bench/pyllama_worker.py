"""pyllama-dist as a process that measures on request; see `orders.py`.

{"load": {"shape": "glm-edge-1.5b", "threads": 2, "nodes": 1, "seq_len": 1024}}
{"run": {"p": 512, "n": 0, "d": 0}}      one run of pp512; nothing is warmed up before it
{"run": {"p": 0, "n": 128, "d": 512}}    one run of tg128 at a depth of 512
{"bandwidth": {"threads": 2}}            what so many threads read from memory
{"unload": {}}                           the memory is free again
"""

from contextlib import ExitStack
from dataclasses import asdict

import orders

from pyllama_dist.bench import machine
from pyllama_dist.bench.measure import plan_tests
from pyllama_dist.bench.random_model import RandomModel
from pyllama_dist.bench.session import BenchSession, open_session
from pyllama_dist.bench.shapes import config_of
from pyllama_dist.cluster import Cluster
from pyllama_dist.errors import PyllamaError, UsageError
from pyllama_kernels.bandwidth import MemoryReader

Answer = dict[str, object]


class Server:
    """Keeps a session between orders."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._session: BenchSession | None = None
        self._reader: MemoryReader | None = None

    def load(self, shape: str, threads: int, nodes: int = 1, seq_len: int = 1024) -> Answer:
        """Brings up a shape on nodes of this machine, in the place of the last one."""
        self.close()
        cluster = Cluster(local_workers=nodes - 1, n_threads=threads, max_seq_len=seq_len)
        opening = open_session(shape, RandomModel(config_of(shape)), cluster)
        self._session = session = self._open.enter_context(opening)
        return {
            **asdict(session.model),
            **asdict(session.setting),
            "bytes_here": session.bytes_here,
            "machine": machine.facts(),
            "versions": machine.versions(),
        }

    def run(self, p: int = 0, n: int = 0, d: int = 0) -> Answer:
        """One run of the one test that `p` or `n` asks for, at depth `d`."""
        if self._session is None:
            raise UsageError("nothing is loaded")
        tests = plan_tests([p], [n], [d])
        if len(tests) != 1:
            raise UsageError(f"p {p}, n {n}: one of them says how many tokens, the other is 0")
        run = self._session.bench.run(tests[0])
        return {"tokens_per_second": tests[0].all_tokens / run.seconds, **asdict(run)}

    def bandwidth(self, threads: int) -> Answer:
        """What so many threads read from memory.

        The memory that they read is kept until what is loaded goes. The host of a virtual machine
        may be told some seconds later that memory is free, and take it away while something else
        is measured: seen as 0.2 s of two cores for 1 GiB.
        """
        if self._reader is None or self._reader.n_threads != threads:
            self._reader = self._open.enter_context(machine.memory_reader(threads))
        return {"gb_per_second": self._reader.bytes_per_second() / 1e9}

    def unload(self) -> Answer:
        """Takes down what is loaded."""
        self.close()
        return {}

    def close(self) -> None:
        """Takes the session down, and frees the memory that was read."""
        self._session = self._reader = None
        self._open.close()


def main() -> None:
    server = Server()
    try:
        orders.serve(
            {
                "load": server.load,
                "run": server.run,
                "bandwidth": server.bandwidth,
                "unload": server.unload,
            },
            PyllamaError,
        )
    finally:
        server.close()


if __name__ == "__main__":
    main()

"""Workers on this machine: started with a root, and ended with it, whatever happens to either."""

import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from pyllama_dist.cores import keep
from pyllama_dist.errors import NodeError
from pyllama_dist.net.transport import Address

# For all together. Kernels are compiled before; on a Pi 4 the libraries alone take ten seconds.
_START_SECONDS = 60.0
_END_SECONDS = 3.0

Process = subprocess.Popen[str]


@contextmanager
def local_workers(cpus: Sequence[int | None], n_threads: int) -> Iterator[Sequence[Address]]:
    """Workers in processes of their own, each on a free port of the loopback.

    A worker ends when its standard input closes, or when this thread does: also if this process is
    killed.

    Args:
        cpus: for each worker the CPU that it keeps to; None: any.
        n_threads: threads of each.

    Raises:
        NodeError: one does not start.
    """
    command = [sys.executable, "-m", "pyllama_dist", "worker", "--attached"]
    command += ["--host", "127.0.0.1", "--port", "0", "--nthreads", str(n_threads)]
    started: list[Process] = []
    with ExitStack() as stack:
        stack.callback(_end, started)
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in cpus]
        for cpu, errors in zip(cpus, said, strict=True):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # ^C is for the root, which then ends its workers
            )
            started.append(process)
            keep(process.pid, cpu)
        deadline = time.monotonic() + _START_SECONDS
        yield [
            _address(process, errors, deadline)
            for process, errors in zip(started, said, strict=True)
        ]


def _address(process: Process, errors: IO[str], deadline: float) -> Address:
    """Where a worker listens: the first line that it prints."""
    if process.stdout is None:
        raise TypeError("a worker without a pipe")
    left = max(0.0, deadline - time.monotonic())
    ready, _, _ = select.select([process.stdout], [], [], left)
    line = process.stdout.readline() if ready else ""
    if not line.strip().isdecimal():
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
        why = last if ready else f"not ready after {_START_SECONDS:.0f} s; {last}"
        raise NodeError(f"a local worker did not start: {why}")
    return Address("127.0.0.1", int(line))


def _end(processes: Sequence[Process]) -> None:
    """Ends workers: asks all of them, then kills those that are still there."""
    try:
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        deadline = time.monotonic() + _END_SECONDS
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:  # also if this is interrupted
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

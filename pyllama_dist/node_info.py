"""What a node has: it tells the root, which plans with it."""

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path

from pyllama_dist.cores import available_cores
from pyllama_dist.executor import kernels
from pyllama_dist.memory_use import memory_here
from pyllama_dist.net.messages import NodeInfo
from pyllama_kernels.cpu import host


def node_info(n_threads: int) -> NodeInfo:
    """What this process has, now.

    Args:
        n_threads: threads that compute.
    """
    return NodeInfo(
        n_threads=n_threads,
        cores=available_cores(),
        memory=memory_here().available,
        kernels=kernels(),
        cpu=host().cpu[:4096],
        machine=_machine(),
    )


def _machine() -> bytes:
    """16 bytes that are the same for all processes that share this one's memory.

    Containers of one machine are apart: each may have a limit of its own.
    """
    facts = [f"{uuid.getnode():x}"]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/cgroup"))  # noqa: PTH115 (no path: "cgroup:[…]")
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).digest()

"""A storm: seeded faults, one session each, at links and processes of a cluster on this machine.

    python -m tests.storm --faults 500 --seed 1

After each fault the root must have ended within the longest wait that PROTOCOL.md states for a
step, what it has printed must be the beginning of the answer that it gives without a fault, its
error must name who was hit or both ends of the link, and no process of the session may be left.
"""

import argparse
import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass

import psutil

from tests.relay import KINDS, Fault, Relay

TIMEOUT = 3.0
STEP_SECONDS = max(2 * TIMEOUT, 12.0) + 4.5  # 12: heartbeats; 4.5: blame and end
ROOM = 15.0  # for a machine that others use too
PROMPT = "What is tensor parallelism?"
ASK = ["root", "--prompt", PROMPT, "--temperature", "0", "--nthreads", "1"]
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP")
CODES = {"SIGINT": {130}, "SIGTERM": {143}, "SIGKILL": {-9}, "SIGSTOP": {-9}}


@dataclass(frozen=True)
class Hit:
    """What happens, and to whom: a link "0-1", a public link "1", or a node "root", "worker 1"."""

    n_workers: int
    target: str
    what: str
    way: str
    after: int  # bytes that a data link has carried before
    fault: Fault | None


def draw(seed: int) -> Hit:
    """The fault of a seed."""
    rng = random.Random(seed)
    n = rng.randint(1, 3)
    after = rng.randint(0, 20_000)
    if rng.random() < 0.3:
        nodes = ["root", *(f"worker {i}" for i in range(1, n + 1))]
        return Hit(n, rng.choice(nodes), rng.choice(SIGNALS), "", after, None)
    links = [f"{i}-{j}" for j in range(1, n + 1) for i in range(j)] + [str(1 + i) for i in range(n)]
    kind = rng.choice(KINDS)
    fault = Fault(kind, after=rng.randint(0, 500), size=rng.randint(1, 40), seed=seed)
    return Hit(n, rng.choice(links), kind, rng.choice(["forth", "back"]), after, fault)


def plain_answer() -> str:
    """What is said if nothing happens."""
    command = [sys.executable, "-m", "pyllama_dist", *ASK]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Start:
    """A process in a session of its own; at the end of the context it is gone."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *args: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def address(self) -> str:
        """Where it listens, if it is a worker."""
        said, deadline = "", time.monotonic() + 60
        while not (found := re.search(r"listens on (\S+),", said)):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stderr], [], [], left)[0], said
            said += os.read(self.process.stderr.fileno(), 65536).decode()
        return found[1]


def session(hit: Hit, answer: str) -> str:
    """Runs a session that is hit; what was wrong, or nothing."""
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay())
        command = [*relay.worker, "worker", "--port", "0", "--nthreads", "1"]
        workers = [stack.enter_context(Start(command)) for _ in range(hit.n_workers)]
        names = [relay.public(str(i), w.address()) for i, w in enumerate(workers, start=1)]
        command = [sys.executable, "-m", "pyllama_dist", *ASK]
        command += ["--timeout", str(TIMEOUT), "--workers", *names]
        root = stack.enter_context(Start(command))
        links = [f"{i}-{j}" for j in range(1, hit.n_workers + 1) for i in range(j)]
        relay.wait(links, hit.after)
        if hit.fault is not None:
            getattr(relay.links[hit.target], hit.way).set(hit.fault)
        else:
            node = hit.target.removeprefix("worker ")
            victim = root if node == "root" else workers[int(node) - 1]
            os.kill(victim.process.pid, getattr(signal, hit.what))
        return judge(hit, root, ["the root", *names], answer)


def judge(hit: Hit, root: Start, names: list[str], answer: str) -> str:
    """What is wrong with how a root ended."""
    if (hit.target, hit.what) == ("root", "SIGSTOP"):
        return ""  # nobody can ask more of it; its workers are ended with the session
    try:
        out, err = root.process.communicate(timeout=STEP_SECONDS + ROOM)
    except subprocess.TimeoutExpired:
        return f"hangs after {STEP_SECONDS + ROOM:.0f} s"
    said, error, code = out.decode().rstrip("\n"), err.decode(), root.process.returncode
    if psutil.Process().children() and root.process.pid in psutil.pids():
        return "the root is still there"
    if not answer.startswith(said):
        return f"wrong text: {said!r}"
    if code == 0:
        return "" if said == answer.rstrip("\n") else f"no error, and only {said!r}"
    if "Traceback" in error or "internal error" in error:
        return f"internal error: {error}"
    if hit.target == "root":
        return "" if code in CODES[hit.what] else f"exit code {code}"
    if code != 4:
        return f"exit code {code}: {error}"
    if hit.fault is None:
        hurt = [names[int(hit.target.removeprefix("worker "))]]
    elif "-" in hit.target:
        hurt = [names[int(node)] for node in hit.target.split("-")]
    else:
        hurt = [names[int(hit.target)]]
    # A worker at one end whose process is not to be heard may be named alone.
    if not (all(name in error for name in hurt) or ("lost worker" in error and hurt[-1] in error)):
        return f"names others than {hurt}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of the first fault")
    chosen = parser.parse_args()
    answer, counts = plain_answer(), Counter[str]()
    for seed in range(chosen.seed, chosen.seed + chosen.faults):
        hit = draw(seed)
        wrong = session(hit, answer)
        counts[f"{hit.what}: {'wrong' if wrong else 'right'}"] += 1
        if wrong:
            print(json.dumps({"seed": seed, "wrong": wrong, **asdict(hit)}), flush=True)
        left = psutil.Process().children(recursive=True)
        assert not left, left
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    sys.exit(any(kind.endswith("wrong") for kind in counts))


if __name__ == "__main__":
    main()

"""A storm: seeded faults, one session each, at links and processes of a cluster on this machine.

    python -m tests.storm --faults 500 --seed 1

A fault comes while a cluster is brought up or while it answers. Workers are processes of their own
behind a relay, or those that the root starts. After each fault these must hold:

- The root ends within the longest wait that PROTOCOL.md states for the phase.
- What it has printed is the beginning of the answer that it gives without a fault.
- Its error names who was hit, or both ends of the link.
- No process that it has started is left.
- Workers that were not hit serve the next root.
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
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from pyllama_dist.cluster.connect import connect
from pyllama_dist.errors import PyllamaError
from pyllama_dist.net.transport import Address
from pyllama_dist.net.zeromq import ZmqDialer
from pyllama_dist.workers import Workers
from tests.relay import KINDS, Fault, Relay

TIMEOUT = 3.0
HEARTBEATS = 12.0  # until a silent peer is lost
BLAME_AND_END = 4.5
# Longest waits of the root as PROTOCOL.md states them, without blame and end.
PHASES = {"START": 60.0, "HELLO": 20.0, "PEERS": 20.0, "NET": 60.0, "WEIGHTS": 60.0, "READY": 60.0}
STEP_SECONDS = max(2 * TIMEOUT, HEARTBEATS) + BLAME_AND_END
LONGEST = max(PHASES.values()) + BLAME_AND_END
START = 5.0  # a process takes as long, on a busy machine, before it says its first word
ROOM = 15.0  # for a machine that others use too: later than with it is wrong, before it is counted
PROMPT = "What is tensor parallelism?"
ASK = ["root", "--prompt", PROMPT, "--temperature", "0", "--nthreads", "1"]
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL", "SIGSTOP")
CODES = {"SIGINT": {130, -2}, "SIGTERM": {143, -15}, "SIGKILL": {-9}, "SIGSTOP": {-9}}


@dataclass(frozen=True)
class Hit:
    """What happens, when, and to whom.

    Attributes:
        n_workers: nodes besides the root.
        workers: "relay" if they are processes of their own behind a relay, or "local".
        when: "bring-up" or "answer".
        target: a link "0-1", a public link "1", or a node "root", "worker 1".
        what: a kind of fault, or a signal.
        way: the direction of a link.
        seconds: from the root's start until a signal, in a bring-up.
        after: bytes that each data link has carried before, in an answer.
        fault: of a link.
    """

    n_workers: int
    workers: str
    when: str
    target: str
    what: str
    way: str = ""
    seconds: float = 0.0
    after: int = 0
    fault: Fault | None = None


def draw(seed: int) -> Hit:
    """The fault of a seed."""
    rng = random.Random(seed)
    n, kind = rng.randint(1, 3), rng.random()
    if kind < 0.5:
        nodes = ["root", *(f"worker {i}" for i in range(1, n + 1))]
        target, what = rng.choice(nodes), rng.choice(SIGNALS)
        # On a quiet machine a bring-up takes 1 to 3 seconds, and an answer some tenths.
        seconds, after = rng.uniform(0.0, 4.0), rng.randint(0, 20_000)
        if kind < 0.2:
            return Hit(n, "local", "bring-up", target, what, seconds=seconds)
        if kind < 0.3:
            return Hit(n, "relay", "bring-up", target, what, seconds=seconds)
        return Hit(n, "relay", "answer", target, what, after=after)
    public, way = [str(1 + i) for i in range(n)], rng.choice(["forth", "back"])
    what, size = rng.choice(KINDS), rng.randint(1, 40)
    if kind < 0.65:
        # A public link carries some hundred kilobytes of weights forth, and little back.
        fault = Fault(what, rng.randint(0, 400_000 if way == "forth" else 600), size, seed=seed)
        return Hit(n, "relay", "bring-up", rng.choice(public), what, way, fault=fault)
    links = _data_links(n)
    fault = Fault(what, rng.randint(0, 500), size, seed=seed)
    target, after = rng.choice(links + public), rng.randint(0, 20_000)
    return Hit(n, "relay", "answer", target, what, way, after=after, fault=fault)


def _data_links(n_workers: int) -> list[str]:
    return [f"{i}-{j}" for j in range(1, n_workers + 1) for i in range(j)]


def plain_answer() -> str:
    """What is said if nothing happens."""
    command = [sys.executable, "-m", "pyllama_dist", *ASK]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Start:
    """A process in a session of its own; at the end of the context it is gone."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)
        self.started = time.monotonic()

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


@dataclass(frozen=True)
class Verdict:
    """What was wrong, or nothing; and how long the root took, against what is promised."""

    wrong: str
    seconds: float = 0.0
    promised: float = STEP_SECONDS

    @property
    def late(self) -> bool:
        """Whether it was later than promised, which a busy machine may explain."""
        return self.seconds > self.promised


def session(hit: Hit, answer: str) -> Verdict:
    """Runs a session that is hit, and judges it."""
    if hit.workers == "local":
        return _local_session(hit, answer)
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay())
        command = [*relay.worker, "worker", "--port", "0", "--nthreads", "1"]
        workers = [stack.enter_context(Start(command)) for _ in range(hit.n_workers)]
        addresses = [worker.address() for worker in workers]
        names = [relay.public(str(i), address) for i, address in enumerate(addresses, start=1)]
        if hit.fault is not None and hit.when == "bring-up":
            getattr(relay.links[hit.target], hit.way).set(hit.fault)
        command = [sys.executable, "-m", "pyllama_dist", *ASK]
        command += ["--timeout", str(TIMEOUT), "--workers", *names]
        root = stack.enter_context(Start(command))
        if hit.when == "answer":
            relay.wait(
                [f"{i}-{j}" for j in range(1, hit.n_workers + 1) for i in range(j)], hit.after
            )
        if hit.fault is None:
            node = hit.target.removeprefix("worker ")
            victim = root if node == "root" else workers[int(node) - 1]
            _signal(hit, root.started, victim.process.pid)
        elif hit.when == "answer":
            getattr(relay.links[hit.target], hit.way).set(hit.fault)
        verdict = _judge(hit, root, ["the root", *names], answer)
        if not verdict.wrong:
            unhurt = [
                Address.parse(address)
                for node, address in enumerate(addresses, start=1)
                if hit.fault is not None or hit.target != f"worker {node}"
            ]
            return Verdict(_what_does_not_serve(unhurt), verdict.seconds, verdict.promised)
        return verdict


def _local_session(hit: Hit, answer: str) -> Verdict:
    command = [sys.executable, "-m", "pyllama_dist", *ASK, "--timeout", str(TIMEOUT)]
    with Start([*command, "--local-workers", str(hit.n_workers)]) as root:
        process, family = psutil.Process(root.process.pid), list[psutil.Process]()
        while time.monotonic() < root.started + hit.seconds and root.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family = process.children() or family
            time.sleep(0.02)
        node = hit.target.removeprefix("worker ")
        if node == "root":
            _signal(hit, root.started, root.process.pid)
        elif len(family) >= int(node) and family[int(node) - 1].is_running():
            _signal(hit, root.started, family[int(node) - 1].pid)
        try:
            verdict = _judge(hit, root, [], answer)
            _, left = psutil.wait_procs(family, timeout=BLAME_AND_END + ROOM)
        finally:
            for child in family:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        if left and not verdict.wrong:
            return Verdict(f"left behind: {left}")
        return verdict


def _signal(hit: Hit, started: float, pid: int) -> None:
    if hit.when == "bring-up":
        time.sleep(max(0.0, started + hit.seconds - time.monotonic()))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, hit.what))


def _judge(hit: Hit, root: Start, names: Sequence[str], answer: str) -> Verdict:
    """How a root has ended; `names` are the nodes', if they are known."""
    if (hit.target, hit.what) == ("root", "SIGSTOP"):
        # Nobody can ask more of it. Its workers find out by themselves, but those that it has
        # started end with it.
        if not names:
            root.process.kill()
        else:
            time.sleep(HEARTBEATS)
        return Verdict("")
    since = root.started if hit.when == "bring-up" else time.monotonic()
    start = START + max(0.0, hit.seconds) if hit.when == "bring-up" else 0.0
    try:
        most = start + (LONGEST if hit.when == "bring-up" else STEP_SECONDS) + ROOM
        out, err = root.process.communicate(timeout=most)
    except subprocess.TimeoutExpired:
        return Verdict(f"hangs after {most:.0f} s")
    seconds = time.monotonic() - since
    error, code = err.decode(), root.process.returncode
    phase = re.search(r"in phase (\w+)", error)
    promised = start + STEP_SECONDS
    if hit.when == "bring-up" and (phase is None or phase[1] in PHASES):
        # Without a phase: workers of its own did not start.
        promised = start + PHASES[phase[1] if phase else "START"] + BLAME_AND_END
    if seconds > promised + ROOM:
        return Verdict(f"{seconds:.1f} s in place of {promised:.1f}: {error}", seconds, promised)
    wrong = _wrong_words(hit, out.decode().rstrip("\n"), error, code, names, answer.rstrip("\n"))
    return Verdict(wrong, seconds, promised)


def _wrong_words(
    hit: Hit, said: str, error: str, code: int, names: Sequence[str], answer: str
) -> str:
    if not answer.startswith(said):
        return f"wrong text: {said!r}"
    if code == 0:
        return "" if said == answer else f"no error, and only {said!r}"
    if "Traceback" in error or "internal error" in error:
        return f"internal error, code {code}: {error}"
    if hit.target == "root":
        return "" if code in CODES[hit.what] else f"exit code {code}: {error}"
    if code != 4:
        return f"exit code {code}: {error}"
    if not names:
        return "" if re.search(r"worker|127\.0\.0\.1:\d+", error) else f"names nobody: {error}"
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


def _what_does_not_serve(addresses: Sequence[Address]) -> str:
    """Why workers do not make a session together, if they do not soon: they may still wait."""
    deadline, why = time.monotonic() + STEP_SECONDS + ROOM, ""
    while addresses and time.monotonic() < deadline:
        dialer = ZmqDialer()
        try:
            with Workers() as workers, workers.blaming():
                connect(workers, dialer, addresses)
            return ""
        except PyllamaError as error:
            why = str(error)
            time.sleep(0.2)
        finally:
            dialer.close()
    return why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of the first fault")
    chosen = parser.parse_args()
    answer, counts = plain_answer(), Counter[str]()
    longest: dict[str, float] = defaultdict(float)
    for seed in range(chosen.seed, chosen.seed + chosen.faults):
        hit = draw(seed)
        verdict = session(hit, answer)
        kind = f"{hit.workers} {hit.when} {hit.what}"
        counts[f"{kind}: {'wrong' if verdict.wrong else 'late' if verdict.late else 'right'}"] += 1
        longest[kind] = max(longest[kind], round(verdict.seconds, 1))
        if verdict.wrong or verdict.late:
            print(
                json.dumps({"seed": seed, "verdict": asdict(verdict), "hit": asdict(hit)}),
                flush=True,
            )
        left = psutil.Process().children(recursive=True)
        assert not left, left
    print(json.dumps({"counts": counts, "longest_seconds": longest}, indent=1, sort_keys=True))
    sys.exit(any(kind.endswith("wrong") for kind in counts))


if __name__ == "__main__":
    main()

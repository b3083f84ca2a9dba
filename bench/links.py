"""Nodes behind slow links, on one machine: what each way to add up partial sums is worth.

    sudo python bench/links.py --nodes 4 --rate 100mbit --shape qwen3-0.6b -p 512 -n 32

Each node has a network namespace of its own, with a link to a bridge whose rate both ends keep to
(tc-tbf(8)), and, if asked for and the kernel has it, a delay (tc-netem(8)). In them run workers and
`pyllama-dist bench`, once for each collective in each repetition, so that what else the machine
does meets all of them alike. At the end nothing is left: neither processes nor namespaces.

All nodes share this machine's cores, so computing takes longer than it would on machines of their
own, and makes the ratios look smaller than they would be there. Needs root and iproute2.

Measured with 4 nodes of one thread on two busy cores, links of 100 Mbit/s, 12 layers of qwen3-0.6b,
partial sums in float32, pp512: direct 27.2 t/s, reduce-scatter 48.8, 1.8 times as many.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median

from pyllama_dist.net.collectives import ALGORITHMS, AUTO

PYLLAMA = [sys.executable, "-m", "pyllama_dist"]
PREFIX = f"links{os.getpid()}"
SWITCH = f"{PREFIX}-switch"
PORT = 9990
START_SECONDS, END_SECONDS = 120.0, 10.0


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def namespace(node: int) -> str:
    return f"{PREFIX}-{node}"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def shape_link(where: str, link: str, rate: str, delay: str | None) -> None:
    """Limits what leaves through one end of a link; an eighth of a second may wait for its turn."""
    tc = ("ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", link)
    run(*tc, "root", "handle", "1:", "tbf", "rate", rate, "burst", "64kb", "latency", "125ms")
    if delay is not None:
        run(*tc, "parent", "1:1", "netem", "delay", delay, "limit", "10000")


@contextmanager
def network(nodes: int, rate: str, delay: str | None) -> Iterator[None]:
    """Namespaces for a bridge and for each node, and the links between them."""
    made = [SWITCH, *map(namespace, range(nodes))]
    try:
        for name in made:
            run("ip", "netns", "add", name)
        run("ip", "-n", SWITCH, "link", "add", "name", "bridge0", "type", "bridge")
        run("ip", "-n", SWITCH, "link", "set", "bridge0", "up")
        for node in range(nodes):
            here, port = namespace(node), f"port{node}"
            link = ("ip", "-n", SWITCH, "link")
            run(*link, "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", here)
            run(*link, "set", port, "master", "bridge0", "up")
            run("ip", "-n", here, "addr", "add", f"{address(node)}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                run("ip", "-n", here, "link", "set", name, "up")
            shape_link(here, "eth0", rate, delay)
            shape_link(SWITCH, port, rate, None)
        yield
    finally:
        for name in made:  # links go with their namespaces
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def worker(node: int) -> Iterator[None]:
    """A worker in its namespace, which listens; it ends with the context."""
    command = ["ip", "netns", "exec", namespace(node), *PYLLAMA, "worker", "--nthreads", "1"]
    command += ["--host", address(node), "--port", str(PORT), "--trust-network"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        assert process.stderr is not None
        while "listens on" not in (line := process.stderr.readline()):
            if not line or time.monotonic() > deadline:
                sys.exit(f"worker {node} did not start")
        os.set_blocking(process.stderr.fileno(), False)  # nobody reads on; a line more is lost
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bench(collective: str, nodes: int, args: Sequence[str]) -> dict[str, dict[str, object]]:
    """One run of `pyllama-dist bench` by the root: its tests by name."""
    command = ["ip", "netns", "exec", namespace(0), *PYLLAMA, "bench", "-o", "json", "-r", "1"]
    command += ["--nthreads", "1", "--collective", collective, *args, "--workers"]
    command += [f"{address(node)}:{PORT}" for node in range(1, nodes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench with {collective}: {done.stderr.strip()}")
    return {test["test"]: test for test in json.loads(done.stdout)["tests"]}


def table(results: dict[str, list[dict[str, dict[str, object]]]]) -> str:
    """A line for each test and collective: median t/s, against `direct`, and the root's traffic."""
    lines = [("test", "collective", "t/s", "of direct", "kB sent, received", "messages")]
    for test in results["direct"][0]:
        rates = {
            name: median(float(str(run[test]["tokens_per_second"])) for run in runs)
            for name, runs in results.items()
        }
        for name, runs in results.items():
            found = runs[0][test]
            sent, received, messages = (
                found[f"{what}_per_token"][0]  # type: ignore[index]
                for what in ("kb_sent", "kb_received", "messages")
            )
            ratio = rates[name] / rates["direct"]
            traffic = f"{sent:.1f}, {received:.1f}", f"{messages:.1f}"
            lines.append((test, name, f"{rates[name]:.2f}", f"{ratio:.2f}", *traffic))
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Further options are those of `bench`."
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rate", default="100mbit", help="of each link, as tc writes it")
    parser.add_argument("--delay", help="of what a node sends, as tc writes it: 1ms")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--collectives", nargs="+", default=[*ALGORITHMS, AUTO])
    args, rest = parser.parse_known_args()
    if not 2 <= args.nodes <= 200 or not re.fullmatch(r"[0-9.]+[a-z]+", args.rate):
        parser.error("2 to 200 nodes, and a rate like 100mbit")
    collectives = dict.fromkeys(("direct", *args.collectives))
    results: dict[str, list[dict[str, dict[str, object]]]] = {name: [] for name in collectives}
    with ExitStack() as stack:
        stack.enter_context(network(args.nodes, args.rate, args.delay))
        for node in range(1, args.nodes):
            stack.enter_context(worker(node))
        for repetition in range(args.repetitions):
            for name in collectives:
                results[name].append(bench(name, args.nodes, rest))
                print(f"repetition {repetition + 1}: {name}", file=sys.stderr)
    print(f"{args.nodes} nodes, links of {args.rate}, delay {args.delay or 0}; {' '.join(rest)}\n")
    print(table(results))


if __name__ == "__main__":
    main()

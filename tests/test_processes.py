"""Real processes: killed, stopped, interrupted, talked to in nonsense."""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
import zmq

from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.config import Arch, FloatType, ModelConfig
from pyllama_dist.formats.dllama import header
from pyllama_dist.formats.dllama.model_file import tensor_bytes, write_model
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.net.frames import HARD_LIMIT, MAX_CONTROL, encode, seal, unseal
from pyllama_dist.net.messages import PROTOCOL, Welcome
from pyllama_dist.node_info import node_info

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

PYLLAMA = [sys.executable, "-m", "pyllama_dist"]
# A worker that has no names: all connections to it are TCP.
ELSEWHERE = """
from pyllama_dist.cli import main
from pyllama_dist.net.zeromq import endpoints
endpoints._bind_name = lambda socket: ""
main()
"""
LONG = ["--prompt", "hello", "--temperature", "0", "--nthreads", "1"]


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A random model that never ends an answer before its context of 30,000 positions is full."""
    directory = tmp_path_factory.mktemp("endless")
    config = ModelConfig(
        Arch.GLM4, 64, 288, 3, 8, 2, 32, 16, 1280, 30000, 1e4, 1e-5, True, FloatType.Q40
    )
    tensors = ARCHITECTURES[config.arch].tensors(config)
    rng = np.random.default_rng(0)

    def data(tensor):
        shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
        yield (rng.standard_normal(shape) * 0.3).astype(np.float32)

    write_model(directory / "model.m", config, tensors, data, lambda nbytes: None)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(BUILTIN / name, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [99999]}')
    return directory


class Process:
    """A command, what it has printed, and its certain end."""

    def __init__(self, *args: str, command: list[str] = PYLLAMA) -> None:
        self.process = subprocess.Popen(
            [*command, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self, pattern: str, stream: str = "stderr", timeout: float = 60) -> re.Match[str]:
        """Reads until the pattern has been printed."""
        pipe = getattr(self.process, stream)
        text, deadline = "", time.monotonic() + timeout
        while not (found := re.search(pattern, text)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {text!r}"
            ready, _, _ = select.select([pipe], [], [], left)
            chunk = os.read(pipe.fileno(), 65536) if ready else b""
            assert chunk or not ready, f"ended without {pattern!r}: {text!r}"
            text += chunk.decode()
        return found

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        """Waits for the end: exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out.decode(), err.decode()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate(timeout=10)


@pytest.fixture
def run() -> Iterator[object]:
    """Starts commands, and ends what is left of them."""
    started: list[Process] = []

    def start(*args: str, **how: list[str]) -> Process:
        started.append(Process(*args, **how))
        return started[-1]

    yield start
    for process in started:
        process.stop()
    children = psutil.Process().children(recursive=True)
    assert not children, f"left behind: {children}"


@pytest.fixture
def worker(run):
    """Starts workers on free ports, or as on another machine; their address is `.address`."""

    def start(*args: str, elsewhere: bool = False) -> Process:
        command = [sys.executable, "-c", ELSEWHERE] if elsewhere else PYLLAMA
        process = run("worker", "--port", "0", "--nthreads", "1", *args, command=command)
        process.address = process.output(r"listens on (\S+),")[1]
        return process

    return start


def root(*args: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PYLLAMA, "root", *args], capture_output=True, text=True, timeout=60, **settings
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error of a command: one line, no traceback, an exit code other than 0."""
    assert result.returncode not in (0, 1), result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def answers(*workers: Process) -> None:
    """The workers serve: a root gets an answer from all of them."""
    addresses = [process.address for process in workers]
    result = root("--prompt", "What is 2 + 2?", "--json", "--workers", *addresses)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["nodes"] == len(workers) + 1


@pytest.mark.parametrize("elsewhere", [(False, False), (True, False), (True, True)])
def test_a_root_and_two_workers_by_hand_one_root_after_the_other(worker, elsewhere):
    one, two = (worker(elsewhere=far) for far in elsewhere)
    answers(one, two)
    answers(two, one)
    answers(one)


def test_workers_serve_the_next_root_after_one_was_killed(worker, run, endless):
    one, two = worker(), worker()
    first = run("root", "--model", str(endless), *LONG, "--workers", one.address, two.address)
    first.output(r"\S", "stdout")
    first.process.kill()
    for process in (one, two):
        process.output(r"lost the root: .* listening again")
    answers(one, two)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_named_within_seconds(worker, run, endless, victim, elsewhere):
    workers = [worker(elsewhere=elsewhere), worker(elsewhere=elsewhere)]
    asking = run("root", "--model", str(endless), *LONG, "--workers", *(w.address for w in workers))
    asking.output(r"\S", "stdout")
    workers[victim].process.kill()
    code, _, said = asking.end(timeout=5)  # what users are promised
    assert code == 4
    assert f"error: lost worker {workers[victim].address} in phase STEP" in said
    assert "start its worker again" in said
    workers[1 - victim].output("listening again")
    answers(workers[1 - victim])


def test_a_stopped_worker_is_found_and_serves_again_later(worker, run, endless):
    one, two = worker(), worker()  # the storm stops those that TCP alone reaches
    asking = run("root", "--model", str(endless), *LONG, "--workers", one.address, two.address)
    asking.output(r"\S", "stdout")
    os.kill(two.pid, signal.SIGSTOP)
    code, _, said = asking.end(timeout=40)
    os.kill(two.pid, signal.SIGCONT)
    assert code == 4
    assert f"error: lost worker {two.address} in phase STEP" in said
    two.output("listening again")
    answers(one, two)


def test_the_deadline_of_a_step_counts(worker, run, endless):
    one = worker()
    asking = run(
        "root", "--model", str(endless), *LONG, "--timeout", "1.5", "--workers", one.address
    )
    asking.output(r"\S", "stdout")
    os.kill(one.pid, signal.SIGSTOP)
    code, _, said = asking.end(timeout=40)
    os.kill(one.pid, signal.SIGCONT)
    assert code == 4
    assert f"lost worker {one.address} in phase STEP: sent nothing for 2 s (step" in said


@pytest.mark.parametrize("moment", ["answer", "start"])
def test_interrupting_a_root_leaves_no_process(run, endless, moment):
    asking = run("root", "--model", str(endless), *LONG, "--local-workers", "2")
    if moment == "answer":
        asking.output(r"\S", "stdout")
    else:
        time.sleep(0.7)  # somewhere in between: interpreters start, nodes meet
    family = psutil.Process(asking.pid).children(recursive=True)
    os.kill(asking.pid, signal.SIGINT)
    code, _, said = asking.end(timeout=20)
    assert code == 130
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_local_workers_end_with_a_root_that_was_killed(run, endless):
    asking = run("root", "--model", str(endless), *LONG, "--local-workers", "2")
    asking.output(r"\S", "stdout")
    family = psutil.Process(asking.pid).children(recursive=True)
    assert len(family) == 2
    asking.process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_worker_ends_on_interrupt_and_on_terminate(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = worker()
        os.kill(process.pid, number)
        code, _, said = process.end()
        assert code == 0
        assert "worker ends" in said


def test_nobody_there(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = one_line(root("--prompt", "hi", "--workers", address))
    assert f"nobody answers at {address}" in said
    assert "pyllama-dist worker --port" in said


def test_somebody_else_is_there(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        said = one_line(root("--prompt", "hi", "--workers", address))
    assert address in said


def test_a_port_in_use(worker, run):
    port = worker().address.rpartition(":")[2]
    code, _, said = run("worker", "--port", port).end()
    assert code == 4
    (line,) = said.strip().splitlines()
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "choose another --port" in line


def test_listening_beyond_this_machine_takes_a_word(run):
    code, _, said = run("worker", "--host", "0.0.0.0", "--port", "0").end()
    assert code == 2
    assert "--trust-network" in said


def test_a_second_root_is_told_that_the_worker_is_busy(worker, run, endless):
    one = worker()
    first = run("root", "--model", str(endless), *LONG, "--workers", one.address)
    first.output(r"\S", "stdout")
    said = one_line(root("--prompt", "hi", "--workers", one.address))
    assert "busy" in said
    assert one.address in said
    os.kill(first.pid, signal.SIGINT)
    first.end()
    one.output("listening again")
    answers(one)


class Stranger:
    """Speaks ZeroMQ to a worker, but not our protocol."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"tcp://{address}")

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *args: object) -> None:
        self.socket.close()

    def ask(self, *frames: bytes) -> dict[str, object]:
        self.socket.send_multipart(frames)
        assert self.socket.poll(10_000), "no answer"
        return msgpack.unpackb(unseal(self.socket.recv()))


def hello(protocol: int) -> bytes:
    fields = {"type": "hello", "protocol": protocol, "version": "9.9", "session": bytes(16)}
    return seal(msgpack.packb(fields))


def test_a_root_of_another_protocol_version_is_told_both_versions(worker):
    one = worker()
    with Stranger(one.address) as stranger:
        answer = stranger.ask(hello(99))
    assert answer["type"] == "error"
    assert "protocol 99" in answer["message"]
    assert "install the same version" in answer["message"]
    one.output("protocol 99")
    answers(one)


def test_a_worker_of_another_protocol_version_is_named():
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    asking = Process("root", "--prompt", "hi", "--workers", f"127.0.0.1:{port}")
    try:
        assert router.poll(30_000)
        identity, _ = router.recv_multipart()
        router.send_multipart([identity, encode(Welcome(99, "9", bytes(16), node_info(1)))])
        code, _, said = asking.end()
    finally:
        asking.stop()
        router.close()
    assert code == 4
    assert f"worker 127.0.0.1:{port} speaks protocol 99" in said


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [random.Random(1).randbytes(1000)],
        [hello(PROTOCOL)[:-5]],
        [seal(msgpack.packb({"type": "step"}))],
        [seal(msgpack.packb([1, 2, 3]))],
        [hello(PROTOCOL), b"x", b"y"],
        [b"\x00" * (MAX_CONTROL + 1)],
    ],
    ids=["empty", "reserved", "random", "unsealed", "incomplete", "array", "frames", "large"],
)
def test_nonsense_is_answered_with_an_error_and_the_worker_serves_on(worker, frames):
    one = worker()
    with Stranger(one.address) as stranger:
        answer = stranger.ask(*frames)
        assert answer["type"] == "error"
        assert answer["message"]
        one.output("refused a peer at 127.0.0.1: ")
        answers(one)


def test_random_bytes_and_frames_above_the_hard_limit_do_not_disturb_a_worker(worker):
    one = worker()
    host, port = one.address.split(":")
    for seed in range(5):
        with socket.create_connection((host, int(port))) as raw, contextlib.suppress(OSError):
            raw.sendall(random.Random(seed).randbytes(5000))
            raw.settimeout(2)
            while raw.recv(4096):
                pass
    one.output(r"dropped \d+ connections to .* do not speak ZeroMQ")
    with Stranger(one.address) as stranger:
        stranger.socket.send(bytes(HARD_LIMIT + 1))
        assert not stranger.socket.poll(500)
        answers(one)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_strangers_at_all_ports_do_not_disturb_a_session(worker, run, endless, elsewhere):
    """More of them than the events that a monitor holds unread."""
    one = worker(elsewhere=elsewhere)
    asking = run("root", "--model", str(endless), *LONG, "--workers", one.address)
    asking.output(r"\S", "stdout")
    process = psutil.Process(one.pid)
    ports = [
        connection.laddr
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    names = [
        "\0" + connection.laddr[1:]
        for connection in process.net_connections("unix")
        if connection.laddr.startswith("@pyllama-dist-")
    ]
    # The public port, and the root's endpoint: a port, and a name by which it has come.
    assert (len(ports), len(names)) == (2, 0 if elsewhere or sys.platform != "linux" else 2)
    for _ in range(700):
        for address in (*ports, *names[:1]):
            family = socket.AF_UNIX if address in names else socket.AF_INET
            with socket.socket(family) as stranger:
                stranger.connect(address)
    asking.output(r"(?s).{2000}", "stdout")
    os.kill(asking.pid, signal.SIGINT)
    assert asking.end()[0] == 130
    one.output("listening again")
    answers(one)


def test_a_root_that_goes_while_weights_are_sent_is_noticed(worker):
    """Somebody who meets a worker as a root would, and then is gone."""
    one = worker()
    context = zmq.Context()
    public = context.socket(zmq.DEALER)
    public.connect(f"tcp://{one.address}")

    def ask(answer: str, **fields: object) -> dict[str, object]:
        public.send(seal(msgpack.packb(fields)))
        assert public.poll(10_000)
        found = msgpack.unpackb(unseal(public.recv()))
        assert found["type"] == answer, found
        return found

    session = bytes(16)
    ask("welcome", type="hello", protocol=PROTOCOL, version="0", session=session)
    ((port, _),) = ask("bound", type="join", node=1, n_nodes=2)["endpoints"]
    data = context.socket(zmq.PAIR)
    data.connect(f"tcp://127.0.0.1:{port}")
    data.send(seal(msgpack.packb({"type": "link", "session": session, "node": 0})))
    ask("meshed", type="peers", addresses=["the root", one.address], endpoints=[])
    context.destroy(linger=0)
    one.output("lost the root: .* in phase NET; listening again", timeout=10)
    answers(one)


def test_a_worker_starts_without_the_libraries_of_the_root(worker):
    """Everything is imported by then: neither text nor checkpoints are."""
    one = worker()
    answers(one)
    maps = Path(f"/proc/{one.pid}/maps").read_text()
    assert "tokenizers" not in maps
    assert "safetensors" not in maps


@pytest.fixture
def hollow(tmp_path):
    """GLM-4-9B's shape with one layer and half the vocabulary: all zeros, in a file of holes."""
    config = ModelConfig(
        Arch.GLM4, 4096, 13696, 1, 32, 2, 128, 64, 65536, 8192, 1e4, 1e-5, True, FloatType.Q40
    )
    tensors = ARCHITECTURES[config.arch].tensors(config)
    start = header.encode(config)
    with (tmp_path / "model.m").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(map(tensor_bytes, tensors)))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(BUILTIN / name, tmp_path)
    return tmp_path, sum(tensor_bytes(t) for t in tensors if t.float_type is FloatType.Q40)


def own_memory(pid: int) -> int:
    """Bytes that a process holds itself, mapped files not counted."""
    (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


def test_nodes_hold_their_slices_and_the_root_no_embedding(worker, run, hollow):
    directory, matrices = hollow
    one = worker()
    asking = run(
        "root", "--model", str(directory), *LONG, "--max-seq-len", "512", "--workers", one.address
    )
    asking.output(r"\S", "stdout")
    room = 250_000_000
    assert own_memory(one.pid) < matrices / 2 + room
    assert own_memory(asking.pid) < matrices / 2 + room  # the embedding has 1.07 GB


def test_the_whole_way_with_local_workers():
    result = root("--prompt", "hello", "--local-workers", "2", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["nodes"] == 3
    assert answer["finish_reason"] == "stop"
    assert answer["text"]
    assert "demonstration" in result.stderr


def state(pid: int) -> str:
    """What /proc says of a process: T is stopped; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return ""


def child(asking: Process) -> psutil.Process:
    """The local worker of a root, as soon as there is one."""
    while not (children := psutil.Process(asking.pid).children()):
        time.sleep(0.01)
    return children[0]


# A root that gives its local workers two seconds to start.
HASTY = """
from pyllama_dist.cli import main
from pyllama_dist.cluster import local_workers
local_workers._START_SECONDS = 2.0
main()
"""


def test_a_local_worker_stopped_while_it_starts_is_given_up_and_killed(run):
    command = [sys.executable, "-c", HASTY]
    asking = run("root", "--prompt", "hi", "--local-workers", "1", command=command)
    started = child(asking)
    started.suspend()
    code, _, said = asking.end(timeout=40)
    assert code == 4
    assert "a local worker did not start: not ready after 2 s" in said
    assert not state(started.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_local_worker_ends_with_its_root(run, endless, number):
    asking = run("root", "--model", str(endless), *LONG, "--local-workers", "1")
    asking.output(r"\S", "stdout")
    stopped = child(asking)
    stopped.suspend()
    os.kill(asking.pid, number)
    code, _, _ = asking.end(timeout=15)
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    deadline = time.monotonic() + 5
    while state(stopped.pid) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(stopped.pid) in ("", "Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_ended_in_a_session_says_so(worker, run, endless, number):
    one = worker()
    asking = run("root", "--model", str(endless), *LONG, "--workers", one.address)
    asking.output(r"\S", "stdout")
    os.kill(one.pid, number)
    assert one.end(timeout=10)[0] == 0
    code, _, said = asking.end(timeout=10)
    assert code == 4
    assert f"worker {one.address} in phase" in said
    assert "it was ended" in said


# ^C passes through code made of a string, as in `exec` of a library, and is caught.
PASSING = """
import signal, sys
from pyllama_dist import cli
def run(**how):
    exec("import signal; signal.raise_signal(signal.SIGINT)")
cli.group = run
cli.main()
"""


def test_an_interrupted_command_ends_with_130_whatever_was_interrupted(run):
    code, _, said = run(command=[sys.executable, "-c", PASSING]).end()
    assert (code, said) == (130, "interrupted\n")


def test_brackets_around_an_ipv6_host_are_taken(run):
    one = run("worker", "--host", "[::1]", "--port", "0", "--nthreads", "1")
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        one.address = one.output(r"listens on (\[::1\]:\d+),")[1]
        answers(one)


def free_ports(count: int) -> list[int]:
    """Ports that follow each other, free now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            start = first.getsockname()[1]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            for port in range(start, start + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(range(start, start + count))


def test_data_ports_can_be_chosen(worker, run, endless):
    ports = free_ports(2)
    one = worker(elsewhere=True)
    two = worker("--data-ports", f"{ports[0]}-{ports[1]}", elsewhere=True)
    asking = run("root", "--model", str(endless), *LONG, "--workers", one.address, two.address)
    asking.output(r"\S", "stdout")
    listening = {
        connection.laddr.port
        for connection in psutil.Process(two.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert set(ports) < listening
    os.kill(asking.pid, signal.SIGINT)
    asking.end()
    two.output("listening again")
    three = worker("--data-ports", f"{ports[0]}-{ports[0]}")
    said = one_line(root("--prompt", "hi", "--workers", one.address, three.address))
    assert f"worker {three.address} in phase PEERS: no port is free in --data-ports" in said


@pytest.mark.parametrize("ports", ["9991", "0-5", "9-8", "1-70000", "a-b"])
def test_data_ports_that_are_no_range(run, ports):
    code, _, said = run("worker", "--data-ports", ports).end()
    assert code == 2
    assert f"--data-ports '{ports}' is no range of ports" in said


# A worker behind a firewall: its data ports swallow whoever comes.
FIREWALL = """
import socket
from pyllama_dist import worker
from pyllama_dist.cli import main
from pyllama_dist.cluster import connect
from pyllama_dist.net.zeromq.mesh import ZmqMesh
worker._GREET_SECONDS = 2.0
silent = socket.create_server(("127.0.0.1", 0), backlog=0)
port = silent.getsockname()[1]
bind = ZmqMesh.bind
ZmqMesh.bind = lambda mesh, nodes: [(port, "") for _ in bind(mesh, nodes)]
main()
"""


def test_a_data_port_that_cannot_be_reached_is_named_and_a_firewall(run):
    one = run("worker", "--port", "0", command=[sys.executable, "-c", FIREWALL])
    one.address = one.output(r"listens on (\S+),")[1]
    said = one_line(root("--prompt", "hi", "--workers", one.address))
    assert f"the link the root - {one.address}" in said
    assert re.search(rf"does a firewall close port \d+ of {one.address}\?", said)
    assert "--data-ports" in said

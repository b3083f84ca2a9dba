"""Clusters in threads: any number of nodes computes the same, and workers outlive their roots."""

from contextlib import contextmanager

import numpy as np
import pytest
from msgspec.structs import replace

from pyllama_dist import worker as worker_module
from pyllama_dist.cluster import bring_up as bring_up_module
from pyllama_dist.cluster.bring_up import bring_up
from pyllama_dist.config import Arch, FloatType
from pyllama_dist.errors import NodeError, ProtocolError
from pyllama_dist.executor import make_executor
from pyllama_dist.net.frames import HEAD, checksum, write_head
from pyllama_dist.net.inproc import Hub
from pyllama_dist.net.messages import (
    PROTOCOL,
    Allocated,
    Bound,
    Bye,
    Error,
    Hello,
    Join,
    Meshed,
    Net,
    Peers,
    Phase,
    Ready,
    Step,
    WeightPart,
    WeightsEnd,
    Welcome,
)
from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.node_info import node_info
from pyllama_dist.program import Batch, weights
from pyllama_dist.simulate import simulated_root
from tests.tiers import slow_but

TOKENS = (5, 9, 2, 100, 0, 9, 77)
NODES = (2, 3, 4, 5, 8)

pytestmark = pytest.mark.timeout(60)


@contextmanager
def cluster(model, n_nodes, sync=FloatType.F32, n_threads=1, **limits):
    programs = model.programs(n_nodes, sync=sync, **limits)
    with simulated_root(model, programs, n_threads, timeout=20) as root:
        yield root


def conversation(root, run_of):
    """A prompt, then two tokens more: the logits of all of them."""
    steps = [(TOKENS, 0), ((31,), len(TOKENS)), ((8,), len(TOKENS) + 1)]
    found = [root.step(tokens, run_of(start, tokens)).copy() for tokens, start in steps]
    return np.concatenate(found)


def difference(found, expected):
    """The largest one, as a part of the spread of logits."""
    return np.abs(found - expected).max() / expected.std()


@pytest.fixture
def executors(monkeypatch):
    """The executors of all nodes, by node, as they are made."""
    made = {}

    def recorded(program, n_threads):
        made[program.node] = make_executor(program, n_threads)
        return made[program.node]

    monkeypatch.setattr(bring_up_module, "make_executor", recorded)
    monkeypatch.setattr(worker_module, "make_executor", recorded)
    return made


@pytest.fixture(scope="module")
def alone(tiny, run_of):
    """The logits of one node, by model."""
    known = {}

    def logits(model):
        if model not in known:
            with cluster(model, 1) as root:
                known[model] = conversation(root, run_of)
        return known[model]

    return logits


# --- cutting a model changes nothing


@pytest.mark.parametrize("arch", list(Arch))
@pytest.mark.parametrize("n_nodes", slow_but([3], NODES))
def test_any_number_of_nodes_computes_the_same(tiny, run_of, alone, arch, n_nodes):
    model = tiny(arch=arch)
    with cluster(model, n_nodes) as root:
        assert difference(conversation(root, run_of), alone(model)) < 1e-4


@pytest.mark.parametrize("weights_type", [FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("n_nodes", slow_but([3], NODES))
def test_quantized_weights_are_cut_between_blocks(tiny, run_of, alone, weights_type, n_nodes):
    model = tiny(weights=weights_type)
    with cluster(model, n_nodes) as root:
        # A sum in another order may round an activation to the other side.
        assert difference(conversation(root, run_of), alone(model)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(Arch))
@pytest.mark.parametrize("n_nodes", slow_but([3], NODES))
def test_q80_sync_costs_little(tiny, run_of, alone, arch, n_nodes):
    model = tiny(arch=arch)
    with cluster(model, n_nodes, FloatType.Q80) as root:
        cost = difference(conversation(root, run_of), alone(model))
    # Where experts are chosen, a near tie may fall to another one.
    assert 1e-5 < cost < (1.0 if model.config.experts else 0.15)


@pytest.mark.parametrize("sync", [FloatType.F32, FloatType.Q80])
@pytest.mark.parametrize("n_nodes", slow_but([3], NODES))
def test_all_nodes_hold_the_same_residual(tiny, run_of, executors, sync, n_nodes):
    model = tiny(weights=FloatType.Q40)
    with cluster(model, n_nodes, sync) as root:
        conversation(root, run_of)
        residuals = [executors[node].memory.pipes["x"].f32(0, 1).copy() for node in range(n_nodes)]
    assert np.abs(residuals[0]).max() > 0
    for residual in residuals[1:]:
        np.testing.assert_array_equal(residual, residuals[0])


def test_nodes_with_several_threads(tiny, run_of, alone):
    model = tiny()
    with cluster(model, 3, n_threads=2) as root:
        assert difference(conversation(root, run_of), alone(model)) < 1e-4


@pytest.mark.parametrize("vocab_size", [3, 101])
@pytest.mark.parametrize("kernels", ["portable", "reference"])
def test_nodes_without_a_part_of_the_ffn_or_the_vocabulary(
    tiny, run_of, monkeypatch, vocab_size, kernels
):
    monkeypatch.setenv("PYLLAMA_KERNELS", kernels)
    model = tiny(arch=Arch.GLM, ffn_dim=32, vocab_size=vocab_size, weights=FloatType.Q40)
    empty = [w for w in weights(model.programs(5)[4]) if 0 in w.shape]
    assert {w.tensor.split(".")[-2] for w in empty} >= {"gate_proj", "up_proj", "down_proj"}
    tokens = (0, 1, 2) * 9
    limits = {"max_rows": 27, "max_logits": 27}
    with cluster(model, 1, **limits) as one, cluster(model, 5, **limits) as five:
        for n_rows in (3, 27):  # the latter are enough for AMX
            some = tokens[:n_rows]
            expected = one.step(some, run_of(0, some))
            found = five.step(some, run_of(0, some))
            assert found.shape == (n_rows, vocab_size)
            assert difference(found, expected) < 0.1


def test_steps_without_logits(tiny, run_of, alone):
    model = tiny()
    quiet = Batch((0,) * len(TOKENS), tuple(range(len(TOKENS))), ())
    with cluster(model, 3) as root:
        assert root.step(TOKENS, quiet).shape == (0, 101)
        found = root.step((31,), run_of(len(TOKENS), (31,)))
        assert difference(found, alone(model)[len(TOKENS) : len(TOKENS) + 1]) < 1e-4


def test_the_number_of_the_step_wraps(tiny, run_of, alone):
    model = tiny()
    with cluster(model, 2) as root:
        root._number = (1 << 32) - 2
        assert difference(conversation(root, run_of), alone(model)) < 1e-4
        assert root._number == 1


def test_bytes_of_weights_and_exchanges_are_counted(tiny, run_of, serving):
    model, placed = tiny(), []
    programs = model.programs(3)
    hub = Hub()
    with (
        serving(hub, 2) as addresses,
        bring_up(
            model,
            lambda nodes: programs,
            n_threads=1,
            dialer=hub,
            workers=addresses,
            progress=lambda done, total: placed.append((done, total)),
        ) as root,
    ):
        total = sum(w.nbytes for program in programs for w in weights(program))
        assert placed[-1] == (total, total)
        root.step((1,), run_of(0, (1,)))
        dim, vocab, head = 64, 101, 22
        to_workers = 2 * (4 * dim + head)
        sums = 2 * 2 * 4 * (4 * dim + head)  # layers, halves of a layer; to two and from two
        logits = 4 * (vocab - 34) + 2 * head
        assert root.node.spent.bytes_moved == to_workers + sums + logits


# --- a session that fails


@contextmanager
def served(serving, model, count=1):
    """Workers that must still serve a root when the test is over."""
    hub = Hub()
    with serving(hub, count) as addresses:
        yield hub, addresses
        with connect(model, hub, addresses) as root:
            assert root.step((1,), Batch((0,), (0,), (0,))).shape == (1, 101)


def connect(model, hub, addresses):
    return bring_up(
        model,
        lambda nodes: model.programs(len(nodes)),
        n_threads=1,
        timeout=20,
        dialer=hub,
        workers=addresses,
    )


def test_a_worker_serves_one_root_after_the_other(tiny, run_of, serving, alone):
    model = tiny()
    with served(serving, model, 2) as (hub, addresses):
        for _ in range(3):
            with connect(model, hub, addresses) as root:
                assert difference(conversation(root, run_of), alone(model)) < 1e-4


def test_a_root_that_goes_in_the_middle_of_a_step(tiny, run_of, serving):
    model = tiny()
    with served(serving, model, 2) as (hub, addresses):
        root = connect(model, hub, addresses)
        root.step((1,), run_of(0, (1,)))
        for channel in root._workers.channels:
            channel.send(Step(2, run_of(1, (1,))))
        root.close(KeyboardInterrupt())


def test_a_root_that_leaves_without_a_word(tiny, serving):
    model = tiny()
    with served(serving, model, 2) as (hub, addresses):
        root = connect(model, hub, addresses)
        for channel in root._workers.channels:
            channel.close()
        root._workers.channels = []
        root.close()


@pytest.mark.parametrize("error", [NodeError("it is too hot"), MemoryError()])
@pytest.mark.parametrize("segment", [0, 3])
def test_a_worker_that_fails_in_a_step_says_why(tiny, run_of, serving, monkeypatch, error, segment):
    model = tiny()
    with served(serving, model, 2) as (hub, addresses), monkeypatch.context() as patch:

        def failing(program, n_threads):
            executor = make_executor(program, n_threads)
            run = executor.run

            def fail(i):
                if program.node == 2 and i == segment:
                    raise error
                run(i)

            executor.run = fail
            return executor

        patch.setattr(worker_module, "make_executor", failing)
        root = connect(model, hub, addresses)
        reason = "it is too hot" if isinstance(error, NodeError) else "out of memory"
        with pytest.raises(NodeError, match=f"{addresses[1]} in phase STEP: {reason}"), root:
            root.step(TOKENS, run_of(0, TOKENS))


def test_a_batch_that_does_not_fit_is_refused_before_it_is_sent(tiny, serving, run_of):
    model = tiny()
    with served(serving, model) as (hub, addresses), connect(model, hub, addresses) as root:
        with pytest.raises(ProtocolError, match="position 32 of 32"):
            root.step((1,), Batch((0,), (32,), ()))
        assert root.step((1,), run_of(0, (1,))).shape == (1, 101)


def test_a_worker_of_another_protocol_is_named(tiny, serving, monkeypatch):
    model = tiny()
    with served(serving, model) as (hub, addresses), monkeypatch.context() as patch:
        patch.setattr(worker_module, "PROTOCOL", PROTOCOL + 1)
        versions = f"protocol {PROTOCOL} .* worker {PROTOCOL + 1} .*install the same version"
        with pytest.raises(NodeError, match=versions):
            connect(model, hub, addresses)


def test_a_welcome_of_another_protocol_is_named(tiny):
    hub = Hub()
    listener = hub.listen()
    address = Address("inproc", listener.port)

    class Foreign:
        """A worker that answers hello with a later version."""

        def connect(self, address):
            channel = hub.connect(address)
            send = channel.send

            def answered(message):
                channel.send = send
                send(message)
                other, _ = listener.accept()
                other.send(Welcome(PROTOCOL + 1, "9.9", bytes(16), node_info(1)))

            channel.send = answered
            return channel

    model = tiny()
    said = f"{address} speaks protocol {PROTOCOL + 1} .*9.9.*same version"
    with pytest.raises(NodeError, match=said):
        bring_up(model, lambda nodes: [], n_threads=1, dialer=Foreign(), workers=[address])


def test_a_source_that_fails_ends_the_session(tiny, serving, monkeypatch):
    model = tiny()
    with served(serving, model, 2) as (hub, addresses), monkeypatch.context() as patch:
        patch.setattr(model, "drop_pages", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            connect(model, hub, addresses)


# --- a worker's answers, message by message


class Talk:
    """A root's end of a conversation with one worker, step by step."""

    def __init__(self, hub, address, program):
        self.hub, self.program = hub, program
        self.channel, self.mesh = hub.connect(address), hub.mesh()
        self.names = ["the root", str(address)]
        self.session = bytes(range(16))

    def ask(self, message, kind, raw=None):
        self.channel.send(message, raw)
        answer, _ = self.channel.receive(10)
        assert isinstance(answer, kind), answer
        return answer

    def refused(self, message, raw=None):
        """The reason that the worker gives; then it must be gone."""
        error = self.ask(message, Error, raw)
        with pytest.raises(LostError):
            self.channel.receive(10)
        return error

    def meshed(self):
        self.ask(Hello(PROTOCOL, "test", self.session), Welcome)
        endpoints = self.ask(Join(1, 2), Bound).endpoints
        self.channel.send(Peers(tuple(self.names), ()))
        self.mesh.connect({1: ("inproc", endpoints[0])})
        self.mesh.greet(self.session, 0, self.names, 10)
        assert isinstance(self.channel.receive(10)[0], Meshed)
        return self

    def allocated(self):
        self.meshed()
        self.ask(Net(self.program, "direct", 10.0), Allocated)
        return self

    def ready(self):
        self.allocated()
        for i, weight in enumerate(weights(self.program)):
            data = bytes(weight.nbytes)
            self.channel.send(WeightPart(i, 0, checksum(data)), data)
        self.ask(WeightsEnd(), Ready)
        return self

    def close(self):
        self.channel.close()
        self.mesh.close()


@pytest.fixture
def talk(tiny, serving):
    model = tiny()
    with served(serving, model) as (hub, addresses):
        talk = Talk(hub, addresses[0], model.programs(2)[1])
        yield talk
        talk.close()


def test_a_root_of_another_protocol_is_told_both_versions(talk):
    error = talk.refused(Hello(7, "9.9", talk.session))
    assert error.phase is Phase.HELLO
    assert f"protocol 7 (pyllama-dist 9.9), this worker {PROTOCOL}" in error.message
    assert "install the same version" in error.message


@pytest.mark.parametrize("message", [Ready(), Join(1, 2), WeightsEnd()])
def test_a_conversation_begins_with_hello(talk, message):
    assert f"received {type(message).__name__}, expected Hello" in talk.refused(message).message


@pytest.mark.parametrize("join", [Join(0, 2), Join(2, 2), Join(5, 3)])
def test_a_worker_has_a_place_among_the_nodes(talk, join):
    talk.ask(Hello(PROTOCOL, "test", talk.session), Welcome)
    error = talk.refused(join)
    assert f"node {join.node} of {join.n_nodes} is no worker" in error.message


@pytest.mark.parametrize(
    ("join", "peers"),
    [
        (Join(1, 2), Peers(("the root",), ())),
        (Join(1, 2), Peers(("the root", "a:1", "a:2"), ())),
        (Join(1, 2), Peers(("the root", "a:1"), ((7, ""),))),
        (Join(1, 3), Peers(("the root", "a:1", "a:2"), ())),
        (Join(1, 3), Peers(("the root", "a:1", "no address"), ((7, ""),))),
    ],
)
def test_addresses_must_fit_the_nodes(talk, join, peers):
    talk.ask(Hello(PROTOCOL, "test", talk.session), Welcome)
    talk.ask(join, Bound)
    error = talk.refused(peers)
    assert error.phase is Phase.PEERS
    assert "address" in error.message


def test_the_program_of_another_node_is_refused(talk):
    talk.meshed()
    error = talk.refused(Net(replace(talk.program, node=0), "direct", 10.0))
    assert error.phase is Phase.NET
    assert error.message == "node 1 of 2 was sent the program of node 0 of 2"


def test_a_collective_that_does_not_exist_is_refused(talk):
    talk.meshed()
    error = talk.refused(Net(talk.program, "telepathy", 10.0))
    assert error.phase is Phase.NET
    assert "collective 'telepathy' is unknown" in error.message


def test_a_program_that_does_not_add_up_is_refused(talk):
    talk.meshed()
    error = talk.refused(
        Net(replace(talk.program, buffers=talk.program.buffers[1:]), "direct", 10.0)
    )
    assert error.phase is Phase.NET
    assert "y does not exist" in error.message
    assert "RmsNorm" in error.message


def test_a_program_that_does_not_fit_into_memory_is_refused(talk):
    talk.meshed()
    error = talk.refused(
        Net(replace(talk.program, n_blocks=1 << 24, seq_len=1 << 24), "direct", 10.0)
    )
    assert error.phase is Phase.NET
    assert "GB are available" in error.message


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([(0, 0, 256), (10_000, 0, 1)], "weight 10000 of"),
        ([(0, 4, 252)], "weight 0: bytes 4 to 256 after 0 of 256"),
        ([(0, 0, 8), (0, 4, 8)], "weight 0: bytes 4 to 12 after 8 of 256"),
        ([(0, 0, 8), (0, 12, 8)], "weight 0: bytes 12 to 20 after 8 of 256"),
        ([(0, 0, 257)], "weight 0: bytes 0 to 257 after 0 of 256"),
        ([(0, 0, 256), (0, 256, 1)], "weight 0: bytes 256 to 257 after 256 of 256"),
        ([(0, 1 << 48, 1)], "weight 0: bytes"),
    ],
)
def test_weights_out_of_order_or_bounds_are_refused(talk, parts, complaint):
    talk.allocated()
    for index, offset, size in parts[:-1]:
        talk.channel.send(WeightPart(index, offset, checksum(bytes(size))), bytes(size))
    index, offset, size = parts[-1]
    error = talk.refused(WeightPart(index, offset, checksum(bytes(size))), bytes(size))
    assert error.phase is Phase.WEIGHTS
    assert complaint in error.message


def test_missing_weights_are_noticed(talk):
    talk.allocated()
    count = len(list(weights(talk.program)))
    talk.channel.send(WeightPart(0, 0, checksum(bytes(255))), bytes(255))
    error = talk.refused(WeightsEnd())
    assert error.phase is Phase.WEIGHTS
    assert error.message == f"{count} of {count} weights are incomplete"


def test_a_batch_out_of_bounds_is_refused_by_the_worker_too(talk):
    talk.ready()
    error = talk.refused(Step(1, Batch((0,), (32,), ())))
    assert error.phase is Phase.STEP
    assert "position 32 of 32" in error.message


def test_an_exchange_of_another_step_is_refused(talk):
    talk.ready()
    talk.channel.send(Step(1, Batch((0,), (0,), (), ((0, 0, 0),))))
    frame = bytearray(HEAD + 256)
    write_head(memoryview(frame), 2, 0, 0)
    talk.mesh.exchange({1: memoryview(frame)}, {}, 10)
    error, _ = talk.channel.receive(10)
    assert isinstance(error, Error)
    assert (
        "expected step 1 sync 0 round 0, received step 2 sync 0 round 0 (after start)"
        in error.message
    )


def test_an_exchange_that_never_comes_is_a_deadline(talk):
    talk.meshed()
    talk.ask(Net(talk.program, "direct", 0.01), Allocated)
    for i, weight in enumerate(weights(talk.program)):
        data = bytes(weight.nbytes)
        talk.channel.send(WeightPart(i, 0, checksum(data)), data)
    talk.ask(WeightsEnd(), Ready)
    error = talk.refused(Step(1, Batch((0,), (0,), (), ((0, 0, 0),))))
    assert error.culprit == "the root"
    assert error.message == "sent nothing for 0 s (step 1, after start)"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["hello", "meshed", "allocated", "ready"])
@pytest.mark.parametrize(
    "last", [Bye(), Error(Phase.NET, "no"), Welcome(1, "", bytes(16), node_info(1)), None]
)
def test_a_worker_listens_again_whenever_and_however_its_root_leaves(talk, phase, last):
    if phase == "hello":
        talk.ask(Hello(PROTOCOL, "test", talk.session), Welcome)
    else:
        getattr(talk, phase)()
    if last is not None:
        talk.channel.send(last)

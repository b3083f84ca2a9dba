"""The benchmark: shapes, random weights, what is run and timed, and what is said about it."""

import csv
import io
import json
import runpy
import sys
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from pyllama_dist.bench import machine, report, shapes
from pyllama_dist.bench.measure import Bench, Result, Run, matrix_bytes, measure, plan_tests
from pyllama_dist.bench.measure import Test as Trial  # pytest takes Test for tests of its own
from pyllama_dist.bench.random_model import RandomModel
from pyllama_dist.bench.session import open_session
from pyllama_dist.bench.traffic import Traffic
from pyllama_dist.cli import main
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.cluster import plan as plan_module
from pyllama_dist.config import FloatType
from pyllama_dist.engine.engine import Engine
from pyllama_dist.errors import UsageError
from pyllama_dist.net.collectives import ALGORITHMS
from pyllama_dist.net.messages import Usage
from pyllama_dist.net.transport import Address, LostError
from pyllama_dist.net.zeromq import ZmqListener
from pyllama_dist.net.zeromq.mesh import ZmqMesh
from pyllama_dist.node import Spent
from pyllama_dist.program import Batch
from pyllama_dist.simulate import simulated_root
from pyllama_dist.worker import serve
from pyllama_kernels.bandwidth import TURN, MemoryReader, sum_of
from pyllama_kernels.blocks import dequantize_q40
from pyllama_kernels.pages import KV_BLOCK
from tests import fake_root

TINY = {
    "model_type": "glm4",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}

# A mixture of experts with GLM-5's attention, whose indexer picks when there are over 16 positions.
TINY_EXPERTS = {
    "model_type": "glm_moe_dsa",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny shapes, and a buffer for the memory's speed that takes no time."""
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, "tiny": TINY, "moe": TINY_EXPERTS})
    monkeypatch.setattr(machine, "_BUFFER", 1 << 20)


# Parameters and bytes of matrices, with distributed-llama's conventions: 18 bytes for 32 weights.
@pytest.mark.parametrize(
    ("shape", "billions", "gigabytes"),
    [
        ("glm-edge-1.5b", 1.47, 0.83),
        ("glm-edge-4b", 4.15, 2.33),
        ("glm-4-9b", 8.78, 4.94),
        ("glm-4-9b-0414", 8.78, 4.94),
        ("glm-4-32b-0414", 31.63, 17.79),
        ("tinyllama-1.1b", 1.03, 0.58),
        ("qwen3-0.6b", 0.596, 0.335),
    ],
)
def test_shapes_weigh_what_the_models_weigh(shape, billions, gigabytes):
    config = shapes.config_of(shape)
    fields = shapes.SHAPES[shape]
    dim, ffn = fields["hidden_size"], fields["intermediate_size"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    attention = dim * fields["head_dim"] * (2 * heads + 2 * kv_heads)
    layers = fields["num_hidden_layers"] * (attention + 3 * dim * ffn)
    parameters = layers + dim * fields["vocab_size"]
    assert parameters / 1e9 == pytest.approx(billions, abs=0.006)
    assert parameters * 18 / 32 / 1e9 == pytest.approx(gigabytes, abs=0.006)
    (program,) = programs(config, Cluster(max_seq_len=16))
    assert matrix_bytes(program) == parameters * 18 // 32


def test_an_unknown_shape_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'glm-9'.*glm-edge-1\.5b.*tinyllama"):
        shapes.config_of("glm-9")


@pytest.mark.parametrize("shape", ["glm-4-32b-0414", "glm-4.7-flash", "tiny", "moe"])
def test_random_tensors_have_their_shape_and_no_size(shape):
    model = RandomModel(shapes.config_of(shape))
    low, high = sys.maxsize, 0
    for name, tensor in model.tensors.items():
        raw = model.raw(name)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        assert raw.shape == (rows, tensor.float_type.row_bytes(tensor.shape[-1])), name
        first, last = raw.ctypes.data, raw[-1:, -1:].ctypes.data
        if tensor.float_type is FloatType.Q40:
            low, high = min(low, first), max(high, last)
    assert high - low < 4 << 20


def test_random_matrices_are_different_finite_and_of_mean_zero():
    model = RandomModel(shapes.config_of("tinyllama-1.1b"))
    one = dequantize_q40(np.ascontiguousarray(model.raw("layers.0.self_attn.q_proj.weight")))
    other = dequantize_q40(np.ascontiguousarray(model.raw("layers.1.self_attn.q_proj.weight")))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])
    x = np.random.default_rng(1).standard_normal(one.shape[1])
    for matrix in (one, other):
        assert abs(matrix.mean()) < 0.001
        assert 0.5 < np.std(matrix @ x) < 4


def test_a_slice_is_a_part_of_the_whole():
    model = RandomModel(shapes.config_of("tiny"))
    whole = model.raw("layers.0.mlp.down_proj.weight")
    part = model.slice("layers.0.mlp.down_proj.weight", (3, 9), (32, 96))
    assert np.array_equal(part, whole[3:9, 18:54])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "moe"])
def test_a_random_model_says_the_same_on_one_node_and_on_two(shape):
    config = shapes.config_of(shape)
    model = RandomModel(config)
    found = []
    for nodes in (1, 2):
        cluster = Cluster(local_workers=nodes - 1, sync=FloatType.F32, max_seq_len=16)
        with simulated_root(model, programs(config, cluster)) as root:
            batch = Batch((0, 0, 0), (0, 1, 2), (0, 1, 2))
            found.append(root.step([5, 99, 5], batch))
    one, two = found
    assert np.isfinite(one).all()
    assert one.std() > 0.1
    assert not np.allclose(one[0], one[2])
    np.testing.assert_allclose(two, one, atol=0.02 * np.abs(one).max())


def test_random_routers_choose_all_experts_now_and_then():
    model = RandomModel(shapes.config_of("glm-4.7-flash"))
    router = model.raw("layers.1.mlp.gate.weight").view(np.float32)
    bias = model.raw("layers.1.mlp.gate.e_score_correction_bias").view(np.float32)
    x = np.random.default_rng(1).standard_normal((1000, router.shape[1]))
    scores = 1 / (1 + np.exp(-x @ router.T)) + bias
    chosen = np.argsort(scores)[:, -4:]
    times = np.bincount(chosen.reshape(-1), minlength=64)
    assert times.min() > 20
    assert times.max() < 150  # 62.5 on average


def test_only_the_experts_that_are_chosen_are_read():
    program, _ = programs(shapes.config_of("moe"), Cluster(local_workers=1, max_seq_len=16))
    by_hand = [
        32 * 64,  # q_a
        2 * 64 * 32 + 2 * 64 * 32,  # q_b and k_b of 2 heads
        (64 + 32) * 64,  # kv_a
        2 * 32 * 64 + 64 * 2 * 32,  # v_b and o of 2 heads
    ]
    attention = sum(by_hand) * 18 // 32
    dense = 3 * 64 * 64 * 18 // 32  # 2 of 3 blocks
    experts = (3 + 1) * 3 * 64 * 32 * 18 // 32 + 4 * 16 * 64
    head = 51 * 64 * 18 // 32
    assert matrix_bytes(program) == 4 * attention + dense + 3 * experts + head


def test_a_shape_can_be_cut_off_after_some_layers():
    config = shapes.config_of("glm-5.2")
    cut = shapes.with_layers(config, 8)
    assert (cut.n_layers, cut.indexer.layers) == (8, config.indexer.layers[:8])
    whole, part = (matrix_bytes(programs(c, Cluster(max_seq_len=16))[0]) for c in (config, cut))
    layer = matrix_bytes(programs(shapes.with_layers(config, 9), Cluster(max_seq_len=16))[0]) - part
    assert whole == part + (78 - 8) * layer
    with pytest.raises(UsageError, match="3 layers of this shape cannot be run; choose 4 to 78"):
        shapes.with_layers(config, 3)


class FakeRoot(fake_root.FakeRoot):
    """One worker, twice as slow; it has also worked before, for two seconds."""

    def usage(self):
        spent = self.node.spent
        return [Usage(2 + 2 * spent.compute_seconds, 0.0, 2 * spent.bytes_moved, 1 << 20)]

    def step(self, tokens, batch):
        self.node.spent.compute_seconds += 2 - 0.001
        self.node.spent.sync_seconds += 0.5
        self.node.spent.bytes_moved += 100
        return super().step(tokens, batch)

    @property
    def rows(self) -> list[tuple[list[int], tuple[int, ...]]]:
        """Positions and wanted rows of all batches."""
        return [(list(batch.positions), batch.logits) for _, batch in self.steps]


@pytest.fixture
def bench():
    """A bench and its root."""
    root = FakeRoot(
        n_seqs=8,
        n_blocks=64,
        block_size=KV_BLOCK,
        seq_len=256,
        max_rows=32,
        max_logits=8,
        vocab_size=300,
    )
    with Engine(root) as engine:
        yield Bench(engine), root


def test_a_prompt_is_read_in_batches_and_wants_the_last_logits_only(bench):
    bench, root = bench
    run = bench.run(Trial("pp", 70))
    assert root.rows == [
        (list(range(32)), ()),
        (list(range(32, 64)), ()),
        (list(range(64, 70)), (5,)),
    ]
    assert (run.compute_seconds, run.sync_seconds, run.bytes_moved) == (
        pytest.approx(6),
        1.5,
        300,
    )
    assert run.seconds > 0


def test_an_answer_is_one_row_at_a_time_and_takes_the_most_likely_token(bench):
    bench, root = bench
    bench.run(Trial("tg", 3, depth=40))
    assert root.rows[-3:] == [([40], (0,)), ([41], (0,)), ([42], (0,))]
    history = root.history(root.steps[-1][1].seqs[0], 42)
    assert root.steps[-1][0] == [int(root.logits_of(history[:42]).argmax())]


def test_users_do_the_same_at_once(bench):
    bench, root = bench
    run = bench.run(Trial("tg", 3, users=4))
    assert [positions for positions, _ in root.rows] == [[0] * 4, [1] * 4, [2] * 4]
    assert run.compute_seconds == pytest.approx(6)


def test_the_depth_is_filled_once_and_its_time_does_not_count(bench):
    bench, root = bench
    assert bench.run(Trial("pp", 8, depth=33)).compute_seconds == pytest.approx(2)
    assert root.rows[-1][0] == list(range(33, 41))
    before = len(root.steps)
    bench.run(Trial("tg", 1, depth=33))
    bench.run(Trial("pp", 8, depth=20))
    assert [rows for rows, _ in root.rows[before:]] == [[33], list(range(20, 28))]


def test_a_context_that_is_too_short_is_refused(bench):
    with pytest.raises(UsageError, match=r"pp8 @ d250 needs 258 positions, the context has 256"):
        bench[0].run(Trial("pp", 8, depth=250))


def test_a_cache_that_is_too_small_for_all_users_is_refused():
    root = FakeRoot(
        n_seqs=8, n_blocks=2, block_size=KV_BLOCK, seq_len=256, max_rows=32, max_logits=8
    )
    with Engine(root) as engine, pytest.raises(UsageError, match="raise --kv-blocks"):
        Bench(engine).run(Trial("tg", 1, depth=200, users=4))


def test_each_test_is_warmed_up_and_repeated(bench):
    (bench, root), seen = bench, []
    tests = plan_tests([4, 0], [2], [0, 16])
    assert [test.name for test in tests] == ["pp4", "tg2", "pp4 @ d16", "tg2 @ d16"]
    rates = iter(range(1, 9))
    found = measure(bench, tests[:2], 3, lambda: next(rates), lambda *run: seen.append(run))
    assert seen == [(test, run) for test in tests[:2] for run in range(4)]
    assert [len(result.runs) for result in found] == [3, 3]
    assert [result.bandwidth for result in found] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # A step is 2 and 0.5 seconds, and 100 bytes: 3 of them, and 6. Warm-ups do not count.
    assert [[astuple(spent) for spent in result.spent] for result in found] == [
        [pytest.approx((6, 1.5, 300)), pytest.approx((12, 0, 600))],
        [pytest.approx((12, 3, 600)), pytest.approx((24, 0, 1200))],
    ]
    assert len(root.steps) == 4 + 1 + 3 * 2  # a warm-up of tg is one token


def test_all_combinations_of_users_and_sizes_are_run():
    names = [test.name for test in plan_tests([8], [4], [0, 16], [1, 2])]
    assert names[:4] == ["pp8", "tg4", "pp8 x 2", "tg4 x 2"]
    assert names[4:] == [f"{name} @ d16" for name in names[:4]]


@pytest.fixture
def found():
    """A report with figures that can be checked by hand."""
    runs = [Run(1.0, 0.8, 0.2, 5000), Run(2.0, 1.2, 0.8, 5000)]
    return report.Report(
        date="2026-01-02T03:04:05+00:00",
        model=report.ModelFacts("some", "glm", "q40", 2_000_000_000, 1_125_000_000),
        setting=report.Setting("portable", 2, 2, 1, "q80", "auto", 20, 32),
        results=[
            Result(
                test, runs, [8e9, 12e9, 18e9], [Spent(2.0, 1.0, 10_000), Spent(1.0, 2.0, 10_000)]
            )
            for test in (Trial("pp", 10), Trial("tg", 10, 5))
        ],
        traffic={
            Trial("pp", 10): [
                Traffic(5000, 2000, 40),
                Traffic(1000, 3000, 20),
                Traffic(1000, 3000, 20),
            ],
            Trial("tg", 10, 5): [Traffic(50, 20), Traffic(10, 25), Traffic(10, 25)],
        },
        bytes_here=1_125_000_000,
        peak_bytes=[3_000_000, 2_000_000],
        machine={"cpu": "A CPU", "llvm_cpu": "zen", "cores": 2, "features": ["avx2"]},
        versions={"python": "3.11.0"},
        load={"before": [0.5, 0, 0], "after": [1.5, 0, 0]},
    )


def test_figures_are_those_worked_out_by_hand(found):
    pp, tg = (report.figures(found, result) for result in found.results)
    assert (pp.tokens_per_second, pp.median) == (7.5, 7.5)
    assert pp.stdev == pytest.approx(3.53553, abs=1e-5)  # of 10 and 5
    assert pp.compute_ms_per_token == pytest.approx([100, 50])
    assert pp.sync_ms_per_token == pytest.approx([50, 100])
    assert pp.kb_sent_per_token == pytest.approx([0.5, 0.1, 0.1])
    assert pp.kb_received_per_token == pytest.approx([0.2, 0.3, 0.3])
    assert pp.messages_per_token == pytest.approx([4, 2, 2])
    assert pp.gb_per_second is pp.memory_share is None
    assert tg.gb_per_second == pytest.approx(8.4375)
    # 11.25 of 8 to 12 and 5.625 of 12 to 18 GB/s.
    assert tg.memory_share == pytest.approx((1.125 + 0.375) / 2)
    assert (tg.p, tg.n, tg.d) == (0, 10, 5)


def test_the_table_has_the_figures_in_its_columns(found):
    table = report.as_markdown(found).partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {len(row) for row in rows} == {len(rows[0])}
    pp, tg = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert (pp["kB sent"], pp["kB received"]) == ("0.5, 2 × 0.1", "0.2, 2 × 0.3")
    assert pp["messages"] == "4.0, 2 × 2.0"
    assert tg["test"] == "tg10 @ d5"
    assert tg["t/s"] == "7.50 ± 3.54"
    assert (tg["GB/s"], tg["% of memory"]) == ("8.44", "75")
    assert (tg["compute ms"], tg["sync ms"]) == ("100.00, 50.00", "50.00, 100.00")
    assert (tg["model"], tg["nodes"], tg["threads"]) == ("some Q40", "2", "1")
    assert (tg["size"], tg["params"]) == ("1.12 GB", "2.00 B")


def test_csv_and_json_say_the_same(found):
    lines = list(csv.DictReader(io.StringIO(report.as_csv(found))))
    said = json.loads(report.as_json(found))
    assert said["kind"] == "bench"
    assert [test["seconds"] for test in said["tests"]] == [[1.0, 2.0]] * 2
    for line, test in zip(lines, said["tests"], strict=True):
        assert line["test"] == test["test"]
        assert float(line["median"]) == test["median"]
        assert line["model"] == said["model"]
    assert [line["gb_per_second"] for line in lines] == ["", "8.4375"]
    assert lines[0]["kb_sent_per_token"] == "0.5 0.1 0.1"
    assert said["tests"][0]["kb_sent_per_token"] == [0.5, 0.1, 0.1]


def test_the_memory_kernel_reads_every_word():
    words = np.random.default_rng(0).integers(0, 1 << 32, TURN, dtype=np.uint32)
    start = -words.ctypes.data % 64 // 4
    part = words[start : start + 3 * TURN // 4]
    end = part.ctypes.data + part.nbytes
    assert sum_of(part.ctypes.data, end) % (1 << 32) == part.sum(dtype=np.uint64) % (1 << 32)


def test_memory_is_read_by_threads_that_share_it():
    with MemoryReader(2, 1 << 16) as reader:
        assert reader.bytes_per_second() > 0
    with pytest.raises(ValueError, match="for 3 threads"):
        MemoryReader(3, TURN)


@pytest.mark.slow
def test_nodes_on_this_machine_are_counted_and_their_memory_is_seen():
    config = shapes.config_of("tiny")
    cluster = Cluster(local_workers=1, n_threads=1, max_seq_len=16)
    with open_session("tiny", RandomModel(config), cluster) as session:
        run = session.bench.run(Trial("tg", 2))
        cost, peak = session.bench.spent(), session.bench.peak_bytes()
    assert (session.setting.nodes, session.setting.nodes_here) == (2, 2)
    assert session.bytes_here == session.model.matrix_bytes == session.model.parameters * 18 // 32
    assert run.bytes_moved > 0
    assert [node.bytes_moved for node in cost] == [run.bytes_moved] * 2
    assert all(node.compute_seconds > 0 < node.sync_seconds for node in cost)
    assert len(peak) == 1
    assert peak[0] > 10e6


class OneRoot(ZmqListener):
    """A listener that closes behind the first root."""

    served = False

    def accept(self):
        if self.served:
            raise LostError("that was all", "nobody")
        self.served = True
        return super().accept()


@pytest.mark.parametrize("collective", ALGORITHMS)
@pytest.mark.parametrize("sync", [FloatType.Q80, FloatType.F32])
def test_the_traffic_worked_out_is_what_sockets_count(monkeypatch, sync, collective):
    """Three nodes over ZeroMQ: the meshes of all of them tell what they send and take."""
    counts: dict[int, list[int]] = {node: [0, 0, 0] for node in range(3)}
    greet, exchange = ZmqMesh.greet, ZmqMesh.exchange

    def greeting(self, session, node, names, timeout):
        self.counts = counts[node]
        greet(self, session, node, names, timeout)

    def exchanging(self, sends, receives, timeout):
        found = exchange(self, sends, receives, timeout)
        self.counts[0] += sum(frame.nbytes for frame in sends.values())
        self.counts[1] += sum(received for _, received in found)
        self.counts[2] += len(sends)
        return found

    monkeypatch.setattr(ZmqMesh, "greet", greeting)
    monkeypatch.setattr(ZmqMesh, "exchange", exchanging)

    def work(listener):
        with suppress(LostError):
            serve(listener, 1)
        listener.close()

    monkeypatch.setattr(plan_module, "MAX_ROWS", 8)  # most batches of a prompt want no logits
    listeners = [OneRoot("127.0.0.1", 0) for _ in range(2)]
    threads = [Thread(target=work, args=(listener,), daemon=True) for listener in listeners]
    for thread in threads:
        thread.start()
    workers = tuple(Address("127.0.0.1", listener.port) for listener in listeners)
    cluster = Cluster(
        workers=workers,
        n_threads=1,
        sync=sync,
        max_seq_len=64,
        kv_blocks=8,
        collective=collective,
    )
    trials = [Trial("pp", 20), Trial("tg", 3), Trial("tg", 4, users=3)]
    with open_session("tiny", RandomModel(shapes.config_of("tiny")), cluster) as session:
        runs = [session.bench.run(trial) for trial in trials]
        found = [session.traffic(trial) for trial in trials]
    for thread in threads:
        thread.join(10)
    for run, (root, *_) in zip(runs, found, strict=True):
        assert run.bytes_moved == root.sent + root.received > 0
    for node, parts in enumerate(zip(*found, strict=True)):
        total = sum(parts, Traffic())
        assert counts[node] == [total.sent, total.received, total.messages]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `bench` with these arguments: exit code, standard output, standard error."""

    def run(args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pyllama-dist", "bench", *args.split()])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.mark.slow
def test_the_command_measures_a_shape(cli):
    code, out, err = cli("--shape tiny -p 8,40 -n 2 -d 0,16 -r 2 -t 1 -o json")
    assert code == 0, err
    said = json.loads(out)
    assert [test["test"] for test in said["tests"]] == [
        "pp8",
        "pp40",
        "tg2",
        "pp8 @ d16",
        "pp40 @ d16",
        "tg2 @ d16",
    ]
    assert said["seq_len"] == 56  # what the longest test needs
    assert (said["threads"], said["model"], said["nodes"]) == (1, "tiny", 1)
    assert all(len(test["seconds"]) == test["repetitions"] == 2 for test in said["tests"])
    assert all(len(test["memory_gb_per_second"]) == 3 for test in said["tests"])
    assert len(said["peak_bytes"]) == 1
    assert len(said["load"]["before"]) == 3


def test_the_command_measures_the_first_layers_of_a_shape(cli):
    code, out, err = cli("--shape moe --layers 2 -p 20 -n 4 -r 1 -t 1 -o json")
    assert code == 0, err
    said = json.loads(out)
    assert said["model"] == "moe (2 of 4 layers)"
    config = shapes.with_layers(shapes.config_of("moe"), 2)
    assert said["matrix_bytes"] == matrix_bytes(programs(config, Cluster(max_seq_len=20))[0])
    assert said["tests"][1]["gb_per_second"] == pytest.approx(
        said["matrix_bytes"] * said["tests"][1]["median"] / 1e9
    )


def test_the_command_measures_a_model(cli):
    code, out, err = cli("-p 4 -n 0 -r 1 -t 1")
    assert code == 0, err
    assert "| builtin Q40 |" in out
    assert "| pp4 |" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--shape tiny --model x", "two models"),
        ("--shape tiny -p 0 -n 0", "nothing to measure"),
        ("--shape tiny -p 5,x", "'5,x' is no list of numbers"),
        ("--shape tiny -p 8 -d 60", "needs 68 positions, the context has 64"),
        ("--shape huge", "no shape 'huge'"),
        ("--shape tiny --layers 3", "choose 1 to 2"),
        ("--layers 3", "give one with --shape"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(cli, args, said):
    code, out, err = cli(args)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line


def test_the_readme_gets_a_table_of_all_results(found, tmp_path, monkeypatch):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    results_now = [replace(result, bandwidth=[20e9, 20e9, 40e9]) for result in found.results]
    newer = replace(found, date="2026-02-02T00:00:00+00:00", results=results_now)
    (results / "b.json").write_text(report.as_json(found))
    (results / "a.json").write_text(report.as_json(newer))
    compared = {
        "shape": "some",
        "threads": 2,
        "kernels": "avx2",
        "test": "tg128",
        "median": {"pyllama-dist": 33, "llama.cpp": 20, "llama.cpp fa": 30},
        "compared_with": "llama.cpp fa",
        "ratio": {"median": 1.1, "min": 1, "max": 1.25},
        "memory_share": 0.93,
    }
    comparison = {
        "kind": "llamacpp",
        "date": found.date,
        "machine": {"cpu": "A CPU", "llvm_cpu": "zen"},
    }
    comparison["results"] = [compared]
    (results / "c.json").write_text(json.dumps(comparison))
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    script = Path(__file__).parents[1] / "bench" / "results_table.py"
    write_tables = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(sys, "argv", ["x", "--readme", str(readme), "--results", str(results)])
    for _ in range(2):  # a second time changes nothing
        write_tables()
        text = readme.read_text()
        assert text.startswith("before\n<!-- results -->\n| machine |")
        assert text.endswith("\n<!-- /results -->\nafter\n")
        assert "old" not in text
        assert "| A CPU (zen) | some | portable | 2 × 1 | tg10 @ d5 | 7.5 | 8.4 | 38 |" in text
        assert text.count("tg10") == 1
        assert (
            "| A CPU (zen) | some | avx2 | 1 × 2 | tg128 | 33.0 | 30.0 | 1.10 (1.00 to 1.25) | 93 |"
            in text
        )
    nodes = {
        "kind": "nodes",
        "date": found.date,
        "machine": {"cpu": "A CPU", "llvm_cpu": "zen"},
        "shape": "some",
    }
    measured = {"nodes": 2, "threads": 1, "test": "tg64", "busy": 1, "median": 5, "ratio_to": {}}
    measured["ratio_to"] = {"alone": compared["ratio"], "first_size": None, "first_layout": None}
    nodes |= {"kernels": "avx2", "results": [measured]}
    (results / "n.json").write_text(json.dumps(nodes))
    write_tables()
    row = "| some | avx2 | 2 × 1 | tg64, 1 busy beside | 5.0 |  |  | 1.10 (1.00 to 1.25) |"
    assert row in readme.read_text()
    readme.write_text("no place")
    with pytest.raises(SystemExit, match="<!-- results -->"):
        write_tables()
    readme.write_text("<!-- results --><!-- /results -->")
    (results / "d.json").write_text('{"kind": "poem"}')
    with pytest.raises(SystemExit, match=r"d\.json: no results that this script knows.*poem"):
        write_tables()

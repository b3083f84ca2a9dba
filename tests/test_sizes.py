"""What models weigh, against figures worked out by hand from the published configurations."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from pyllama_dist.bench.measure import matrix_bytes
from pyllama_dist.bench.shapes import SHAPES, config_of
from pyllama_dist.cli import main
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType
from pyllama_dist.formats.convert import convert
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.sizes import model_sizes, node_sizes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# The matrix that weighs the heads of an indexer is float32 here, and was Q40 in the figures.
INDEX_WEIGHTS = 32 * 6144 * (4 - 18 / 32) / 1e9  # GB in a layer

# Parameters, Q40 file in GB, active parameters, GB read for a token, numbers kept for a position.
FIGURES = {
    "glm-edge-1.5b": (1.472, 1.31, 1.47, 0.83, 28_672),
    "glm-edge-4b": (4.146, 3.06, 4.15, 2.33, 61_440),
    "chatglm3-6b": (6.244, 4.43, 5.98, 3.36, 14_336),
    "glm-4-9b": (9.400, 7.42, 8.78, 4.94, 20_480),
    "glm-4-9b-0414": (9.400, 7.42, 8.78, 4.94, 20_480),
    "glm-4-9b-chat-1m": (9.484, 7.47, 8.86, 4.99, 40_960),
    "glm-4-32b-0414": (32.566, 21.52, 31.63, 17.79, 31_232),
    "glm-4.7-flash": (29.943, 17.96, 3.58, 2.03, 27_072),
    "glm-4.5-air": (106.852, 62.3, 12.80, 7.28, 94_208),
    "intellect-3": (106.852, 62.3, 12.80, 7.28, 94_208),
    "glm-4.5": (352.80, 201.4, 32.85, 18.73, 188_416),
    "glm-4.6": (352.80, 201.4, 32.85, 18.73, 188_416),
    "glm-4.7": (352.80, 201.4, 32.85, 18.73, 188_416),
    "glm-5": (743.91, 422.1 + 78 * INDEX_WEIGHTS, 40.83, 23.37 + 78 * INDEX_WEIGHTS, 54_912),
    # 57 layers less with an indexer of (32 * 128) * 2048 + 128 * 6144 + 2 * 128 + 32 * 6144.
    "glm-5.2": (743.91 - 57 * 0.009372, None, 40.83 - 57 * 0.009372, None, 54_912 - 57 * 128),
    "llama-3.1-8b": (8.030, None, 7.50, None, 65_536),
    "qwen3-30b-a3b": (30.532, None, 3.04, None, 49_152),
    "qwen3-0.6b": (0.596, None, 0.60, None, 57_344),
    "tinyllama-1.1b": (1.100, None, 1.03, None, 11_264),
}


def sizes_of(shape):
    return model_sizes(config_of(shape), tied=bool(SHAPES[shape].get("tie_word_embeddings")))


def test_the_figures_are_those_of_all_shapes():
    assert FIGURES.keys() == SHAPES.keys()


@pytest.mark.parametrize("shape", FIGURES)
def test_models_weigh_what_was_worked_out_by_hand(shape):
    parameters, file, active, read, kept = FIGURES[shape]
    found = sizes_of(shape)
    digit = 0.01 if parameters > 300 else 0.001
    assert found.parameters / 1e9 == pytest.approx(parameters, abs=0.6 * digit)
    assert found.active_parameters / 1e9 == pytest.approx(active, abs=0.006)
    assert found.kept_values == kept
    if file is not None:
        assert found.file_bytes / 1e9 == pytest.approx(file, abs=0.06 if file > 60 else 0.006)
        assert found.token_bytes / 1e9 == pytest.approx(read, abs=0.006)


@pytest.mark.parametrize(
    ("cache", "block", "nbytes"),
    [(FloatType.F32, 1, 4), (FloatType.F16, 1, 2), (FloatType.Q80, 32, 34)],
)
def test_bytes_kept_are_those_of_the_type(cache, block, nbytes):
    for shape in ("glm-4.7-flash", "glm-5", "glm-4-9b"):
        found = model_sizes(config_of(shape), cache=cache)
        assert found.cache is cache
        assert found.kept_bytes == found.kept_values // block * nbytes


@pytest.mark.parametrize("shape", SHAPES)
def test_one_node_holds_and_reads_the_whole_model(shape):
    config = config_of(shape)
    found = model_sizes(config)
    cluster = Cluster(max_seq_len=4096)  # so long that an indexer is needed
    (node,) = node_sizes(config, cluster)
    (program,) = programs(config, cluster)
    embedding = 4 * config.vocab_size * config.dim
    assert node.weight_bytes == found.file_bytes - embedding
    assert node.cache_bytes == node.seq_len * found.kept_bytes
    assert node.memory_bytes > node.weight_bytes + node.cache_bytes
    assert matrix_bytes(program) == found.token_bytes


def test_nodes_share_a_model_and_repeat_what_each_needs():
    config = config_of("glm-4.5-air")
    nodes = node_sizes(config, Cluster(local_workers=2, max_seq_len=100))
    (alone,) = node_sizes(config, Cluster(max_seq_len=100))
    kv_heads = [node.shard.kv_heads for node in nodes]
    assert kv_heads == [(0, 3), (2, 6), (5, 8)]  # of 8, for 32 query heads each
    assert [node.cache_bytes for node in nodes] == [
        128 * 2 * 46 * heads * 128 // 32 * 34
        for heads in (3, 4, 3)  # whole blocks of positions
    ]
    # Both holders of two key heads: matrices and biases of keys and values. All: norms and routers.
    heads = 2 * 2 * 46 * 128 * (4096 * 18 // 32 + 4)
    norms = 4 * (2 * 46 + 1) * 4096
    routers = 4 * 45 * 128 * (4096 + 1)
    total = sum(node.weight_bytes for node in nodes)
    assert total == alone.weight_bytes + heads + 2 * (norms + routers)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `inspect` with these arguments: exit code, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pyllama-dist", "inspect", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def test_a_shape_its_config_json_and_its_directory_are_the_same(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(SHAPES["chatglm3-6b"])))
    found = []
    for args in (("--shape", "chatglm3-6b"), (tmp_path,), (tmp_path / "config.json",)):
        code, out, err = cli(*args, "--nodes", 4, "--max-seq-len", 512, "--json")
        assert code == 0, err
        found.append({k: v for k, v in json.loads(out).items() if k != "path"})
    assert found[0] == found[1] == found[2]
    assert found[0]["sizes"]["kept_values"] == 14_336
    assert found[0]["bytes"] is None
    # 428 blocks of the FFN, 65024 rows of the head, 8 of 32 heads, whose two key heads 16 share.
    assert [node["shard"]["ffn"] for node in found[0]["nodes"]][-1] == [321 * 32, 13696]
    assert [node["shard"]["vocab"] for node in found[0]["nodes"]][1] == [16256, 32512]
    assert [node["shard"]["heads"] for node in found[0]["nodes"]][2] == [16, 24]
    assert [node["shard"]["kv_heads"] for node in found[0]["nodes"]] == [[0, 1]] * 2 + [[1, 2]] * 2
    assert {node["seq_len"] for node in found[0]["nodes"]} == {512}


def test_a_model_file_weighs_what_it_was_told_to(cli, tmp_path):
    convert(
        GOLDEN / "glm4_moe_f32", tmp_path, FloatType.Q40, ARCHITECTURES, lambda done, size: None
    )
    code, out, err = cli(tmp_path, "--json", "--kv-cache-type", "f16")
    assert code == 0, err
    found = json.loads(out)
    header = found["bytes"] - found["sizes"]["file_bytes"]
    assert 0 < header < 1024
    assert found["sizes"]["cache"] == "f16"
    assert found["sizes"]["kept_bytes"] == 2 * found["sizes"]["kept_values"]
    _, from_config, _ = cli(GOLDEN / "glm4_moe_f32", "--json", "--kv-cache-type", "f16")
    assert json.loads(from_config)["sizes"] == found["sizes"]


def test_it_is_shown_as_tables_too(cli):
    code, out, err = cli("--shape", "glm-4.7-flash", "--nodes", 3, "--max-seq-len", 4096)
    assert code == 0, err
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in out.splitlines()]
    assert ["parameters", "29,943,393,920"] in lines
    assert ["active parameters", "3,579,314,176"] in lines
    assert ["kept for each position", "27,072 numbers, 28,764 bytes as q80"] in lines
    assert ["experts.count", "64"] in lines
    (last,) = (line.split() for line in out.splitlines() if line.split()[:2] == ["2", "6"])
    assert last[:7] == ["2", "6", "1", "3392", "512", "512", "51626"]
    assert "indexer.layers                 │ 21 of 78" in cli("--shape", "glm-5.2")[1]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--shape", "glm-9"), 2, "no shape 'glm-9'"),
        (("--shape", "glm-5", "x"), 2, "two models"),
        (("--shape", "glm-4.7-flash", "--nodes", 21), 2, "heads for at most 20"),
        (("{}/nothing",), 3, "nothing"),
        (("{}/bert.json",), 3, "model_type 'bert' is not supported, only glm, "),
        (("{}/list.json",), 3, "model_type ['glm'] is not supported"),
        (("{}/part.json",), 3, "part.json: config.json: hidden_size is None"),
        (("{}/odd.json",), 3, "100 values are not whole Q40 blocks of 32; convert"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(cli, tmp_path, args, code, said):
    edge = dict(SHAPES["glm-edge-1.5b"])
    files = {
        "bert": {"model_type": "bert"},
        "list": {"model_type": ["glm"]},
        "part": {"model_type": "glm"},
        "odd": edge | {"hidden_size": 100},
    }
    for name, fields in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    found, out, err = cli(*(arg.format(tmp_path) if isinstance(arg, str) else arg for arg in args))
    assert found == code
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line


@pytest.fixture(scope="module")
def models_table():
    return runpy.run_path(str(ROOT / "bench" / "models_table.py"))


def test_the_table_of_models_in_the_readme_is_up_to_date(models_table):
    between = (
        (ROOT / "pyllama_dist" / "models" / "README.md")
        .read_text()
        .partition(models_table["START"])[2]
    )
    assert between.partition(models_table["END"])[0].strip() == models_table["table"](), (
        "run bench/models_table.py"
    )


def test_machines_are_the_smallest_and_the_fewest_that_will_do(models_table):
    machines = models_table["machines"]
    assert machines({1: 0.5, 2: 0.3, 4: 0.2, 8: 0.1}) == ["1 × Pi 4 or 5, 4 GB"]
    assert machines({1: 17.0, 2: 8.6, 4: 4.4, 8: 2.4}) == [
        "8 × Pi 4 or 5, 4 GB",
        "4 × Pi 5, 8 GB",
    ]
    assert machines({1: 31.5, 2: 15.1, 4: 7.5, 8: 7.4}) == ["4 × Pi 5, 16 GB", "2 × 32 GB"]


def test_the_script_writes_between_its_marks(models_table, tmp_path, monkeypatch):
    readme, write = tmp_path / "README.md", models_table["main"]
    small = {shape: SHAPES[shape] for shape in ("glm-4.5-air", "intellect-3", "qwen3-0.6b")}
    monkeypatch.setitem(write.__globals__, "SHAPES", small)
    monkeypatch.setattr(sys, "argv", ["x", "--readme", str(readme)])
    readme.write_text("before\n<!-- models -->\nold\n<!-- /models -->\nafter\n")
    write()
    lines = readme.read_text().splitlines()
    assert lines[:2] + lines[-2:] == ["before", "<!-- models -->", "<!-- /models -->", "after"]
    assert [line.split(" | ")[0] for line in lines[4:-2]] == [
        "| qwen3-0.6b",
        "| glm-4.5-air, intellect-3",
    ]
    readme.write_text("no place")
    with pytest.raises(SystemExit, match="<!-- models -->"):
        write()

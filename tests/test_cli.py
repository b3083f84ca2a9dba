"""The command line in one process: what users get to see, above all when something is wrong."""

import json
import shutil
import struct
import sys
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest

from pyllama_dist.cli import main
from pyllama_dist.cli.options import BUILTIN

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "glm4_bias_bf16"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line: exit code, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pyllama-dist", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def error(cli):
    """Runs a command line that must fail with one line; that line."""

    def run(*args: object) -> str:
        code, _, err = cli(*args)
        assert code not in (0, 1), err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        return lines[0]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny converted model with the tokenizer of the built-in one."""
    from pyllama_dist.config import FloatType
    from pyllama_dist.formats.convert import convert
    from pyllama_dist.models import ARCHITECTURES

    directory = tmp_path_factory.mktemp("model")
    convert(CHECKPOINT, directory, FloatType.Q40, ARCHITECTURES, lambda done, size: None)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(BUILTIN / name, directory)
    return directory


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model to break."""
    shutil.copytree(model, tmp_path / "broken")
    return tmp_path / "broken"


def test_help_names_all_commands(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("root", "worker", "convert", "inspect", "logits", "tokenize"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", ["root", "worker", "convert", "inspect", "logits", "tokenize"])
def test_every_command_has_help_and_every_flag_a_variable(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"Usage: pyllama-dist {command}" in out
    parsed = import_module(f"pyllama_dist.cli.{command}").command
    flags = [p for p in parsed.params if isinstance(p, click.Option) and not p.hidden]
    for flag in flags:
        name = flag.opts[0].removeprefix("--").upper().replace("-", "_")
        assert flag.envvar == f"PYLLAMA_DIST_{name}"


def test_an_answer_as_json(cli):
    code, out, err = cli("root", "--prompt", "What is 2 + 2?", "--json")
    assert code == 0
    answer = json.loads(out)
    assert set(answer) >= {"text", "tokens", "finish_reason", "timings"}
    assert answer["finish_reason"] == "stop"
    assert "demonstration" in err


def test_greedy_answers_do_not_change_from_run_to_run(cli):
    texts = {cli("root", "--prompt", "What is a pipe?")[1] for _ in range(2)}
    assert len(texts) == 1


def test_the_same_seed_draws_the_same_answer(cli):
    ask = ("root", "--prompt", "hello", "--temperature", "5", "--json", "--seed")
    tokens = [json.loads(cli(*ask, seed)[1])["tokens"] for seed in (1, 1, 2, 3, 4)]
    assert tokens[0] == tokens[1]
    assert any(tokens[0] != other for other in tokens[2:])


def test_steps_count_the_prompt_too(cli):
    _, out, _ = cli("root", "--prompt", "hello", "--steps", "12", "--json")
    answer = json.loads(out)
    assert len(answer["prompt_tokens"]) + len(answer["tokens"]) <= 12
    assert answer["finish_reason"] == "length"


def test_flags_are_read_from_the_environment(cli, monkeypatch):
    monkeypatch.setenv("PYLLAMA_DIST_PROMPT", "hello")
    monkeypatch.setenv("PYLLAMA_DIST_STEPS", "9")
    monkeypatch.setenv("PYLLAMA_DIST_JSON", "1")
    code, out, _ = cli("root")
    assert code == 0
    assert json.loads(out)["finish_reason"] == "length"


def test_a_chat_keeps_its_cache_between_turns(cli, monkeypatch):
    import io

    asked = io.StringIO("What is 12 + 34?\n\n/clear\nhello\n/exit\nnever read\n")
    monkeypatch.setattr(sys, "stdin", asked)
    code, out, _ = cli("root")
    assert code == 0
    assert len(out.strip().splitlines()) >= 2
    assert asked.read() == "never read\n"


def test_logits_are_written_as_float32(cli, model, tmp_path):
    out = tmp_path / "logits.npy"
    code, said, _ = cli("logits", "--model", model, "--tokens", "5,9,2", "--out", out)
    assert code == 0
    logits = np.load(out)
    assert logits.dtype == np.float32
    assert logits.shape[0] == 3
    assert str(list(logits.shape)) in said


def test_tokenize_shows_ids_and_pieces(cli):
    code, out, _ = cli("tokenize", "hello world", "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["ids"]) == len(found["pieces"])
    assert "".join(found["pieces"]).replace(" ", "") in ("helloworld", "helloĠworld")
    code, out, _ = cli("tokenize", "--chat", "hello")
    assert "<|assistant|>" in out


def test_inspect_shows_the_config_and_the_tensors(cli, model):
    code, out, _ = cli("inspect", model, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["config"]["arch"] == "glm4"
    assert sum(tensor["bytes"] for tensor in found["tensors"]) < found["bytes"]
    assert found["bytes"] == (model / "model.m").stat().st_size
    code, out, _ = cli("inspect", model / "model.m", "--tensors")
    assert code == 0
    assert "lm_head.weight" in out


def test_convert_says_what_it_did(cli, tmp_path):
    code, out, err = cli("convert", CHECKPOINT, tmp_path / "out", "--weights", "q80")
    assert code == 0
    assert "glm4" in out
    assert (tmp_path / "out" / "model.m").exists()
    assert "tokenizer.json" in err  # the golden checkpoints have none, and that is said


def test_a_truncated_model(error, broken):
    data = (broken / "model.m").read_bytes()
    (broken / "model.m").write_bytes(data[:-100])
    line = error("root", "--model", broken, "--prompt", "hi")
    assert "truncated" in line
    assert str(len(data)) in line


def test_a_wrong_magic(error, broken):
    data = bytearray((broken / "model.m").read_bytes())
    struct.pack_into("<I", data, 0, 0x12345678)
    (broken / "model.m").write_bytes(data)
    assert "model.m" in error("inspect", broken)


def test_no_model_there(error, tmp_path):
    assert "convert" in error("root", "--model", tmp_path / "nowhere", "--prompt", "hi")


def test_a_damaged_tokenizer(error, broken):
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error("root", "--model", broken, "--prompt", "hi")


def test_a_prompt_longer_than_the_context(error):
    line = error("root", "--prompt", "hello " * 50, "--max-seq-len", "20")
    assert "the context 20" in line
    assert "--max-seq-len" in line


def test_more_nodes_than_heads(error):
    line = error("root", "--prompt", "hi", "--local-workers", "8")
    assert "9 nodes" in line
    assert "at most 8" in line


@pytest.mark.parametrize("address", ["10.0.0.2", "http://10.0.0.2:99", "a b:99", "::1:99", "h:0"])
def test_what_is_no_address(error, address):
    assert "host:port" in error("root", "--prompt", "hi", "--workers", address)


def test_the_same_worker_twice(error):
    said = error("root", "--prompt", "hi", "--workers", "10.0.0.2:99", "10.0.0.2:99")
    assert "10.0.0.2:99 twice" in said


@pytest.mark.parametrize("flags", [("--temperature", "nan"), ("--timeout", "nan")])
def test_what_is_no_number(error, flags):
    assert "nan" in error("root", "--prompt", "hi", *flags)


def test_a_tokenizer_of_another_model(error, model):
    assert "different checkpoints" in error("root", "--model", model, "--prompt", "hi")


def test_tokens_outside_the_vocabulary(error, model, tmp_path):
    out = tmp_path / "x.npy"
    line = error("logits", "--model", model, "--tokens", "5,99999", "--out", out)
    assert "99999" in line
    assert not out.exists()


def test_json_without_a_prompt(error):
    assert "--prompt" in error("root", "--json")


def test_wrong_kernels(error, monkeypatch):
    monkeypatch.setenv("PYLLAMA_KERNELS", "quantum")
    assert "no kernels 'quantum'" in error("root", "--prompt", "hi")


def test_unknown_options_end_with_one_line(cli):
    code, _, err = cli("root", "--no-such-flag")
    assert code == 2
    (line,) = err.splitlines()
    assert "--no-such-flag" in line
    assert "--help" in line


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama4"}, "llama4"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": 99}, "layers."),
    ],
)
def test_checkpoints_that_cannot_be_converted(error, tmp_path, fields, said):
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    change_config(tmp_path / "checkpoint", **fields)
    assert said in error("convert", tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out" / "model.m").exists()

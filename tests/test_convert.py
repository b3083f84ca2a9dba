"""Conversion: every number arrives, and what cannot be converted is refused with the reason."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken

from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.config import FloatType
from pyllama_dist.conversation import open_model
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.formats import convert as convert_module
from pyllama_dist.formats.convert import Report, convert
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.formats.huggingface.checkpoint import Checkpoint
from pyllama_dist.models import ARCHITECTURES, CHECKPOINTS
from tests.checkpoints import byte_tokenizer, converted, write_checkpoint
from tests.tiers import slow_but

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))

Progress = Callable[[int, int], None]


def run(
    source: Path,
    out: Path,
    weights: FloatType = FloatType.F32,
    progress: Progress = lambda done, size: None,
) -> Report:
    return convert(source, out, weights, CHECKPOINTS, progress)


def refusal(source: Path, out: Path, weights: FloatType = FloatType.F32) -> str:
    """The message with which a conversion ends that must leave no file."""
    with pytest.raises(FileError) as caught:
        run(source, out, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert not out.exists() or not list(out.iterdir())
    return message


def stored_floats(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as float32, decoded number by number by `struct`."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            raw = bytes(entry["data"])
            if entry["dtype"] == "BF16":
                raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
            code = "e" if entry["dtype"] == "F16" else "f"
            numbers = struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)
            tensors[name] = np.array(numbers, np.float32).reshape(entry["shape"])
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A float32 checkpoint to damage."""
    return Path(shutil.copytree(GOLDEN / "glm_f32", tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in two shards to damage."""
    return Path(shutil.copytree(GOLDEN / "glm4_sharded_bf16", tmp_path / "checkpoint"))


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def checkpoint_values(
    name: str, stored: dict[str, np.ndarray], hf: dict[str, int] | None = None
) -> np.ndarray:
    """What a tensor of the model must hold, from the tensors of the checkpoint."""
    if name == "lm_head.weight":
        return stored.get(name, stored["model.embed_tokens.weight"])
    if "model." + name in stored:
        return stored["model." + name]
    layer, _, matrix = name.partition(".mlp.")
    if matrix in ("gate_proj.weight", "up_proj.weight"):
        gate, up = np.split(stored[f"model.{layer}.mlp.gate_up_proj.weight"], 2)
        return gate if matrix == "gate_proj.weight" else up
    assert hf is not None, name
    layer, _, matrix = name.partition(".self_attn.")
    nope, heads = hf["qk_nope_head_dim"], hf["num_attention_heads"]
    at = f"model.{layer}.self_attn."
    match matrix.removesuffix(".weight"):
        case "q_b_proj_nope":
            parts = [q[:nope] for q in np.split(stored[at + "q_b_proj.weight"], heads)]
        case "q_b_proj_rope":
            parts = [q[nope:] for q in np.split(stored[at + "q_b_proj.weight"], heads)]
        case "kv_a_proj_latent":
            parts = [stored[at + "kv_a_proj_with_mqa.weight"][: hf["kv_lora_rank"]]]
        case "kv_a_proj_rope":
            parts = [stored[at + "kv_a_proj_with_mqa.weight"][hf["kv_lora_rank"] :]]
        case "k_b_proj":
            parts = [kv[:nope].T for kv in np.split(stored[at + "kv_b_proj.weight"], heads)]
        case "v_b_proj":
            parts = [kv[nope:] for kv in np.split(stored[at + "kv_b_proj.weight"], heads)]
    return np.concatenate(parts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_bytes", slow_but([5000], [1, 5000, 8 << 20]))
def test_f32_is_the_checkpoint(
    variant: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_CHUNK_BYTES", chunk_bytes)
    report = run(GOLDEN / variant, tmp_path)
    stored = stored_floats(GOLDEN / variant)
    hf = json.loads((GOLDEN / variant / "config.json").read_text())
    with ModelFile.open(tmp_path / "model.m", ARCHITECTURES) as model:
        assert model.config == report.config
        assert model.size == report.model_bytes
        assert len(model.tensors) == report.n_tensors
        for name in model.tensors:
            np.testing.assert_array_equal(
                model.float32(name), checkpoint_values(name, stored, hf), strict=True
            )


def scalar_q40(values: list[float]) -> bytes:
    """distributed-llama's formula for a block of 32 values, in steps of float32."""
    d = np.float32(min(values) if -min(values) > max(values) else max(values)) / np.float32(-8)
    inverse = np.float32(1) / d
    q = [int(np.clip(np.float32(x) * inverse + np.float32(8.5), 0, 15)) for x in values]
    return struct.pack("<e16B", d, *(q[j] | q[j + 16] << 4 for j in range(16)))


def test_q40_is_the_scalar_formula(tmp_path: Path) -> None:
    run(GOLDEN / "glm4_sharded_bf16", tmp_path, FloatType.Q40)
    stored = stored_floats(GOLDEN / "glm4_sharded_bf16")
    with ModelFile.open(tmp_path / "model.m", ARCHITECTURES) as model:
        for name in ("layers.0.mlp.up_proj.weight", "layers.2.self_attn.o_proj.weight"):
            groups = checkpoint_values(name, stored).reshape(-1, 32)
            expected = b"".join(scalar_q40(group.tolist()) for group in groups)
            assert model.raw(name).tobytes() == expected
        for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "norm.weight"):
            np.testing.assert_array_equal(
                model.float32(name), checkpoint_values(name, stored), strict=True
            )


def test_config_of_both_generations_of_transformers(tmp_path: Path) -> None:
    old = run(GOLDEN / "glm_f16", tmp_path / "old").config  # rope fields at the top level
    new = run(GOLDEN / "glm_f32", tmp_path / "new").config  # in rope_parameters
    full = run(GOLDEN / "glm_tied_bf16", tmp_path / "full").config
    assert (old.rope_theta, old.rotary_dim, old.norm_epsilon) == (5e6, 8, 1e-5)
    assert (new.rope_theta, new.rotary_dim, new.norm_epsilon) == (1e4, 8, 1.5625e-7)
    assert (full.rotary_dim, full.head_dim, full.n_kv_heads, full.qkv_bias) == (32, 32, 8, False)


def test_progress_ends_at_the_size(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = run(GOLDEN / "glm_f32", tmp_path, progress=lambda *now: told.append(now))
    assert told == sorted(told)
    assert {size for _, size in told} == {report.model_bytes}
    assert 0 <= report.model_bytes - told[-1][0] <= 256  # the header


def test_stored_head_wins_over_tying(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, tie_word_embeddings=True)
    run(checkpoint, tmp_path / "out")
    stored = stored_floats(checkpoint)
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        np.testing.assert_array_equal(model.float32("lm_head.weight"), stored["lm_head.weight"])


def test_lost_head_is_not_taken_for_a_tied_one(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor lm_head.weight is missing" in refusal(checkpoint, tmp_path / "out")


def test_tensors_decide_on_biases(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, attention_bias=False)
    report = run(checkpoint, tmp_path / "out")
    assert report.config.qkv_bias
    assert any("attention_bias is False" in line for line in report.warnings)

    def drop_biases(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]

    edit_config(checkpoint, attention_bias=True)
    edit_tensors(checkpoint, drop_biases)
    report = run(checkpoint, tmp_path / "out")
    assert not report.config.qkv_bias
    assert any("attention_bias is True" in line for line in report.warnings)


def test_unused_tensors_are_reported(checkpoint: Path, tmp_path: Path) -> None:
    extra = {
        "model.layers.2.enorm.weight": np.ones(64, np.float32),
        "model.layers.2.eh_proj.weight": np.ones((64, 128), np.float32),
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    edit_tensors(checkpoint, lambda tensors: tensors.update(extra))
    warnings = run(checkpoint, tmp_path / "out").warnings
    assert "tensors not used: 2 of layers from 2 on (draft layers)" in warnings
    assert "tensors not used: 1 (model.layers.1.self_attn.rotary_emb.inv_freq)" in warnings


def test_draft_layers_are_counted(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "glm4_moe_f32", tmp_path / "checkpoint"))
    n_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    at = f"model.layers.{n_layers}."
    names = ("eh_proj", "embed_tokens", "shared_head.head", "mlp.experts.0.gate_proj")
    extra = {f"{at}{name}.weight": np.ones((4, 4), np.float32) for name in names}
    before = run(folder, tmp_path / "before")
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    after = run(folder, tmp_path / "after")
    line = f"tensors not used: 4 of layers from {n_layers} on (draft layers)"
    assert set(after.warnings) - set(before.warnings) == {line}
    assert after.model_bytes == before.model_bytes


@pytest.mark.parametrize("name", ["q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa"])
@pytest.mark.parametrize("cut", [(slice(1, None),), (slice(None), slice(1, None))])
def test_parts_that_do_not_make_up_the_whole_are_refused(
    tmp_path: Path, name: str, cut: tuple[slice, ...]
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "glm4_moe_lite_bf16", tmp_path / "checkpoint"))
    tensors = stored_floats(folder)
    tensor = f"model.layers.0.self_attn.{name}.weight"
    tensors[tensor] = np.ascontiguousarray(tensors[tensor][cut])
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    assert f"tensor {tensor} is {list(tensors[tensor].shape)}, config.json says" in refusal(
        folder, tmp_path / "out"
    )


def test_text_files_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (checkpoint / "tokenizer.json").write_text(byte_tokenizer().to_str() + "\n\n")
    (checkpoint / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 9, "top_p": 0.5}')
    report = run(checkpoint, out)
    assert report.warnings == ()
    assert sorted(report.files) == sorted(file.name for file in out.iterdir())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [9, 0, 5, 7], "pad_token_id": 0, "top_p": 0.5}


@pytest.mark.parametrize(
    "stored",
    [
        "{{ messages }}",
        [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages }}"}],
    ],
)
def test_chat_template_in_the_tokenizer_config(
    checkpoint: Path, tmp_path: Path, stored: object
) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    run(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_missing_text_files_are_reported(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, eos_token_id=None, pad_token_id=None)
    report = run(checkpoint, tmp_path / "out")
    assert report.files == ("model.m", "generation_config.json")
    assert ["tokenizer.json" in line for line in report.warnings] == [True, False, False]
    assert "chat template" in report.warnings[1]
    assert "eos_token_id" in report.warnings[2]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": []}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported, only glm, glm4"),
        ({"model_type": "chatglm"}, "kv_channels is missing"),
        ({"model_type": ["glm"]}, "model_type ['glm'] is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn'"),
        ({"hidden_size": 96}, "tensor model.embed_tokens.weight is [331, 64]"),
        ({"intermediate_size": 48}, "gate_up_proj.weight is [192, 64], config.json says [96, 64]"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
        ({"rope_parameters": {"partial_rotary_factor": 0.45}}, "rotary dim is 7"),
        ({"eos_token_id": ["<eos>"]}, "eos_token_id is ['<eos>']"),
    ],
)
def test_bad_configs_are_refused(
    checkpoint: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    edit_config(checkpoint, **fields)
    assert reason in refusal(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    "kinds", [[[], "full", "full", "full"], ["full", "shared"], "full", [None] * 4]
)
def test_bad_lists_of_indexers_are_refused(kinds: object) -> None:
    hf = json.loads((GOLDEN / "glm_moe_dsa_sparse_bf16" / "config.json").read_text())
    with pytest.raises(FileError, match="expected full or shared, 4 times"):
        CHECKPOINTS["glm_moe_dsa"].config_from_hf(hf | {"indexer_types": kinds}, FloatType.Q40)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_broken_config_is_refused(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    assert f"{checkpoint / 'config.json'} " in refusal(checkpoint, tmp_path / "out")


def test_missing_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(checkpoint, tmp_path / "out")
    (checkpoint / "config.json").unlink()
    assert f"{checkpoint / 'config.json'} does not exist" in refusal(checkpoint, tmp_path / "out")


def test_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    message = refusal(checkpoint, tmp_path / "out")
    assert "tensor model.layers.1.mlp.down_proj.weight is missing" in message


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_unsupported_type_is_refused(
    checkpoint: Path, tmp_path: Path, dtype: type[np.generic]
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    message = refusal(checkpoint, tmp_path / "out")
    assert f"{checkpoint / 'model.safetensors'}: tensor {name} is of type" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q40])
def test_non_finite_weights_are_refused(
    checkpoint: Path, tmp_path: Path, value: float, weights: FloatType
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors[name].__setitem__((63, 5), value))
    assert f"tensor {name} has values that are NaN" in refusal(
        checkpoint, tmp_path / "out", weights
    )


def test_weights_too_large_for_a_scale_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors[name].__setitem__((63, 5), -600_000))
    assert "too large for Q40" in refusal(checkpoint, tmp_path / "out", FloatType.Q40)
    run(checkpoint, tmp_path / "out", FloatType.Q80)


def test_rows_of_partial_blocks_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, intermediate_size=80)

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):
            tensors[layer + "gate_up_proj.weight"] = np.ones((160, 64), np.float32)
            tensors[layer + "down_proj.weight"] = np.ones((64, 80), np.float32)

    edit_tensors(checkpoint, narrow)
    message = refusal(checkpoint, tmp_path / "out", FloatType.Q40)
    assert "layers.0.mlp.down_proj.weight: 80 values are not whole Q40 blocks" in message
    assert "--weights f32" in message
    run(checkpoint, tmp_path / "out", FloatType.F32)


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_truncated_shard_is_refused(sharded: Path, tmp_path: Path, kept: int) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert f"{shard}: " in refusal(sharded, tmp_path / "out")


def test_pointer_instead_of_a_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert f"{shard}: " in refusal(sharded, tmp_path / "out")


def test_missing_shard_is_refused(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert f"{shard}: missing, and model.safetensors.index.json names it" in refusal(
        sharded, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"x": "model-00001-of-00002.safetensors"}, "tensor x is missing, which"),
        ({"x": "../config.json"}, "expected the name of a file"),
        ({"x": 5}, "expected the name of a file"),
        ([], "no object named weight_map"),
    ],
)
def test_bad_index_is_refused(
    sharded: Path, tmp_path: Path, weight_map: object, reason: str
) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert reason in refusal(sharded, tmp_path / "out")


def test_shard_that_shrinks_while_it_is_read(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    opened = Checkpoint.open(checkpoint)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(FileError, match=r"ends inside tensor lm_head\.weight"):
        opened.rows("lm_head.weight", 0, 331)


def test_safetensors_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install pyllama-dist[root]" in refusal(GOLDEN / "glm_f32", tmp_path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, FileError])
def test_interrupted_conversion_leaves_the_old_model(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    run(GOLDEN / "glm_f16", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def progress(done: int, size: int) -> None:
        if done > size // 2:
            raise interruption("in the middle")

    with pytest.raises(interruption):
        run(GOLDEN / "glm_f32", tmp_path, progress=progress)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    run(GOLDEN / "glm_f32", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} != before


def test_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "0 MiB free" in refusal(GOLDEN / "glm_f32", tmp_path / "out")


def test_unwritable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileError, match=r"out: File exists; the model was not written"):
        run(GOLDEN / "glm_f32", tmp_path / "out")


def test_checkpoint_is_not_overwritten(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="the checkpoint's own directory"):
        run(checkpoint, checkpoint / ".." / "checkpoint")


# --- text files are checked before the model is written


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", LFS, "git lfs pull"),
        ("chat_template.jinja", LFS, "git lfs pull"),
        ("tokenizer.json", b'{"model": "x"}', "no vocabulary"),
        ("tokenizer.json", b"<!DOCTYPE html>", "damaged"),
        ("chat_template.jinja", "{{ 1 }}".encode("utf-16"), "not UTF-8"),
        ("chat_template.jinja", b"{% for %}", "line 1"),
        ("tokenizer_config.json", b"{", "damaged"),
        ("generation_config.json", LFS, "damaged"),
    ],
)
def test_damaged_text_files_are_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    source = write_checkpoint(tmp_path / "source", files={name: content})
    with pytest.raises(FileError, match=reason) as caught:
        converted(source, tmp_path / "out")
    assert str(source / name) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    shutil.copy(BUILTIN / "tokenizer.json", source)
    with pytest.raises(FileError, match="1270 tokens, the model 288; they are of different"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "told", "sampling"),
    [
        ({"temperature": float("nan")}, "temperature in generation_config.json is nan", (0.8, 0.9)),
        ({"temperature": -1, "top_p": 0.5}, "temperature in generation", (0.8, 0.5)),
        ({"top_p": 1.1, "temperature": 0.6}, "top_p in generation_config.json is 1.1", (0.6, 0.9)),
        ({"top_p": "0.5"}, "top_p in generation_config.json is '0.5'", (0.8, 0.9)),
        ({"temperature": None, "top_p": 1}, "", (0.8, 1)),
        ({"eos_token_id": [257, 4294967295]}, "eos_token_id 4294967295 is beyond", (0.8, 0.9)),
        ({"eos_token_id": -1}, "eos_token_id -1 is beyond", (0.8, 0.9)),
    ],
)
def test_settings_that_cannot_be_are_left_out(
    tmp_path: Path, settings: dict[str, object], told: str, sampling: tuple[float, float]
) -> None:
    files = {"generation_config.json": settings, "chat_template.jinja": "hi"}
    report = converted(write_checkpoint(tmp_path / "source", files=files), tmp_path / "out")
    assert [told in line for line in report.warnings] == [True] * bool(told)
    with open_model(tmp_path / "out") as parts:
        how = parts.sampling(None, None, None)
        assert (how.temperature, how.topp) == sampling
        assert parts.tokenizer.eos_ids == {257}


def test_settings_of_others_do_not_matter_where_one_gives_own(tmp_path: Path) -> None:
    converted(write_checkpoint(tmp_path / "source"), tmp_path / "out")
    (tmp_path / "out/generation_config.json").write_text('{"temperature": NaN}')
    with open_model(tmp_path / "out") as parts:
        assert parts.sampling(0.5, None, None).temperature == 0.5
        with pytest.raises(FileError, match="mend or remove"):
            parts.sampling(None, 0.5, None)
        with pytest.raises(UsageError):
            parts.sampling(-1, None, None)


def test_an_added_token_that_no_row_is_for(tmp_path: Path) -> None:
    """It is told, and refused only by a prompt that has it."""
    library = byte_tokenizer()
    library.add_tokens([AddedToken(f"<{n}>", special=True) for n in range(288 - 260 + 1)])
    template = "{{ messages[0].content }}{% if messages | length > 1 %}<28>{% endif %}"
    files = {"tokenizer.json": library.to_str(), "chat_template.jinja": template}
    report = converted(write_checkpoint(tmp_path / "source", files=files), tmp_path / "out")
    assert any("beyond the model's 288: <28>;" in line for line in report.warnings)
    said: dict[str, object] = {"role": "user", "content": "<28><27>"}
    with open_model(tmp_path / "out") as parts:
        assert parts.template is not None
        assert parts.tokenizer.vocab_size == 288
        ids = parts.tokenizer.encode_template(parts.template.render([said]))
        assert ids == parts.tokenizer.encode("<28><27>")
        with pytest.raises(FileError, match="'<28>', token 288, and the model has 288"):
            parts.tokenizer.encode_template(parts.template.render([said, said]))


def test_text_files_of_another_model_do_not_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = {"chat_template.jinja": "old", "tokenizer_config.json": {"bos_token": "<s>"}}
    converted(write_checkpoint(tmp_path / "source", files=files), out)
    report = converted(write_checkpoint(tmp_path / "other", files={"x": "y"}), out)
    assert [".old now" in line for line in report.warnings] == [False, True, True]
    assert sorted(report.files) == ["generation_config.json", "model.m", "tokenizer.json"]
    assert (out / "chat_template.jinja.old").read_text() == "old"
    with open_model(out) as parts:
        assert parts.template is None


# --- tensors decide how they are stored and named


def same_model(first: Path, second: Path) -> bool:
    return (first / "model.m").read_bytes() == (second / "model.m").read_bytes()


@pytest.mark.parametrize(
    ("said", "told"), [({}, 0), (None, 0), ({"quant_method": "fp8", "a": [1]}, 1), ("?", 1)]
)
def test_what_config_says_of_quantization_does_not_matter(
    tmp_path: Path, said: object, told: int
) -> None:
    run(write_checkpoint(tmp_path / "plain"), tmp_path / "expected")
    source = write_checkpoint(tmp_path / "source", quantization_config=said)
    report = run(source, tmp_path / "out")
    assert sum("quantization_config is in config.json" in w for w in report.warnings) == told
    assert same_model(tmp_path / "out", tmp_path / "expected")


def rename_tensors(
    folder: Path, rename: Callable[[str, np.ndarray], dict[str, np.ndarray]]
) -> Path:
    tensors = load_file(folder / "model.safetensors")
    renamed = [rename(name, values) for name, values in tensors.items()]
    save_file({k: v for part in renamed for k, v in part.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("stored", [np.int8, np.uint8, None])
def test_quantized_tensors_are_refused(tmp_path: Path, stored: type | None) -> None:
    """Those of bitsandbytes, and those of GPTQ, whose names are others."""

    def quantized(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        if "down_proj" not in name:
            return {name: values}
        return {name: values.astype(stored)} if stored else {name[:-6] + "qweight": values}

    source = write_checkpoint(tmp_path / "source", quantization_config={"quant_method": "x"})
    rename_tensors(source, quantized)
    message = refusal(source, tmp_path / "out")
    assert "quantized (quant_method 'x'): use the unquantized checkpoint" in message


@pytest.mark.parametrize(
    ("inner", "head"),
    [
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("", "lm_head."),
    ],
)
def test_names_of_a_part_of_a_larger_model(tmp_path: Path, inner: str, head: str) -> None:
    def renamed(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        if name.startswith("lm_head."):
            return {head + name.removeprefix("lm_head."): values}
        return {inner + name.removeprefix("model."): values}

    run(write_checkpoint(tmp_path / "plain", "glm4"), tmp_path / "expected")
    source = rename_tensors(write_checkpoint(tmp_path / "source", "glm4"), renamed)
    run(source, tmp_path / "out")
    assert same_model(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["glm4_moe_f32", "glm_moe_dsa_sparse_bf16"])
def test_experts_in_one_tensor(tmp_path: Path, variant: str, fused: bool, suffix: str) -> None:
    """As transformers 5 keeps them in memory: [experts, 2 * width, dim], gate first."""
    run(GOLDEN / variant, tmp_path / "expected")
    folder = Path(shutil.copytree(GOLDEN / variant, tmp_path / "source"))
    tensors = stored_floats(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        before, _, after = name.partition(".mlp.experts.")
        number, kind, _ = after.split(".")
        experts.setdefault(f"{before}.mlp.experts.{kind}", {})[int(number)] = tensors.pop(name)
    stacks = {name: np.stack([parts[n] for n in sorted(parts)]) for name, parts in experts.items()}
    for name in [name for name in stacks if name.endswith(".gate_proj") and fused]:
        up = name.replace("gate_proj", "up_proj")
        fused_name = name.replace("gate_proj", "gate_up_proj")
        stacks[fused_name] = np.concatenate([stacks.pop(name), stacks.pop(up)], axis=1)
    tensors |= {name + suffix: values for name, values in stacks.items()}
    save_file(tensors, folder / "model.safetensors")
    run(folder, tmp_path / "out")
    assert same_model(tmp_path / "out", tmp_path / "expected")

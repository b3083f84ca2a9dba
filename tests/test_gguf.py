"""GGUF import: the same weights give the same model, whichever kind of file holds them."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from pyllama_dist.cli.convert import command
from pyllama_dist.cluster import Cluster, programs
from pyllama_dist.config import FloatType
from pyllama_dist.engine.engine import Engine
from pyllama_dist.errors import FileError
from pyllama_dist.formats.convert import Report
from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.simulate import simulated_root
from pyllama_kernels.blocks import quantize_q40
from tests.gguf_files import (
    ARCHS,
    GOLDEN,
    LAYER_OF_MOE,
    RNG,
    TOP,
    golden_gguf,
    golden_tensors,
    is_matrix,
    llama_name,
    llama_tensors,
    metadata_of,
    normal,
    refusal,
    run,
    small,
    sound,
    write,
)

VARIANTS = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/config.json")
    if json.loads(path.read_text())["model_type"] in ARCHS
)
OF_WHOLE_BLOCKS = [name for name in VARIANTS if "lite" not in name]

source = pytest.fixture(sound)


def logits(model_dir: Path, tokens: list[int]) -> np.ndarray:
    with ModelFile.open(model_dir / "model.m", ARCHITECTURES) as model:
        made = programs(model.config, Cluster(local_workers=1, sync=FloatType.F32))
        with simulated_root(model, made, 1) as root, Engine(root) as engine:
            return engine.logits(tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_floats_gives_the_model_of_the_safetensors(variant: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.F32)
    run(source, tmp_path / "out", FloatType.F32)
    run(GOLDEN / variant, tmp_path / "expected", FloatType.F32)
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("variant", OF_WHOLE_BLOCKS)
def test_a_q4_0_file_and_the_same_weights_as_safetensors_give_one_model(
    variant: str, tmp_path: Path
) -> None:
    same = tmp_path / "checkpoint"
    same.mkdir()
    shutil.copy(GOLDEN / variant / "config.json", same)
    tensors = {
        name: dequantize(quantize(values, Type.Q4_0), Type.Q4_0)
        if is_matrix(name, values)
        else values
        for name, values in golden_tensors(variant).items()
    }
    save_file(tensors, same / "model.safetensors")
    run(same, tmp_path / "expected")
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.Q4_0)
    report = run(source, tmp_path / "out")
    n_matrices = sum(f.float_type is FloatType.Q40 for f in _tensors(report))
    copied = n_matrices - ("lm_head.weight" not in tensors)  # a tied head is the float embedding
    assert f"matrices copied unchanged: {copied} of Q4_0" in report.warnings
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if variant == "glm4_bias_bf16":
        prompt = [3, 1, 4, 1, 5, 9, 2, 6]
        ours, theirs = (logits(file.parent, prompt) for file in files)
        np.testing.assert_array_equal(ours, theirs)


def _tensors(report: Report) -> list:
    return ARCHITECTURES[report.config.arch].tensors(report.config)


@pytest.mark.parametrize("variant", ["glm_f32", "glm4_nobias_bf16"])
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", variant, Type.F32)
    report = run(source, tmp_path / "out", FloatType.F32)
    assert not [line for line in report.warnings if "matrices" in line]
    expected = np.load(GOLDEN / variant / "golden.npz")
    ours = logits(tmp_path / "out", expected["tokens"].tolist())
    assert np.abs(ours - expected["logits"]).max() < 1e-3


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3moe"])
def test_distributed_llamas_architectures_end_as_the_safetensors_do(
    arch: str, kind: Type, tmp_path: Path
) -> None:
    model_type = arch.replace("moe", "_moe")
    config = {
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    attention = {f"self_attn.{name}_proj": normal(*shape) for name, shape in shapes.items()}
    layer = attention | {"input_layernorm": normal(64), "post_attention_layernorm": normal(64)}
    sizes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    if arch != "llama":
        layer |= {f"self_attn.{name}_norm": normal(16) for name in "qk"}
    if arch == "qwen3moe":
        config |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
        config |= {"norm_topk_prob": True}
        layer["mlp.gate"] = normal(3, 64)
        experts = {name: normal(3, *shape) for name, shape in sizes.items()}
        layer |= {
            f"mlp.experts.{expert}.{name}_proj": values[expert].copy()
            for name, values in experts.items()
            for expert in range(3)
        }
    else:
        layer |= {f"mlp.{name}_proj": normal(*shape) for name, shape in sizes.items()}
    top = {name: normal(*((64,) if "norm" in name else (101, 64))) for name in TOP}
    stored = top | {f"model.layers.0.{name}.weight": values for name, values in layer.items()}
    stored = {
        name: dequantize(quantize(values, kind), kind) if is_matrix(name, values) else values
        for name, values in stored.items()
    }
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_file(stored, checkpoint / "model.safetensors")

    names = LAYER_OF_MOE | {"mlp.down_proj": "ffn_down"}
    tensors = {}
    for name, values in stored.items():
        if ".mlp.experts." not in name:
            tensors[llama_name(name, names)] = values
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # In each head, row j of the first half and of the second become rows 2j and 2j + 1.
            halves = values.reshape(-1, 2, 8, 64)
            tensors[llama_name(name, names)] = np.stack([*halves.swapaxes(0, 1)], 2).reshape(
                values.shape
            )
    for name in sizes if arch == "qwen3moe" else ():
        at = "model.layers.0.mlp.experts."
        parts = [stored[f"{at}{expert}.{name}_proj.weight"] for expert in range(3)]
        tensors[f"blk.0.ffn_{name}_exps.weight"] = np.stack(parts)
    more = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 96}
    metadata = small(arch, **(more if arch == "qwen3moe" else {}))
    kinds = {name: kind for name, values in tensors.items() if is_matrix(name, values)}
    source = write(tmp_path / "x.gguf", arch, tensors, metadata, kinds)

    weights = FloatType.F32 if kind is Type.F32 else FloatType.Q40
    run(checkpoint, tmp_path / "expected", weights)
    run(source, tmp_path / "out", weights)
    files = [tmp_path / folder / "model.m" for folder in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_types_are_rounded_with_a_line(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q5_0)
    report = run(source, tmp_path / "out")
    assert "matrices rounded to Q40: 15 of Q5_0" in report.warnings
    name = "model.layers.1.self_attn.o_proj.weight"
    q5 = dequantize(quantize(golden_tensors("glm_f32")[name], Type.Q5_0), Type.Q5_0)
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        np.testing.assert_array_equal(model.raw(name.removeprefix("model.")), quantize_q40(q5))


def test_q8_0_is_copied_to_q80(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "model.gguf", "glm_f32", Type.Q8_0)
    report = run(source, tmp_path / "out", FloatType.Q80)
    assert "matrices copied unchanged: 15 of Q8_0" in report.warnings
    stored = quantize(golden_tensors("glm_f32")["model.layers.0.mlp.down_proj.weight"], Type.Q8_0)
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        np.testing.assert_array_equal(model.raw("layers.0.mlp.down_proj.weight"), stored)


def test_blocks_are_copied_byte_by_byte(source: Path, tmp_path: Path) -> None:
    # Blocks that rounding would change, as llama.cpp's better quantizers make them.
    found = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(source.read_bytes())
    blocks = RNG.integers(0, 256, (found.n_bytes // 18, 18), np.uint8)
    blocks[:, 1] = 0x2C  # a scale of about 0.06
    data[found.data_offset : found.data_offset + found.n_bytes] = blocks.tobytes()
    source.write_bytes(data)
    run(source, tmp_path / "out")
    with ModelFile.open(tmp_path / "out" / "model.m", ARCHITECTURES) as model:
        assert model.raw("layers.1.mlp.down_proj.weight").tobytes() == blocks.tobytes()


def test_a_file_in_parts(tmp_path: Path, source: Path) -> None:
    config = json.loads((GOLDEN / "glm_f32" / "config.json").read_text())
    tensors = llama_tensors("glm_f32")
    write(tmp_path / "parts.gguf", "chatglm", tensors, metadata_of(config), parts=9)
    first, *others = sorted(tmp_path.glob("parts-*.gguf"))
    assert others
    run(first, tmp_path / "out", FloatType.F32)
    run(GOLDEN / "glm_f32", tmp_path / "expected", FloatType.F32)
    expected = (tmp_path / "expected" / "model.m").read_bytes()
    assert (tmp_path / "out" / "model.m").read_bytes() == expected
    assert "give the first one" in refusal(others[0], tmp_path / "no")
    others[0].unlink()
    with pytest.raises(FileError, match=f"{others[0].name} does not exist"):
        run(first, tmp_path / "no")


def test_the_command_takes_a_file(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(source), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "note: matrices copied unchanged: 15 of Q4_0" in result.output
    assert (tmp_path / "out" / "model.m").exists()

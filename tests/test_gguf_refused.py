"""GGUF import: damaged and unsupported files are refused in one line."""

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.gguf_files import (
    MOE,
    golden_gguf,
    normal,
    refusal,
    sentencepiece_metadata,
    small,
    sound,
    write,
)

source = pytest.fixture(sound)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.3, 0.9, 0.9999])
def test_truncated_files_are_refused(source: Path, tmp_path: Path, share: float) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


def test_other_files_are_refused(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "GGUF magic invalid" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("offset", [8, 16, 24])
def test_damaged_counts_are_refused(source: Path, tmp_path: Path, offset: int) -> None:
    data = bytearray(source.read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", 1 << 60)  # tensors, keys, length of the first key
    source.write_bytes(data)
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


@pytest.mark.slow
def test_a_damaged_length_of_a_list_is_refused(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, sentencepiece_metadata)
    data = source.read_bytes()
    at = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    data = data[:at] + struct.pack("<Q", 1 << 60) + data[at + 8 :]
    data += bytes(-(len(data) - at) % 4)  # it ends between two numbers, not in one
    source.write_bytes(data)
    assert "no sound GGUF file" in refusal(source, tmp_path / "out")


def test_bad_scales_are_refused(source: Path, tmp_path: Path) -> None:
    found = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(source.read_bytes())
    data[found.data_offset + 18 : found.data_offset + 20] = np.float16(np.nan).tobytes()
    source.write_bytes(data)
    message = refusal(source, tmp_path / "out")
    assert "mlp.down_proj.weight has blocks whose scale is NaN" in message


@pytest.mark.parametrize(
    ("arch", "more", "reason"),
    [
        ("gemma3", {}, "architecture 'gemma3' is not supported, only chatglm, glm4,"),
        ("glm4", {"rope.dimension_sections": 4}, "a model that sees"),
        ("glm4", {}, "glm4.rope.dimension_count is None"),
        ("llama", {"expert_count": 8}, "a mixture of 8 experts"),
        ("llama", {"rope.dimension_count": 8}, "rope of 8 of 16 values"),
        ("glm4moe", MOE | {"expert_gating_func": 1}, "another function of the router"),
        ("glm4moe", {}, "glm4moe.expert_feed_forward_length is None"),
        ("qwen3", {"attention.key_length": "wide"}, "attention.key_length is 'wide'"),
        ("glm4", {"rope.dimension_count": 8, "rope.scaling.type": "yarn"}, "type 'yarn'"),
    ],
)
def test_what_is_not_implemented_is_refused(
    arch: str, more: dict[str, object], reason: str, tmp_path: Path
) -> None:
    tensors = {"token_embd.weight": normal(101, 64)}
    source = write(tmp_path / "x.gguf", arch, tensors, small(arch, **more))
    assert reason in refusal(source, tmp_path / "out")


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    metadata = small("glm4", **{"rope.dimension_count": 8})
    source = write(tmp_path / "x.gguf", "glm4", {"output.weight": normal(101, 64)}, metadata)
    assert "no matrix token_embd.weight" in refusal(source, tmp_path / "out")
    source = write(tmp_path / "x.gguf", "glm4", {"token_embd.weight": normal(101, 64)}, metadata)
    message = refusal(source, tmp_path / "out")
    assert "tensor model.layers.0.self_attn.q_proj.weight is missing" in message


def test_scales_beside_a_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": normal(101, 64), "blk.0.ffn_up.scale": normal(1)}
    metadata = small("glm4", **{"rope.dimension_count": 8})
    source = write(tmp_path / "x.gguf", "glm4", tensors, metadata)
    assert "blk.0.ffn_up.scale is of a kind that is not" in refusal(source, tmp_path / "out")


def test_a_type_without_numbers_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "glm4")
    small("glm4", **{"rope.dimension_count": 8})(writer)
    writer.add_tensor("token_embd.weight", np.zeros((101, 64), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "x.gguf", tmp_path / "out")
    assert "tensor model.embed_tokens.weight: Dequantization for I8" in message


def test_a_missing_library_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install pyllama-dist[gguf]" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("arch", ["glm4", "glm4moe"])
def test_rope_of_whole_heads_is_refused(arch: str, tmp_path: Path) -> None:
    """All these models turn half of each head; early converters wrote all of it."""
    tensors = {"token_embd.weight": normal(96, 64)}
    experts = {"expert_feed_forward_length": 32, "expert_count": 4, "expert_used_count": 2}
    more = {"rope.dimension_count": 16} | (experts if arch == "glm4moe" else {})
    source = write(tmp_path / "x.gguf", arch, tensors, small(arch, **more))
    assert "rope of all 16 values of a head" in refusal(source, tmp_path / "out")

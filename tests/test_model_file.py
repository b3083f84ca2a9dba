"""The `.m` file: what is written is read, and what is damaged is refused with the reason."""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama_dist.config import (
    Arch,
    Experts,
    FloatType,
    Indexer,
    Latent,
    ModelConfig,
    Pairs,
    Scoring,
    Tensor,
)
from pyllama_dist.errors import FileError
from pyllama_dist.formats.dllama import header
from pyllama_dist.formats.dllama.model_file import ModelFile, tensor_bytes, write_model
from pyllama_dist.models import ARCHITECTURES

MATRIX = "layers.0.mlp.down_proj.weight"  # [64, 96]

CONFIG = ModelConfig(
    arch=Arch.GLM4,
    dim=64,
    ffn_dim=96,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    rotary_dim=16,
    vocab_size=101,
    max_seq_len=128,
    rope_theta=5e6,
    norm_epsilon=1.5625e-7,
    qkv_bias=True,
    weights=FloatType.Q40,
)

EXPERTS = Experts(
    count=8,
    active=3,
    ffn_dim=32,
    shared_ffn_dim=64,
    dense_layers=1,
    scoring=Scoring.SIGMOID,
    bias=True,
    groups=4,
    active_groups=2,
    normalize=True,
    scale=2.5,
)
LATENT = Latent(q_rank=32, kv_rank=96, nope_dim=64, rope_dim=16, value_dim=32, norm_epsilon=1e-6)
LITE = replace(
    CONFIG,
    arch=Arch.GLM4_MOE_LITE,
    n_kv_heads=1,
    head_dim=80,
    qkv_bias=False,
    experts=EXPERTS,
    latent=LATENT,
)
UPSTREAM = replace(CONFIG, qkv_bias=False, rotary_dim=32, norm_epsilon=1e-6)
QWEN3 = replace(UPSTREAM, arch=Arch.QWEN3, rope_pairs=Pairs.HALVES, qk_norm=True)
CONFIGS = {
    config.arch: config
    for config in (
        CONFIG,
        replace(CONFIG, arch=Arch.GLM),
        replace(
            CONFIG,
            arch=Arch.GLM4_MOE,
            rope_pairs=Pairs.HALVES,
            qk_norm=True,
            experts=EXPERTS,
        ),
        LITE,
        replace(
            LITE,
            arch=Arch.GLM_MOE_DSA,
            indexer=Indexer(n_heads=2, head_dim=32, rotary_dim=16, top_k=8, layers=(True, False)),
        ),
        replace(UPSTREAM, arch=Arch.LLAMA),
        QWEN3,
        replace(
            QWEN3,
            arch=Arch.QWEN3_MOE,
            experts=replace(
                EXPERTS,
                shared_ffn_dim=0,
                dense_layers=0,
                scoring=Scoring.SOFTMAX,
                bias=False,
                groups=1,
                active_groups=1,
                scale=1.0,
            ),
        ),
    )
}

# The pairs of CONFIG, by their numbers in the file.
PAIRS = {
    0: 1,
    1: 0xABCD11,
    2: 64,
    3: 96,
    4: 2,
    5: 4,
    6: 2,
    19: 32,
    102: 16,
    9: 101,
    10: 128,
    101: struct.unpack("<i", struct.pack("<f", 5e6))[0],
    100: struct.unpack("<i", struct.pack("<f", 1.5625e-7))[0],
    103: 1,
    13: 2,
}


def float_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


EXPERT_PAIRS = {7: 8, 8: 3, 21: 32, 105: 64, 106: 1, 107: 4, 108: 2, 109: 1, 110: float_bits(2.5)}
MOE_PAIRS = PAIRS | {1: 0xABCD12, 104: 1} | EXPERT_PAIRS
LITE_PAIRS = (
    {key: value for key, value in PAIRS.items() if key not in (6, 19, 102, 103)}
    | {1: 0xABCD13}
    | EXPERT_PAIRS
    | {111: 32, 112: 96, 113: 64, 114: 16, 115: 32, 116: float_bits(1e-6)}
)
DSA_PAIRS = LITE_PAIRS | {1: 0xABCD14, 117: 2, 118: 32, 119: 8, 120: 1, 121: 0, 122: 0, 123: 0}
NEW_PAIRS = {
    Arch.GLM4_MOE: MOE_PAIRS,
    Arch.GLM4_MOE_LITE: LITE_PAIRS,
    Arch.GLM_MOE_DSA: DSA_PAIRS,
}


def values(tensor: Tensor) -> np.ndarray:
    """Random numbers of its own for each tensor, `[rows, width]` float32."""
    rng = np.random.default_rng(list(tensor.name.encode()))
    return rng.standard_normal((tensor_rows(tensor), tensor.shape[-1]), np.float32)


def tensor_rows(tensor: Tensor) -> int:
    return tensor.shape[0] if len(tensor.shape) == 2 else 1


def chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    yield from np.array_split(values(tensor), min(3, tensor_rows(tensor)))


def write(path: Path, config: ModelConfig = CONFIG) -> Path:
    write_model(path, config, ARCHITECTURES[config.arch].tensors(config), chunks, lambda n: None)
    return path


def raw_header(pairs: dict[int, int] | list[tuple[int, int]]) -> bytes:
    flat = [
        number for pair in (pairs.items() if isinstance(pairs, dict) else pairs) for number in pair
    ]
    return struct.pack(f"<II{len(flat)}i", 0x0A00ABCD, 8 + 4 * len(flat), *flat)


def read_header(folder: Path, content: bytes) -> ModelConfig:
    path = folder / "header"
    path.write_bytes(content)
    with path.open("rb") as file:
        return header.read(file, path)[0]


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        ModelFile.open(path, ARCHITECTURES)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert "Error" not in message
    return message.removeprefix(str(path))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model.m")


def test_header_bytes(model_path: Path) -> None:
    expected = raw_header(PAIRS)
    assert model_path.read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("arch", NEW_PAIRS)
def test_header_bytes_of_newer_architectures(arch: Arch) -> None:
    assert header.encode(CONFIGS[arch]) == raw_header(NEW_PAIRS[arch])


def test_layers_that_pick_are_bits(tmp_path: Path) -> None:
    layers = tuple(layer == 0 or layer % 31 == 0 for layer in range(128))
    config = replace(CONFIGS[Arch.GLM_MOE_DSA], n_layers=128)
    config = replace(config, indexer=replace(config.indexer, layers=layers))
    words = {120: 1 | -(1 << 31), 121: 1 << 30, 122: 1 << 29, 123: 1 << 28}
    assert header.encode(config) == raw_header(DSA_PAIRS | {4: 128} | words)
    assert read_header(tmp_path, header.encode(config)) == config
    with pytest.raises(ValueError, match="129 layers, of which 128 may pick positions"):
        header.encode(
            replace(config, n_layers=129, indexer=replace(config.indexer, layers=(True,) * 129))
        )


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        (Arch.GLM, {"qk_norm": True}, "qk_norm is True, which a model file of glm cannot say"),
        (Arch.GLM4, {"rope_pairs": Pairs.HALVES}, "rope_pairs is halves"),
        (Arch.LLAMA, {"rotary_dim": 16}, "rotary_dim is 16"),
        (Arch.LLAMA, {"qk_norm": True}, "qk_norm is True"),
        (Arch.LLAMA, {"experts": EXPERTS}, "experts.count is 8"),
        (Arch.QWEN3, {"rope_pairs": Pairs.ADJACENT}, "rope_pairs is adjacent"),
        (Arch.QWEN3_MOE, {"experts": EXPERTS}, "experts.shared_ffn_dim is 64"),
        (Arch.GLM4_MOE_LITE, {"n_kv_heads": 2}, "n_kv_heads is 2"),
        (Arch.GLM4_MOE_LITE, {"head_dim": 64}, "head_dim is 64"),
    ],
)
def test_what_a_header_cannot_say_is_not_written(
    arch: Arch, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        header.encode(replace(CONFIGS[arch], **changes))


@given(
    theta=st.floats(1, 1e12),
    epsilon=st.floats(0, 1),
    head_dim=st.integers(1, 4096),
    bias=st.booleans(),
    weights=st.sampled_from([FloatType.F32, FloatType.Q40, FloatType.Q80]),
    arch=st.sampled_from([Arch.GLM, Arch.GLM4, Arch.GLM4_MOE]),
)
def test_header_keeps_the_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    theta: float,
    epsilon: float,
    head_dim: int,
    bias: bool,
    weights: FloatType,
    arch: Arch,
) -> None:
    config = replace(
        CONFIGS[arch],
        rope_theta=theta,
        norm_epsilon=epsilon,
        head_dim=head_dim,
        rotary_dim=head_dim // 2 * 2,
        qkv_bias=bias,
        weights=weights,
    )
    path = tmp_path_factory.getbasetemp() / "header"
    path.write_bytes(header.encode(config))
    with path.open("rb") as file:
        read, size = header.read(file, path)
    assert size == path.stat().st_size
    floats = ("rope_theta", "norm_epsilon")
    assert replace(config, **{name: getattr(read, name) for name in floats}) == read
    for name in floats:
        assert np.float32(getattr(read, name)) == np.float32(getattr(config, name))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1.5625e-7])
def test_decimal_floats_come_back_as_written(tmp_path: Path, epsilon: float) -> None:
    path = write(tmp_path / "model.m", replace(CONFIG, norm_epsilon=epsilon))
    with ModelFile.open(path, ARCHITECTURES) as model:
        assert model.config.norm_epsilon == epsilon


@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q80, FloatType.Q40])
@pytest.mark.parametrize("arch", list(Arch))
def test_what_is_written_is_read(tmp_path: Path, weights: FloatType, arch: Arch) -> None:
    config = replace(CONFIGS[arch], weights=weights)
    with ModelFile.open(write(tmp_path / "model.m", config), ARCHITECTURES) as model:
        assert model.config == config
        assert model.size == (tmp_path / "model.m").stat().st_size
        assert list(model.tensors.values()) == ARCHITECTURES[arch].tensors(config)
        steps = {FloatType.F32: 0.0, FloatType.Q80: 1 / 127, FloatType.Q40: 1 / 8}
        for name, tensor in model.tensors.items():
            expected = values(tensor)
            error = np.abs(model.float32(name).reshape(expected.shape) - expected)
            assert model.float32(name).shape == tensor.shape
            assert error.max() <= steps[tensor.float_type] * np.abs(expected).max() * 1.01


def test_tensors_stand_one_after_the_other(model_path: Path) -> None:
    with ModelFile.open(model_path, ARCHITECTURES) as model:
        stored = b"".join(model.raw(name).tobytes() for name in model.tensors)
        assert raw_header(PAIRS) + stored == model_path.read_bytes()
        assert [model.raw(name).nbytes for name in model.tensors] == [
            tensor_bytes(tensor) for tensor in model.tensors.values()
        ]


@given(data=st.data())
def test_slices_put_together_are_the_matrix(model_path: Path, data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(1, 63), max_size=3)) | {0, 64})
    cols = sorted(data.draw(st.sets(st.sampled_from([32, 64]))) | {0, 96})
    with ModelFile.open(model_path, ARCHITECTURES) as model:
        parts = [
            [
                model.slice(MATRIX, (top, bottom), (left, right))
                for left, right in itertools.pairwise(cols)
            ]
            for top, bottom in itertools.pairwise(rows)
        ]
        np.testing.assert_array_equal(np.block(parts), model.raw(MATRIX))
        del parts


def test_slice_is_a_view_and_has_the_values(model_path: Path) -> None:
    with ModelFile.open(model_path, ARCHITECTURES) as model:
        part = model.slice(MATRIX, (3, 7), (32, 64))
        assert part.base is not None
        assert not part.flags.writeable
        assert part.shape == (4, 18)
        np.testing.assert_array_equal(
            header_free_dequantize(part), model.float32(MATRIX, (3, 7))[:, 32:64]
        )
        bias = model.slice("layers.1.self_attn.q_proj.bias", (0, 1), (5, 9))
        tensor = model.tensors["layers.1.self_attn.q_proj.bias"]
        assert bias.tobytes() == values(tensor)[:, 5:9].tobytes()


def header_free_dequantize(stored: np.ndarray) -> np.ndarray:
    """Values of one Q40 block in each row."""
    scales = np.ascontiguousarray(stored[:, :2]).view("<f2").astype(np.float32)
    halves = np.concatenate([stored[:, 2:] & 15, stored[:, 2:] >> 4], axis=1)
    return (halves.astype(np.float32) - 8) * scales


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        ((0, 1), (0, 16)),
        ((0, 1), (16, 32)),
        ((0, 65), (0, 96)),
        ((-1, 1), (0, 96)),
        ((0, 1), (0, 128)),
    ],
)
def test_bad_slices_are_refused(
    model_path: Path, rows: tuple[int, int], cols: tuple[int, int]
) -> None:
    with (
        ModelFile.open(model_path, ARCHITECTURES) as model,
        pytest.raises(ValueError, match=r"block|in it"),
    ):
        model.slice(MATRIX, rows, cols)


def test_dropped_pages_are_read_again(model_path: Path) -> None:
    with ModelFile.open(model_path, ARCHITECTURES) as model:
        before = model.float32(MATRIX)
        model.drop_pages()
        np.testing.assert_array_equal(model.float32(MATRIX), before)


def test_views_outlive_the_file(model_path: Path) -> None:
    model = ModelFile.open(model_path, ARCHITECTURES)
    view = model.raw(MATRIX)
    expected = view.tobytes()
    model.close()
    assert view.tobytes() == expected


def test_truncated_and_too_long_files_are_refused(model_path: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "model.m", model_path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"truncated, {len(whole) - 1} bytes where its header asks for {len(whole)}" in refusal(
        path
    )
    path.write_bytes(whole + b"\0\0")
    assert f"too long, {len(whole) + 2} bytes where its header asks for {len(whole)}" in refusal(
        path
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes are no model file"),
        (b"\xcd\xab\x00", "3 bytes are no model file"),
        (struct.pack("<II", 0xABCD00, 8), r"old model format (magic 0xabcd00)"),
        (struct.pack("<II", 0xABCD01, 8), r"old model format (magic 0xabcd01)"),
        (b"GGUF" + bytes(40), "begins with 0x46554747 where a model file has 0x0a00abcd"),
        (struct.pack("<II", 0x0A00ABCD, 12), "header of 12 bytes"),
        (struct.pack("<II", 0x0A00ABCD, 0), "header of 0 bytes"),
        (struct.pack("<II", 0x0A00ABCD, 1 << 31), "header of 2147483648 bytes"),
        (raw_header(PAIRS)[:-1], "ends inside its header of 128 bytes"),
        (raw_header({}), "key 1 (ARCH_TYPE) is missing"),
        (raw_header(PAIRS | {99: 7}), "unknown header key 99 (value 7)"),
        (raw_header(PAIRS | {-1: 7}), "unknown header key -1 (value 7)"),
        (raw_header([*PAIRS.items(), (2, 64)]), "key 2 (DIM) stands twice"),
        (raw_header(PAIRS | {1: 0xABCD77}), "unknown architecture 0xabcd77"),
        (raw_header(PAIRS | {7: 8}), "key 7 (N_EXPERTS) has no meaning for glm4"),
        (raw_header(PAIRS | {0: 2}), "key 0 (VERSION) is 2, expected 1;"),
        (raw_header(PAIRS | {2: 0}), "key 2 (DIM) is 0, expected 1 to"),
        (raw_header(PAIRS | {2: 65}), "65 values are not whole Q40 blocks"),
        (raw_header(PAIRS | {9: -5}), "key 9 (VOCAB_SIZE) is -5"),
        (raw_header(PAIRS | {4: 1 << 30}), "key 4 (N_LAYERS) is 1073741824"),
        (raw_header(PAIRS | {6: 3}), "4 query heads do not share 3 key heads evenly"),
        (raw_header(PAIRS | {102: 15}), "rotary dim is 15"),
        (raw_header(PAIRS | {102: 34}), "rotary dim is 34"),
        (raw_header(PAIRS | {101: 0}), "rope theta is 0.0"),
        (raw_header(PAIRS | {101: 0x7F800000}), "rope theta is inf"),
        (raw_header(PAIRS | {100: 0x7FC00000}), "norm epsilon is nan"),
        (raw_header(PAIRS | {103: 2}), "key 103 (QKV_BIAS) is 2"),
        (raw_header(PAIRS | {13: 1}), "weights are F16"),
        (raw_header(PAIRS | {13: 9}), "key 13 (WEIGHT_FLOAT_TYPE) is 9"),
        *(
            (raw_header({k: v for k, v in PAIRS.items() if k != key}), f"key {key} (")
            for key in PAIRS
        ),
        *(
            (raw_header({k: v for k, v in known.items() if k != key}), f"key {key} (")
            for known in NEW_PAIRS.values()
            for key in known
            if key not in PAIRS
        ),
        (raw_header(PAIRS | {104: 1}), "key 104 (QK_NORM) has no meaning for glm4"),
        (raw_header(MOE_PAIRS | {104: 2}), "key 104 (QK_NORM) is 2"),
        (raw_header(MOE_PAIRS | {7: 0}), "key 7 (N_EXPERTS) is 0"),
        (raw_header(MOE_PAIRS | {7: 4097}), "key 7 (N_EXPERTS) is 4097"),
        (raw_header(MOE_PAIRS | {8: 0}), "key 8 (N_ACTIVE_EXPERTS) is 0"),
        (raw_header(MOE_PAIRS | {8: 5}), "5 of 8 experts are chosen"),
        (raw_header(MOE_PAIRS | {21: 0}), "key 21 (MOE_HIDDEN_DIM) is 0"),
        (raw_header(MOE_PAIRS | {105: -1}), "key 105 (SHARED_HIDDEN_DIM) is -1"),
        (raw_header(MOE_PAIRS | {106: 3}), "3 of 2 layers are dense"),
        (raw_header(MOE_PAIRS | {106: -1}), "key 106 (N_DENSE_LAYERS) is -1"),
        (raw_header(MOE_PAIRS | {107: 3}), "2 of 3 groups of 8 experts are impossible"),
        (raw_header(MOE_PAIRS | {107: 8}), "2 of 8 groups of 8 experts are impossible"),
        (raw_header(MOE_PAIRS | {107: 0}), "key 107 (N_EXPERT_GROUPS) is 0"),
        (raw_header(MOE_PAIRS | {108: 5}), "5 of 4 groups of 8 experts are impossible"),
        (raw_header(MOE_PAIRS | {108: 0}), "key 108 (N_ACTIVE_EXPERT_GROUPS) is 0"),
        (raw_header(MOE_PAIRS | {109: 2}), "key 109 (NORMALIZE_EXPERTS) is 2"),
        (raw_header(MOE_PAIRS | {110: 0x7FC00000}), "scale of the experts is nan"),
        (raw_header(MOE_PAIRS | {110: -1}), "key 110 (EXPERT_SCALE_F32) is -1"),
        (raw_header(MOE_PAIRS | {4: 1024, 7: 4096}), "1024 layers of 4096 experts"),
        (raw_header(LITE_PAIRS | {6: 1}), "key 6 (N_KV_HEADS) has no meaning for glm4_moe_lite"),
        (raw_header(LITE_PAIRS | {111: 0}), "key 111 (Q_LORA_RANK) is 0"),
        (raw_header(LITE_PAIRS | {112: 1 << 17}), "key 112 (KV_LORA_RANK) is 131072"),
        (raw_header(LITE_PAIRS | {113: 0}), "key 113 (QK_NOPE_HEAD_DIM) is 0"),
        (raw_header(LITE_PAIRS | {114: 15}), "rotary dim is 15"),
        (raw_header(LITE_PAIRS | {114: 0}), "key 114 (QK_ROPE_HEAD_DIM) is 0"),
        (raw_header(LITE_PAIRS | {112: 72}), "latent vectors of 72 and value heads of 32"),
        (raw_header(LITE_PAIRS | {115: 24}), "latent vectors of 96 and value heads of 24"),
        (raw_header(LITE_PAIRS | {115: 4097}), "key 115 (V_HEAD_DIM) is 4097"),
        (raw_header(LITE_PAIRS | {116: 0x7F800000}), "norm epsilon of latent vectors is inf"),
        (raw_header(LITE_PAIRS | {117: 2}), "key 117 (INDEX_N_HEADS) has no meaning"),
        (raw_header(DSA_PAIRS | {117: 0}), "key 117 (INDEX_N_HEADS) is 0"),
        (raw_header(DSA_PAIRS | {118: 8}), "16 of 8 values of an index head turn"),
        (raw_header(DSA_PAIRS | {119: 0}), "key 119 (INDEX_TOPK) is 0"),
        (raw_header(DSA_PAIRS | {120: 2}), "the first layer takes the positions that none"),
        (raw_header(DSA_PAIRS | {120: 5}), "layers from 2 on pick positions"),
        (raw_header(DSA_PAIRS | {123: -1}), "layers from 2 on pick positions"),
        (raw_header(DSA_PAIRS | {4: 129}), "129 layers, of which 128 may pick positions"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.m"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "model.m")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, ValueError])
def test_interrupted_writing_leaves_the_old_file_alone(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    path = tmp_path / "model.m"
    path.write_bytes(b"old")
    written = 0

    def progress(n_bytes: int) -> None:
        nonlocal written
        written += n_bytes
        if written > 50_000:
            raise interruption

    with pytest.raises(interruption):
        write_model(path, CONFIG, ARCHITECTURES[CONFIG.arch].tensors(CONFIG), chunks, progress)
    assert [file.name for file in tmp_path.iterdir()] == ["model.m"]
    assert path.read_bytes() == b"old"


def test_progress_adds_up_to_the_tensors(tmp_path: Path) -> None:
    tensors = ARCHITECTURES[CONFIG.arch].tensors(CONFIG)
    told: list[int] = []
    write_model(tmp_path / "model.m", CONFIG, tensors, chunks, told.append)
    assert sum(told) == sum(map(tensor_bytes, tensors))


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    tensors = ARCHITECTURES[CONFIG.arch].tensors(CONFIG)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: 100 rows given, 101 expected"):
        write_model(
            tmp_path / "model.m",
            CONFIG,
            tensors,
            lambda tensor: iter([values(tensor)[:100]]),
            lambda n: None,
        )
    assert not list(tmp_path.iterdir())

"""A checkpoint in a GGUF file, seen as one of Hugging Face: its names, shapes and `config.json`.

Source of the names: llama.cpp's convert_hf_to_gguf.py, which renames tensors and, of a llama only,
reorders the rows of q and k (see `GgufCheckpoint.interleaved_qk`).
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from pyllama_dist.config import FloatType
from pyllama_dist.errors import FileError
from pyllama_dist.files import one_line
from pyllama_dist.formats.gguf.config import config_from_gguf
from pyllama_dist.formats.gguf.file import GgufFile
from pyllama_dist.formats.gguf.tokenizer import eos_ids, sidecar_files

if TYPE_CHECKING:
    from gguf import ReaderTensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# ggml's types whose blocks are ours, byte by byte.
_SAME_BLOCKS = {"Q4_0": FloatType.Q40, "Q8_0": FloatType.Q80}

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    # Halves of kv_b_proj, for which Hugging Face has no names: of each head the transposed part
    # for k, [heads * kv_lora_rank, qk_nope_head_dim], and the part for v, as it is there.
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# The same name is another norm in glm4 and glm4moe.
_LAYER_OF = {
    "chatglm": {"ffn_up": "mlp.gate_up_proj"},
    "glm4": {
        "ffn_up": "mlp.gate_up_proj",
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    "glm4moe": {"post_attention_norm": "post_attention_layernorm"},
}
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps")
_IN_LAYER = re.compile(r"blk\.(\d+)\.([\w.]+)\.(weight|bias)")
_IN_CONFIG = "rope_freqs.weight"


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor of the file, seen as a matrix, or numbers of a vector."""

    tensor: "ReaderTensor"
    first: int
    shape: tuple[int, ...]  # [rows, width] or [width]

    @property
    def rows(self) -> npt.NDArray[np.generic]:
        """What is stored, `[rows, numbers or bytes]`; a vector is one row."""
        data = self.tensor.data
        whole = data if len(self.shape) == 1 else data.reshape(-1, data.shape[-1])
        part = np.asarray(whole[self.first : self.first + self.shape[0]])
        return part if len(self.shape) > 1 else part[np.newaxis]


class GgufCheckpoint:
    """An open GGUF file, to be used as a `Checkpoint`.

    Attributes:
        path: of the file, or of its first part.
        config: what `config.json` of the same model says.
        size: bytes of all tensors.
        notes: what the user should know of the metadata, one line each.
        interleaved_qk: whether the rows of q and k are in the order of a `.m` file of a llama,
            pairs of rope side by side, not in Hugging Face's, which has halves of heads.
    """

    path: Path
    config: Mapping[str, object]
    size: int
    notes: tuple[str, ...]
    interleaved_qk: bool

    def __init__(self, file: GgufFile) -> None:
        """Wraps an open file.

        Raises:
            FileError: its architecture is not supported, or metadata and tensors do not agree.
        """
        notes: list[str] = []
        self.path = file.path
        self.config = config_from_gguf(file, notes) | {"eos_token_id": eos_ids(file)}
        self.size = sum(tensor.n_bytes for tensor in file.tensors.values())
        self.notes = tuple(notes)
        self.interleaved_qk = self.config["model_type"] == "llama"
        self._file = file
        self._parts: dict[str, _Part] = {}
        arch = str(file.get("general.architecture"))
        for tensor in file.tensors.values():
            if tensor.name == _IN_CONFIG:
                continue
            self._parts.update(_parts(tensor, arch, self.config, file))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the metadata, and where the tensors are.

        Raises:
            FileError: see `GgufFile.open` and `__init__`.
        """
        return cls(GgufFile.open(path))

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; what Hugging Face has no name for keeps llama.cpp's."""
        return frozenset(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            FileError: there is none of that name.
        """
        return self._find(name).shape

    def stored_type(self, name: str) -> str:
        """ggml's name of a tensor's number format.

        Raises:
            FileError: there is none of that name.
        """
        return self._find(name).tensor.tensor_type.name

    def check_type(self, name: str) -> None:
        """Checks that the numbers of a tensor can be read.

        Raises:
            FileError: there is none of that name, or it is of a type that is not supported.
        """
        self.rows(name, 0, min(1, math.prod(self.shape(name)[:-1])))

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Some rows of a matrix as `[stop - start, width]` float32; a vector is one row.

        Raises:
            FileError: there is no such tensor, or its type is not supported.
            ValueError: rows outside the tensor.
        """
        from gguf.quants import dequantize

        part = self._find(name)
        stored = self._stored(name, start, stop)
        try:
            values = dequantize(stored, part.tensor.tensor_type)
        except NotImplementedError as error:
            raise FileError(
                f"{self.path}: tensor {name}: {one_line(error)}; choose a file of another type"
            ) from None
        return values.reshape(stop - start, part.shape[-1]).astype(np.float32, copy=False)

    def blocks(self, name: str, float_type: FloatType, start: int, stop: int) -> Bytes | None:
        """Some rows as they are stored, `[stop - start, row_bytes]`, if that is in `float_type`.

        Raises:
            FileError: there is no such tensor.
            ValueError: rows outside the tensor.
        """
        if _SAME_BLOCKS.get(self.stored_type(name)) is not float_type:
            return None
        return self._stored(name, start, stop).view(np.uint8)

    def sidecars(self, warnings: list[str]) -> dict[str, bytes]:
        """The text files of a model directory, by name, see `gguf_tokenizer`."""
        return sidecar_files(self._file, warnings)

    def _stored(self, name: str, start: int, stop: int) -> npt.NDArray[np.generic]:
        rows = self._find(name).rows
        if not 0 <= start <= stop <= len(rows):
            raise ValueError(f"{name} has {len(rows)} rows, not {start} to {stop}")
        return rows[start:stop]

    def _find(self, name: str) -> _Part:
        if name not in self._parts:
            raise FileError(
                f"{self.path}: tensor {name} is missing under llama.cpp's name; "
                f"download the file again or choose another one"
            )
        return self._parts[name]


def _parts(
    tensor: "ReaderTensor", arch: str, config: Mapping[str, object], file: GgufFile
) -> Iterator[tuple[str, _Part]]:
    """What is in a tensor, under Hugging Face's names; q, k, v or all experts may share one."""
    shape = tuple(map(int, reversed(tensor.shape)))
    if not shape or 0 in shape or (len(shape) == 1 and tensor.data.shape != shape):
        raise file.damaged(f"tensor {tensor.name} is a {tensor.tensor_type.name} of {list(shape)}")
    flat = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape
    found = _IN_LAYER.fullmatch(tensor.name)
    if found is None:
        if tensor.name.startswith("blk."):
            raise FileError(
                f"{file.path}: tensor {tensor.name} is of a kind that is not supported; "
                f"choose a file of another type, such as Q4_0"
            )
        yield _TOP.get(tensor.name, tensor.name), _Part(tensor, 0, flat)
        return
    layer, stem, kind = f"model.layers.{found[1]}.", found[2], found[3]
    if experts := _EXPERTS.fullmatch(stem):
        kinds = ("gate", "up") if experts[1] == "gate_up" else (experts[1],)
        if len(shape) != 3 or shape[1] % len(kinds):
            raise file.damaged(f"tensor {tensor.name} is {list(shape)}, expected three dimensions")
        height = shape[1] // len(kinds)
        for number, (expert, part) in enumerate(itertools.product(range(shape[0]), kinds)):
            name = f"{layer}mlp.experts.{expert}.{part}_proj.{kind}"
            yield name, _Part(tensor, number * height, (height, shape[2]))
    elif stem == "attn_qkv":
        yield from _split_qkv(tensor, f"{layer}self_attn.", kind, flat, config, file)
    elif stem == "exp_probs_b":
        yield f"{layer}mlp.gate.e_score_correction_bias", _Part(tensor, 0, flat)
    else:
        name = (_LAYER | _LAYER_OF.get(arch, {})).get(stem, stem)
        yield f"{layer}{name}.{kind}", _Part(tensor, 0, flat)


def _split_qkv(
    tensor: "ReaderTensor",
    at: str,
    kind: str,
    shape: tuple[int, ...],
    config: Mapping[str, object],
    file: GgufFile,
) -> Iterator[tuple[str, _Part]]:
    """The fused matrix (or bias) of the first ChatGLMs: q, then k, then v."""
    heads, kv_heads, head_dim = (
        int(str(config[key])) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    first = 0
    for name, n_heads in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        rows = n_heads * head_dim
        yield f"{at}{name}_proj.{kind}", _Part(tensor, first, (rows, *shape[1:]))
        first += rows
    if first != shape[0]:
        raise file.damaged(f"tensor {tensor.name} has {shape[0]} rows, its heads ask for {first}")

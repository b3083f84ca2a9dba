"""GGUF import: the text files made of a file's metadata."""

import json
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import TokenType

from pyllama_dist.conversation import open_model
from pyllama_dist.text.tokenizer import Tokenizer
from tests.checkpoints import byte_tokenizer
from tests.gguf_files import Metadata, golden_gguf, refusal, run, sentencepiece_metadata

ROOT = Path(__file__).parents[1]
GLM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("I'm 12345 years old.\n\n  Fine!", "Äpfel と 水 🙂", "<think>a</think> <|user|>", "  x\t")


def glm_metadata(tokenizer: dict, padding: int = 3) -> Metadata:
    """The tokenizer as llama.cpp's converter writes it."""
    vocab = tokenizer["model"]["vocab"]
    added = tokenizer["added_tokens"]
    tokens = [*sorted(vocab, key=vocab.get), *(token["content"] for token in added)]
    kinds = [TokenType.NORMAL] * len(vocab)
    kinds += [TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for t in added]
    n_tokens = len(tokens)
    tokens += [f"[PAD{n_tokens + number}]" for number in range(padding)]
    kinds += [TokenType.UNUSED] * padding

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("glm4")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
        writer.add_eos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eot_token_id(tokens.index("<|user|>"))
        writer.add_chat_template("[gMASK]<sop>{{ messages }}")
        writer.add_float32("general.sampling.temp", 0.6)

    return add


def test_text_files_of_glm(tmp_path: Path) -> None:
    original = json.loads((ROOT / "pyllama_dist/builtin/tokenizer.json").read_text())
    original["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = GLM_SPLIT
    first = len(original["model"]["vocab"])
    word = {"id": first + 10, "content": "<think>", "special": False}
    original["added_tokens"].append(original["added_tokens"][0] | word)
    n_tokens = first + len(original["added_tokens"])
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, glm_metadata(original), n_tokens)
    out = tmp_path / "out"
    report = run(source, out)
    assert sorted(report.files) == sorted(file.name for file in out.iterdir())
    assert (out / "chat_template.jinja").read_text() == "[gMASK]<sop>{{ messages }}"
    generation = json.loads((out / "generation_config.json").read_text())
    ends = [first, first + 7, first + 9]  # <|endoftext|>, <|user|>, <|observation|>
    assert generation == {"eos_token_id": ends, "temperature": 0.6}
    made = json.loads((out / "tokenizer.json").read_text())
    for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"):
        assert made[key] == original[key]
    (tmp_path / "tokenizer.json").write_text(json.dumps(original))
    ours, theirs = Tokenizer.open(out), Tokenizer.open(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_ids == set(ends)


def test_sentencepiece(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, sentencepiece_metadata)
    run(source, tmp_path / "out")
    tokenizer = Tokenizer.open(tmp_path / "out")
    assert tokenizer.tokens(tokenizer.encode("the he")) == [" the", " he"]
    assert tokenizer.encode("é")[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert 1 not in tokenizer.encode("<s>")  # text is never a control token
    for text in ("the he", "é\n", "<s>", "het  he"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == {2}
    assert tokenizer.added["<s>"].id == 1
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["post_processor"] is not None


def test_unknown_tokenizers_and_missing_templates_are_reported(tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32)
    report = run(source, tmp_path / "out")
    assert report.files == ("model.m", "generation_config.json")
    for words in ("no tokenizer.json was made", "no chat template", "no end-of-text token"):
        assert any(words in line for line in report.warnings)


def broken(key: str, value: list) -> Metadata:
    tokenizer = json.loads((ROOT / "pyllama_dist/builtin/tokenizer.json").read_text())

    def add(writer: gguf.GGUFWriter) -> None:
        glm_metadata(tokenizer)(writer)
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value

    return add


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokens", ["a", "b"], "2 tokens, but 1283 token types"),
        ("merges", ["a"], "no sound tokenizer"),
        ("merges", ["Ġ t", "no such"], "no sound tokenizer"),
        ("tokens", ["a"] * 1283, "two of its tokens have the same text"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens is no list of str"),
    ],
)
def test_damaged_tokenizers_are_refused(key: str, value: list, reason: str, tmp_path: Path) -> None:
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, broken(key, value))
    assert reason in refusal(source, tmp_path / "out")


def llama_metadata(**ids: int) -> Metadata:
    """A byte-level tokenizer with the tokens of `tests.checkpoints`, and these ids of the file."""
    library = json.loads(byte_tokenizer().to_str())
    vocab, added = library["model"]["vocab"], library["added_tokens"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([*sorted(vocab, key=vocab.get), *(t["content"] for t in added)])
        writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL] * len(added))
        writer.add_token_merges([])
        writer.add_chat_template("{% set c = bos_token + messages[0].content %}{{ c + eos_token }}")
        for name, id in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id)

    return add


@pytest.mark.parametrize(
    ("ids", "written", "ends", "told"),
    [
        ({"bos": 256, "eos": 257, "eot": 259}, "<s>hi</s>", {257, 259}, 0),
        ({"bos": 256, "eos": 4294967295}, "<s>hi", {259}, 1),
        ({"bos": 4294967295, "eos": 257}, "hi</s>", {257, 259}, 1),
    ],
)
def test_names_and_stop_ids(
    tmp_path: Path, ids: dict[str, int], written: str, ends: set[int], told: int
) -> None:
    """llama.cpp gives templates the texts of these ids; -1 is no token."""
    source = golden_gguf(tmp_path / "x.gguf", "glm_f32", Type.F32, llama_metadata(**ids))
    report = run(source, tmp_path / "out")
    assert sum("4294967295, which is no token" in line for line in report.warnings) == told
    with open_model(tmp_path / "out") as parts:
        assert parts.template is not None
        prompt = parts.template.render([{"role": "user", "content": "hi"}])
        assert prompt.text == written
        assert parts.tokenizer.eos_ids == ends

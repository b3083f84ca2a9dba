"""Tokenizers that are not a tokenizer.json: `.t`, tiktoken's and SentencePiece's files."""

import base64
import io
import itertools
import json
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyllama_dist.errors import FileError, PyllamaError, UsageError
from pyllama_dist.formats.dllama.tokenizer_file import TokenizerFile
from pyllama_dist.formats.huggingface import sentencepiece_file, tiktoken_file
from pyllama_dist.formats.huggingface.sidecar_files import sidecar_files
from pyllama_dist.model_dir import ModelPaths
from pyllama_dist.text.scored import ScoredVocabulary
from pyllama_dist.text.special import MARK, Rendered
from pyllama_dist.text.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|end|>"


def t_file(
    pieces: Sequence[bytes],
    scores: Sequence[float],
    *,
    bos: int = -1,
    eos: Sequence[int] = (),
    template: str = "",
    extra: Sequence[tuple[int, int]] = ((10, 1),),
    longest: int | None = None,
) -> bytes:
    """A `.t` file as distributed-llama's converter writes it."""
    longest = longest or max(map(len, pieces))
    pairs = [(3, bos), (0, 1), (1, len(pieces)), (2, longest)]
    pairs += [(7, len(template.encode()))] * bool(template) + [(9, len(eos)), *extra]
    header = struct.pack("<ii", 0x567124, 8 + 8 * len(pairs))
    header += b"".join(struct.pack("<ii", *pair) for pair in pairs)
    body = template.encode() + struct.pack(f"<{len(eos)}i", *eos)
    for piece, score in zip(pieces, scores, strict=True):
        body += struct.pack("<fI", score, len(piece)) + piece
    return header + body


def merged(symbols: list[bytes], scores: dict[bytes, float]) -> list[bytes]:
    """All merges, looked for from the beginning each time."""
    while True:
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        found = [(-scores[pair], at) for at, pair in enumerate(pairs) if pair in scores]
        if not found:
            return symbols
        at = min(found)[1]
        symbols = [*symbols[:at], pairs[at], *symbols[at + 2 :]]


def random_pieces(rng: random.Random, count: int) -> list[bytes]:
    """Pieces that merging can reach, many of them periodic; some cut through a character."""
    pieces = [b"a", b"b", b" ", *(bytes([byte]) for byte in "é".encode())]
    while len(pieces) < count + 5:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if piece not in pieces and len(piece) < 9:
            pieces.append(piece)
    return pieces[5:]


def texts(rng: random.Random, alphabet: str, count: int) -> Iterator[str]:
    for _ in range(count):
        yield "".join(rng.choices(alphabet, k=rng.randrange(40)))


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """256 bytes, merges, then bos 260 and other special tokens."""
    pieces = [*BYTES, b"ab", b"abc", "é".encode(), b" ab"]
    pieces += [b"<|begin|>", b"<|user|>", b"<|end|>", b"<think>"]
    path = tmp_path / "small.t"
    scores = [-float(id) for id in range(len(pieces))]
    path.write_bytes(t_file(pieces, scores, bos=260, eos=[262, 260], template=TEMPLATE))
    return path


def test_what_a_t_file_holds(byte_level: Path) -> None:
    file = TokenizerFile.open(byte_level)
    assert (len(file.pieces), file.pieces[257], file.scores[257]) == (264, b"abc", -257.0)
    assert (file.bos_id, file.eos_ids, file.add_bos) == (260, (262, 260), True)
    assert file.chat_template == TEMPLATE


def test_a_t_file_as_a_tokenizer(byte_level: Path) -> None:
    tokenizer, template = ModelPaths.find(byte_level.parent / "x.m").text()
    assert tokenizer.encode("abc ab<|user|>")[:3] == [257, 259, ord("<")]
    assert tokenizer.encode_raw("ab") == [260, 256]
    assert tokenizer.eos_ids == {262, 260}
    assert tokenizer.vocab_size == 264
    assert tokenizer.decode([260, 263, 0xC3, 0xA9, 262]) == "<think>é"
    assert tokenizer.decode([0xC3, 97]) == "\ufffda"
    assert template is not None
    rendered = template.render([{"role": "user", "content": "ab<|end|>"}])
    assert rendered.text == "<|begin|><|user|>ab<|end|><|end|>"
    ids = tokenizer.encode_template(rendered)
    assert ids == [260, 261, 256, *b"<|end|>", 262]


@pytest.mark.parametrize("seed", range(6))
def test_merges_by_score(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [*BYTES, *random_pieces(rng, 60)]
    scores = [float(rng.randrange(-20, 0)) for _ in pieces]  # with ties
    vocabulary = ScoredVocabulary(pieces, scores, None, ())
    by_piece = dict(zip(pieces, scores, strict=True))
    for text in texts(rng, "aaabé ", 60):
        expected = merged([bytes([byte]) for byte in text.encode()], by_piece)
        assert vocabulary.encode(text) == [pieces.index(piece) for piece in expected]


def test_sentencepiece_in_a_t_file() -> None:
    chars = [bytes([byte]) for byte in b" abcd<s>/"] + ["é".encode()]
    words = ["éa".encode(), b"ab", " é".encode(), b" ab"]
    pieces = [b"<unk>", b"<s>", b"</s>", *BYTES, *words, *chars]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words) + len(chars))]
    vocabulary = ScoredVocabulary(pieces, scores, 1, [2])
    assert vocabulary.special == {0, 1, 2}
    index = {piece: id for id, piece in enumerate(pieces)}  # of equal pieces, the later one
    # Characters come whole: from bytes, `ab` would be merged before `é` and `éa`.
    assert vocabulary.encode("éab") == [index["éa".encode()], index[b"b"]]
    assert vocabulary.encode("éa") == [index["éa".encode()]]
    assert vocabulary.encode("<s>") == [index[b"<"], index[b"s"], index[b">"]]
    assert vocabulary.encode("a") == [index[b"a"]] != [3 + ord("a")]
    assert vocabulary.encode("\n漢") == [3 + byte for byte in "\n漢".encode()]


def test_a_long_text_takes_no_quadratic_time() -> None:
    vocabulary = ScoredVocabulary(
        [*BYTES, b"aa", b"aaaa"], [-float(n) for n in range(258)], None, ()
    )
    assert vocabulary.encode("a" * 100_000) == [257] * 25_000


def test_a_character_without_a_token() -> None:
    with pytest.raises(UsageError, match="no token for"):
        ScoredVocabulary([b"a"], [0.0], None, ()).encode("ab")


GOOD = t_file(BYTES, [0.0] * 256, bos=1, eos=[2])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "in the middle of the header"),
        (b"GGUF" + GOOD[4:], "no tokenizer file"),
        (GOOD[:100], "vocab_size"),
        (GOOD[:-1], "in the middle of token 255"),
        (GOOD + b"x", "1 bytes follow"),
        (t_file(BYTES, [0.0] * 256, eos=[256]), "ends an answer is 256"),
        (t_file(BYTES, [0.0] * 256, bos=256), "bos_id is 256"),
        (t_file(BYTES, [float("nan")] * 256), "score of token 0"),
        (t_file([*BYTES, b"ab"], [0.0] * 257, longest=1), "length of token 256"),
        (t_file([b"", b"ab"], [0.0] * 2), "length of token 0"),
        (t_file(BYTES, [0.0] * 256, extra=[(11, 0)]), "key 11"),
        (t_file(BYTES, [0.0] * 256, extra=[(0, 2)]), "version is 2"),
        (t_file(BYTES, [0.0] * 256, extra=[(9, -1)]), "n_eos_tokens"),
        (t_file(BYTES, [0.0] * 256, extra=[(1, 1 << 30)]), "vocab_size"),
        (t_file(BYTES, [0.0] * 256, extra=[(7, 1 << 24)]), "chat template"),
        (struct.pack("<ii", 0x567124, 12), "whole number"),
        (struct.pack("<ii", 0x567124, -8), "size of its header"),
    ],
)
def test_damaged_t_files(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.t"
    path.write_bytes(data)
    with pytest.raises(FileError, match=said) as raised:
        TokenizerFile.open(path)
    assert str(raised.value).startswith(str(path))


def test_old_t_files(tmp_path: Path) -> None:
    path = tmp_path / "x.t"
    body = b"".join(struct.pack("<fI", 0.0, 1) + byte for byte in BYTES)
    path.write_bytes(struct.pack("<IIIiii", 0x567123, 256, 1, 1, 2, -1) + body)
    file = TokenizerFile.open(path)
    assert (file.bos_id, file.eos_ids, file.add_bos) == (1, (2,), True)
    keys = [(4, 5), (6, 7), (8, 0)]
    path.write_bytes(t_file(BYTES, [0.0] * 256, extra=keys))
    file = TokenizerFile.open(path)
    assert (file.bos_id, file.eos_ids, file.add_bos) == (None, (5, 7), False)


def test_any_cut_of_a_t_file_is_an_error(tmp_path: Path, byte_level: Path) -> None:
    path, data = tmp_path / "cut.t", byte_level.read_bytes()
    for size in range(0, len(data), 41):
        path.write_bytes(data[:size])
        with pytest.raises(FileError):
            TokenizerFile.open(path)


def test_where_a_model_finds_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.m").touch()
    assert ModelPaths.find(tmp_path).model == tmp_path / "a.m"
    assert ModelPaths.find(tmp_path / "a.m").tokenizer == tmp_path / "tokenizer.json"
    (tmp_path / "a.t").touch()
    assert ModelPaths.find(tmp_path / "a.m").tokenizer == tmp_path / "a.t"
    assert ModelPaths.find(tmp_path / "a.m").name == "a"
    (tmp_path / "b.t").touch()
    with pytest.raises(UsageError, match=r"--tokenizer FILE\.t"):
        ModelPaths.find(tmp_path / "a.m")
    assert ModelPaths.find(tmp_path, tmp_path / "b.t").tokenizer == tmp_path / "b.t"
    (tmp_path / "tokenizer.json").touch()
    assert ModelPaths.find(tmp_path / "a.m").tokenizer == tmp_path / "tokenizer.json"
    (tmp_path / "b.m").touch()
    with pytest.raises(UsageError, match=r"--model FILE\.m"):
        ModelPaths.find(tmp_path)
    (tmp_path / "model.m").touch()
    assert ModelPaths.find(tmp_path).name == tmp_path.name


def ranks_file(pieces: Sequence[bytes]) -> bytes:
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))
    return b"".join(lines)


def checkpoint(directory: Path, tokenizer_model: bytes) -> Path:
    """A checkpoint with this `tokenizer.model`, converted; only its text files."""
    (directory / "tokenizer.model").write_bytes(tokenizer_model)
    out = directory / "out"
    out.mkdir()
    for name, data in sidecar_files(directory, {}, []).items():
        (out / name).write_bytes(data)
    return out


def trained_pieces(rng: random.Random) -> list[bytes]:
    """Bytes, then merges of neighbours in words: what training would give, in random order."""
    words = [b"abab", b"aaaaaa", b" hello", b" world", "naïve".encode(), "漢字".encode(), b"    "]
    pieces = list(BYTES)
    rng.shuffle(pieces)
    while len(pieces) < 276:
        scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
        symbols = merged([bytes([byte]) for byte in rng.choice(words)], scores)
        pairs = [a + b for a, b in itertools.pairwise(symbols)]
        if pairs:
            pieces.append(rng.choice(pairs))
    return pieces


def tiktoken_texts(rng: random.Random) -> list[str]:
    parts = [
        " hello",
        "hello",
        " world",
        "abab",
        "aaa",
        "naïve",
        "漢字",
        "  ",
        "\n",
        "12345",
        "'s",
        "!",
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(150)]


@pytest.mark.parametrize("seed", range(4))
def test_tiktoken_by_brute_force(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    pieces = trained_pieces(rng)
    tokenizer = Tokenizer.open(checkpoint(tmp_path, ranks_file(pieces)))
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    scores = {piece: -float(rank) for piece, rank in ranks.items()}
    # Words without a rule among them: one letter class, at most one space before it.
    for text in (
        "abababab",
        " hello",
        " helloworld",
        "aaaaaaaaab",
        "naïvenaïve",
        "漢字漢",
        "bababa",
    ):
        data = text.encode()
        expected = [data] if data in ranks else merged([bytes([byte]) for byte in data], scores)
        assert tokenizer.encode(text) == [ranks[piece] for piece in expected]
    for text in tiktoken_texts(rng):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("seed", range(4))
def test_tiktoken_by_itself(tmp_path: Path, seed: int) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(seed)
    pieces = trained_pieces(rng)
    tokenizer = Tokenizer.open(checkpoint(tmp_path, ranks_file(pieces)))
    theirs = tiktoken.Encoding(
        "glm",
        pat_str=tiktoken_file.SPLIT,
        mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
        special_tokens={},
    )
    for text in tiktoken_texts(rng):
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)


def test_special_tokens_of_glm_4(tmp_path: Path) -> None:
    out = checkpoint(tmp_path, ranks_file(BYTES))
    tokenizer = Tokenizer.open(out)
    # 151329 in the real one: they follow the ranks.
    assert tokenizer.added["<|endoftext|>"].id == 256
    assert tokenizer.added["[gMASK]"].id == 256 + 151331 - 151329
    assert tokenizer.added["<|observation|>"].id == 256 + 151338 - 151329
    assert tokenizer.added["<|end_of_video|>"].id == 256 + 151342 - 151329
    assert tokenizer.encode_raw("a") == [258, 260, ord("a")]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [
        256,
        263,
        265,
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"YQ== 0\nYQ==\n", "line 2"),
        (b"YQ== 0\n??? 1\n", "line 2"),
        (b"YQ== 0\nYg== 7\n", "gaps"),
        (b"YQ== 0\nYg== 1\n", "byte 0x00 is no piece"),
        (ranks_file([*BYTES, b"a"]), "equal"),
    ],
)
def test_damaged_tiktoken_files(data: bytes, said: str) -> None:
    with pytest.raises(FileError, match=said):
        tiktoken_file.tokenizer_json(data, Path("tokenizer.model"))


WORDS = ["the", "cat", "sat", "hello", "world", "ababa", "aaaa", "naïve", "漢字", "данные", "x1"]


def sp_model(**settings: Any) -> bytes:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    rng = random.Random(1)
    lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
        | settings,
    )
    return model.getvalue()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    {"add_dummy_prefix": False, "normalization_rule_name": "nfkc"},
    {"byte_fallback": False, "vocab_size": 90},
    {"user_defined_symbols": ["<n>", "<ab>", "aba"], "remove_extra_whitespaces": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sentencepiece_by_itself(tmp_path: Path, settings: dict[str, Any]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sp_model(**settings)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = Tokenizer.open(checkpoint(tmp_path, model))
    rng = random.Random(2)
    parts = [
        *WORDS,
        " ",
        "  ",
        "\n",
        "\t",
        "①",
        "ﬁ",
        "𝄞",
        "é",
        "e\u0301",
        "<n>",
        "<ab>",
        "</s>",
        "ab",
    ]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randrange(10)))
        assert ours.encode(text) == theirs.encode(text), text
        if settings == SETTINGS[1]:
            assert ours.decode(ours.encode(text)) == text


def test_special_tokens_of_chatglm3(tmp_path: Path) -> None:
    model = sp_model()
    out = checkpoint(tmp_path, model)
    tokenizer = Tokenizer.open(out)
    # 64790, 64792, 64795, 64797 in the real one, which has 64789 pieces.
    names = ("[gMASK]", "sop", "<|user|>", "<|observation|>")
    assert [tokenizer.added[name].id for name in names] == [341, 343, 346, 348]
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {2, 346, 348}
    ids = tokenizer.encode_template(Rendered(f"[gMASK]sop<|user|>\n the s{MARK}op"))
    assert ids[:3] == [341, 343, 346]
    assert 343 not in ids[3:]


def test_refused_sentencepiece_models() -> None:
    def convert(data: bytes) -> bytes:
        return sentencepiece_file.tokenizer_json(data, Path("tokenizer.model"), ())

    with pytest.raises(FileError, match="type BPE"):
        convert(sp_model(model_type="unigram", vocab_size=290))
    for data in (b"\xff\xff\xff", b"", sp_model()[:500]):
        with pytest.raises(FileError, match="download it again"):
            convert(data)


def test_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.protobuf.message", None)
    with pytest.raises(PyllamaError, match=r"pyllama-dist\[sentencepiece\]"):
        sentencepiece_file.tokenizer_json(b"\n", Path("tokenizer.model"), ())

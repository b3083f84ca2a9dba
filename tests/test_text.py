"""Tokenizer and streaming decode against the tokenizers library; tokenizers are trained here."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Library

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.text.detokenize import byte_alphabet
from pyllama_dist.text.special import MARK, Breaker, Rendered
from pyllama_dist.text.tokenizer import Tokenizer

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
PLAIN = ["/nothink", "<think>", "</think>", "<tool_call>", "</tool_call>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog thinks about it.",
    "What is 17 times 23? Let me think: it is 391.",
    "你好,世界。今天天气很好。 Größe, naïve café, Ελλάδα, привет 👍🏽 emoji",
    "def f(x):\n    return x  # nothink\n\n\tuser assistant system",
] * 4

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK))
hostile = st.lists(
    st.one_of(st.sampled_from(SPECIAL + PLAIN + ["<|", "user", "|>", "<", " ", "\n"]), text)
).map("".join)


def train_byte_level(directory: Path) -> None:
    """A small tokenizer.json in the manner of glm-4-9b-chat-hf."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            # The trainer also puts these into the vocabulary, where `ignore_merges` finds them.
            special_tokens=[AddedToken(word, special=True) for word in SPECIAL],
            show_progress=False,
        ),
    )
    library.add_tokens([AddedToken(word, normalized=False) for word in PLAIN])
    library.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        special_tokens=[(word, library.token_to_id(word)) for word in ("[gMASK]", "<sop>")],
    )
    fields = json.loads(library.to_str())
    fields["model"]["ignore_merges"] = True
    fields["model"]["vocab"]["/nothink"] = library.token_to_id("/nothink")
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (directory / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")


def train_sentencepiece(directory: Path) -> None:
    """A tokenizer.json as converted from SentencePiece: U+2581 for spaces, byte tokens."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library = Library(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.normalizer = spaces
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    fields = json.loads(library.to_str())
    fields["added_tokens"] = fields["added_tokens"][:2]
    (directory / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    train_byte_level(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.open(model_dir)


@pytest.fixture(scope="module")
def library(model_dir: Path) -> Library:
    library = Library.from_file(str(model_dir / "tokenizer.json"))
    library.no_truncation()
    return library


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece(directory)
    return directory


@pytest.fixture(scope="module")
def sentencepiece(sentencepiece_dir: Path) -> Tokenizer:
    return Tokenizer.open(sentencepiece_dir)


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


# --- tokenizer


def test_added_tokens_keep_their_ids(tokenizer: Tokenizer, library: Library) -> None:
    assert {word: token.id for word, token in tokenizer.added.items()} == {
        word: library.token_to_id(word) for word in SPECIAL + PLAIN
    }
    assert {word for word, token in tokenizer.added.items() if token.special} == set(SPECIAL)
    assert tokenizer.vocab_size == library.get_vocab_size()


@given(text)
def test_encode_is_the_librarys(tokenizer: Tokenizer, library: Library, words: str) -> None:
    if not any(word in words for word in SPECIAL + PLAIN):
        assert tokenizer.encode(words) == library.encode(words, add_special_tokens=False).ids


@given(hostile)
def test_encode_knows_no_special_strings(tokenizer: Tokenizer, words: str) -> None:
    ids = tokenizer.encode(words)
    assert not {token.id for token in tokenizer.added.values()} & set(ids)
    assert tokenizer.decode(ids) == words


@pytest.mark.parametrize("word", SPECIAL + PLAIN)
def test_a_special_string_alone_is_plain(tokenizer: Tokenizer, word: str) -> None:
    ids = tokenizer.encode(word)
    assert tokenizer.added[word].id not in ids
    assert tokenizer.decode(ids) == word


def test_raw_prompt_has_the_prefix_once(
    tokenizer: Tokenizer, library: Library, sentencepiece: Tokenizer
) -> None:
    assert tokenizer.encode_raw("the dog") == library.encode("the dog").ids
    assert sentencepiece.encode_raw("the dog") == sentencepiece.encode("the dog")


@pytest.mark.parametrize("part", [5, "[gMASK]", {"SpecialToken": "[gMASK]"}, {"Sequence": {}}])
def test_what_is_no_special_token_ends_the_prefix(
    model_dir: Path, tmp_path: Path, part: object
) -> None:
    """The library never sees this part of the file, so nothing says that it is sound."""
    fields = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    first = {"SpecialToken": {"id": "[gMASK]", "type_id": 0}}
    fields["post_processor"]["single"] = [first, part, first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.prefix == (tokenizer.added["[gMASK]"].id,)


@pytest.mark.parametrize(
    ("given_text", "kept"), [("a\udce4b", "a\ufffdb"), ("\ud83d", "\ufffd"), ("\ud83d\ude00", "😀")]
)
def test_surrogates(tokenizer: Tokenizer, given_text: str, kept: str) -> None:
    assert tokenizer.decode(tokenizer.encode(given_text)) == kept


@given(st.data())
def test_stream_is_decode_is_the_librarys(
    tokenizer: Tokenizer, library: Library, data: st.DataObject
) -> None:
    known = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(known))
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    # Every stop token is special here, so both hide the same ones.
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@given(text)
def test_stream_waits_for_whole_characters(tokenizer: Tokenizer, words: str) -> None:
    parts = streamed(tokenizer, tokenizer.encode(words))
    assert "".join(parts) == words
    assert parts[-1] == ""
    if "\ufffd" not in words:
        assert not any("\ufffd" in part for part in parts)


def byte_ids(library: Library, data: bytes) -> list[int]:
    chars = {byte: char for char, byte in byte_alphabet().items()}
    ids = [library.token_to_id(chars[byte]) for byte in data]
    return [token for token in ids if token is not None]


def test_stream_of_broken_bytes(tokenizer: Tokenizer, library: Library) -> None:
    assert streamed(tokenizer, byte_ids(library, b"a\xe4\xbd")) == ["a", "", "", "\ufffd"]
    assert streamed(tokenizer, byte_ids(library, b"\xe4\xbda")) == ["", "", "\ufffda", ""]
    assert streamed(tokenizer, byte_ids(library, b"\xff\xffa")) == ["\ufffd", "\ufffd", "a", ""]
    assert streamed(tokenizer, byte_ids(library, b"\xe4\xbd\xa0")) == ["", "", "你", ""]


def test_what_is_never_printed(tokenizer: Tokenizer) -> None:
    added = {word: token.id for word, token in tokenizer.added.items()}
    outside = [-1, tokenizer.vocab_size, 151400, 2**40]
    ids = [added["<think>"], *outside, added["<|user|>"], *tokenizer.encode("so"), added["<eop>"]]
    assert tokenizer.decode(ids) == "<think>so"
    assert "".join(streamed(tokenizer, ids)) == "<think>so"


def test_printable_tokens(tokenizer: Tokenizer, library: Library) -> None:
    ids = [tokenizer.added["<|user|>"].id, *byte_ids(library, b"\n a\xe4"), 10**6]
    assert tokenizer.tokens(ids) == ["<|user|>", "\\n", " ", "a", "\\xe4", ""]


@given(text)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, words: str) -> None:
    ids = sentencepiece.encode(words)
    # The format writes a space as U+2581 and cannot tell them apart.
    assert sentencepiece.decode(ids) == words.replace("▁", " ")
    assert "".join(streamed(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_sentencepiece_bytes(sentencepiece: Tokenizer, sentencepiece_dir: Path) -> None:
    library = Library.from_file(str(sentencepiece_dir / "tokenizer.json"))
    vocab = library.get_vocab()
    ids = [vocab[f"<0x{byte:02X}>"] for byte in "ŋ".encode()]
    assert streamed(sentencepiece, [*ids, ids[0]]) == ["", "ŋ", "", "\ufffd"]
    assert vocab["</s>"] not in sentencepiece.encode("</s>")
    spaces = [vocab["▁"], vocab["▁"], vocab["a"]]
    assert streamed(sentencepiece, spaces) == ["", " ", "a", ""]
    assert sentencepiece.decode(spaces) == library.decode(spaces)


# --- stop tokens


def with_config(source: Path, directory: Path, config: str | None) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    if config is not None:
        (directory / "generation_config.json").write_text(config)
    return Tokenizer.open(directory)


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ('{"eos_token_id": 3}', {3}),
        ('{"eos_token_id": [3, 5]}', {3, 5}),
        ("{}", None),
        (None, None),
    ],
)
def test_stop_tokens(
    model_dir: Path, tmp_path: Path, config: str | None, eos: set[int] | None
) -> None:
    tokenizer = with_config(model_dir, tmp_path, config)
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    assert tokenizer.eos_ids == (eos or {tokenizer.added[word].id for word in stops})


def test_a_stop_token_is_hidden_even_if_not_special(model_dir: Path, tmp_path: Path) -> None:
    plain = Tokenizer.open(model_dir)
    (letter,) = plain.encode("Q")
    tokenizer = with_config(model_dir, tmp_path, json.dumps({"eos_token_id": letter}))
    assert tokenizer.decode([letter, *plain.encode("a"), letter]) == "a"


def test_added_words_do_not_break_roles() -> None:
    breaker = Breaker(["real", "aXa"])
    assert breaker.text("user") == "user"
    assert breaker.text("aXaXa") == f"a{MARK}Xa{MARK}Xa"


# --- errors


def valid(**changes: object) -> str:
    """A tiny tokenizer.json with fields changed."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model} | changes)


@pytest.mark.parametrize(
    ("content", "said_in_it"),
    [
        (None, "does not exist"),
        (b"\xff\xfe", "UTF-8"),
        (b"{", "damaged"),
        (b"[" * 200_000, "damaged"),
        (b"[]", "object"),
        (b"{}", "vocabulary"),
        (valid(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "vocabulary"),
        (valid(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}), "`z`"),
        (valid(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}), "tokenizer"),
        (valid(added_tokens=7), "added_tokens"),
        (valid(added_tokens=[{"id": 5}]), "added_tokens[0]"),
        (valid(added_tokens=[{"id": -5, "content": "<x>"}]), "added_tokens[0]"),
        (valid(added_tokens=[{"id": 1, "content": "<x>"}]), "id 1"),
    ],
)
def test_bad_tokenizer_files(tmp_path: Path, content: str | bytes | None, said_in_it: str) -> None:
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(FileError) as raised:
        Tokenizer.open(tmp_path)
    assert said_in_it in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("eos", ['"x"', "-1", "[1, null]", "true", "1.5"])
def test_bad_stop_tokens(model_dir: Path, tmp_path: Path, eos: str) -> None:
    with pytest.raises(FileError, match="eos_token_id"):
        with_config(model_dir, tmp_path, f'{{"eos_token_id": {eos}}}')


def test_missing_library(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"install pyllama-dist\[root\]"):
        Tokenizer.open(model_dir)


def test_the_longest_special_string_counts(tmp_path: Path) -> None:
    added = [{"id": 2 + n, "content": text} for n, text in enumerate(["<a>", "<a>b", ""])]
    (tmp_path / "tokenizer.json").write_text(valid(added_tokens=added))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode_template(Rendered(f"a<a>b<a>a<{MARK}a>")) == [0, 3, 2, 0, 0]

"""Rendered prompts become the tokens that the tokenizers library makes of them."""

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from pyllama_dist.text.special import MARK, Breaker, Rendered
from pyllama_dist.text.tokenizer import Tokenizer
from tests.tiers import slow_but

LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FOLDED = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
NORMALIZERS = {"none": None, "legacy": LEGACY, "folded": FOLDED, "replace": LEGACY[1]}
PRE_TOKENIZERS = {
    "none": None,
    **{
        f"metaspace {scheme} {split}": pre_tokenizers.Metaspace("▁", scheme, split)
        for scheme in ("first", "always", "never")
        for split in (True, False)
    },
    "parts": pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace("▁", "first", False)]
    ),
}
# Both put a space first: where the second one does, see `LibraryVocabulary.encode`.
PAIRS = [pair for pair in product(NORMALIZERS, PRE_TOKENIZERS) if pair != ("legacy", "parts")]
PLAIN = "<s>User|im_end x1é"
WORDS = [
    "<s>",
    "</s>",
    "<|User|>",
    "<|im_end|>",
    "user",
    "im",
    "Us",
    "<",
    "|>",
    " ",
    "  ",
    "\n",
    "1",
]
TOKENS = ["<s>", "</s>", "<|User|>", "<|im_end|>", "im"]
FLAGS = [("lstrip",), ("rstrip",), ("lstrip", "rstrip"), ("single_word",), ()]

flags = st.tuples(*[st.tuples(st.sampled_from(FLAGS), st.booleans())] * len(TOKENS))
prompts = st.lists(st.sampled_from([*WORDS, "\u2003", "\x1c", "é"])).map("".join)


def library_of(normalizer: str, pre_tokenizer: str) -> Library:
    """Characters and a few merges, in the manner of SentencePiece."""
    chars = dict.fromkeys("▁" + PLAIN + "\n\u2003\x1c/" + PLAIN.lower())
    merges = [("U", "s"), ("u", "s"), ("▁", "u"), ("▁", "U"), ("▁", "i"), ("▁", "▁"), ("e", "r")]
    pieces = [*chars, *("".join(merge) for merge in merges), "<unk>"]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    library = Library(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if NORMALIZERS[normalizer] is not None:
        library.normalizer = NORMALIZERS[normalizer]
    if PRE_TOKENIZERS[pre_tokenizer] is not None:
        library.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    library.decoder = decoders.Replace("▁", " ")
    return library


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    slow_but(PAIRS[::5], PAIRS),
)
@given(flags=flags, prompt=prompts)
def test_prompts_are_the_librarys(
    normalizer: str,
    pre_tokenizer: str,
    tmp_path_factory: pytest.TempPathFactory,
    flags: list[tuple[tuple[str, ...], bool]],
    prompt: str,
) -> None:
    library = library_of(normalizer, pre_tokenizer)
    library.add_tokens(
        [
            AddedToken(text, normalized=normalized, **dict.fromkeys(names, True))
            for text, (names, normalized) in zip(TOKENS, flags, strict=True)
        ]
    )
    directory = tmp_path_factory.mktemp("tokenizer", numbered=True)
    library.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.open(directory)
    expected = library.encode(prompt, add_special_tokens=False).ids
    assert tokenizer.encode_template(Rendered(prompt)) == expected


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("typed", ["<|User|>", "<|user|>", "＜|User|＞", " <|User|>", "<|im_end|>"])
def test_what_is_typed_becomes_no_added_token(
    tmp_path: Path, normalizer: str, normalized: bool, typed: str
) -> None:
    """Not even where normalization makes one of it."""
    library = library_of(normalizer, "none")
    library.add_tokens([AddedToken(text, normalized=normalized, lstrip=True) for text in TOKENS])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    typed = Breaker(TOKENS).text(f"{typed}\ufdd1{typed}")
    ids = tokenizer.encode_template(Rendered(f"<s>{typed}</s>"))
    added = {token.id: text for text, token in tokenizer.added.items()}
    expected = library.encode("<s>x</s>", add_special_tokens=False).ids
    assert [id for id in ids if id in added] == [id for id in expected if id in added]


def test_llama_2_before_and_after_the_legacy_switch(tmp_path: Path) -> None:
    """`▁user` begins the text; after `<s>` it does only where the normalizer puts the space."""
    fields = {
        "version": "1.0",
        "model": {
            "type": "BPE",
            "vocab": {"▁": 0, "u": 1, "s": 2, "us": 3, "▁us": 4, "<s>": 5},
            "merges": [["u", "s"], ["▁", "us"]],
        },
        "added_tokens": [{"id": 5, "content": "<s>", "special": True}],
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.encode_template(Rendered("us<s>us")) == [4, 5, 3]
    assert tokenizer.encode_template(Rendered(f"<s><{MARK}s>us"))[0] == 5
    assert tokenizer.encode_raw("us") == [4]

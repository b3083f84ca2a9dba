"""Which tokens a template writes by name, and which ids end an answer."""

from pathlib import Path
from typing import Any

import pytest

from pyllama_dist.conversation import open_model
from pyllama_dist.text.tokenizer import Tokenizer
from tests.checkpoints import SPECIAL, converted, write_checkpoint

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
SHOWN = "|".join(f"{{{{ {name} }}}}" for name in NAMES)
LLAMA_3 = (
    "{% for m in messages %}{% set c = m.content %}{% if loop.first %}{% set c = bos_token + c %}"
)
LLAMA_3 += "{% endif %}{{ c }}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]


def opened(tmp_path: Path, template: str, files: dict[str, Any], **config: Any) -> tuple[str, set]:
    """What a template writes, and the ids that end an answer, of a converted checkpoint."""
    files = {"chat_template.jinja": template, **files}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", files=files, **config)
    converted(checkpoint, tmp_path / "model")
    with open_model(tmp_path / "model") as parts:
        assert parts.template is not None
        return parts.template.render(HI).text, set(parts.tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("files", "config", "written", "ends"),
    [
        # The names are tokenizer_config's; ids only end answers.
        (
            {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}},
            {},
            "<s>|</s>||",
            {257},
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": None},
                "generation_config.json": {"eos_token_id": [257, 259], "bos_token_id": 256},
            },
            {},
            "|<|im_end|>||",
            {257, 259},
        ),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {}, "|<|im_end|>||", {257, 259}),
        (
            {
                "tokenizer_config.json": {
                    "bos_token": {"content": "<s>", "lstrip": False},
                    "pad_token": "<|im_start|>",
                    "unk_token": "<unk>",
                }
            },
            {},
            "<s>||<|im_start|>|<unk>",
            {257},
        ),
        # An older file fills what the newer one lacks.
        (
            {
                "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
                "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "</s>"},
            },
            {},
            "<s>|<|im_end|>|</s>|",
            {257, 259},
        ),
        # Nothing names them: ids do.
        ({}, {"pad_token_id": 258}, "<s>|</s>|<|im_start|>|", {257}),
        ({}, {"eos_token_id": [259, 257], "bos_token_id": None}, "|<|im_end|>||", {257, 259}),
    ],
)
def test_names(
    tmp_path: Path, files: dict[str, Any], config: dict[str, Any], written: str, ends: set[int]
) -> None:
    assert opened(tmp_path, SHOWN, files, **config) == (written, ends)


@pytest.mark.parametrize(
    ("settings", "written"),
    [({"bos_token": "<s>"}, "<s>hi"), ({"bos_token": None}, "hi"), ({}, "hi")],
)
def test_a_name_is_added_to_text(tmp_path: Path, settings: dict[str, Any], written: str) -> None:
    """Llama 3's templates fail where it is undefined."""
    assert opened(tmp_path, LLAMA_3, {"tokenizer_config.json": settings})[0] == written


def test_a_named_token_of_the_vocabulary_is_special(tmp_path: Path) -> None:
    """transformers adds what the names say, under the id that the vocabulary has."""
    settings = {"bos_token": "Q", "eos_token": "Z"}
    checkpoint = write_checkpoint(tmp_path, files={"tokenizer_config.json": settings})
    tokenizer = Tokenizer.open(checkpoint)
    assert tokenizer.added["Q"].special
    assert tokenizer.added["Z"].id in tokenizer.eos_ids
    assert {tokenizer.added[text].id for text in SPECIAL} == set(SPECIAL.values())

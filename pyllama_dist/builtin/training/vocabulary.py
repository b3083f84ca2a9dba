"""The tokenizer: byte-level BPE in the manner of GLM-4, trained on our own text.

Digits are split singly, so that a sum is a matter of columns. All 256 bytes are in the vocabulary:
any text can be encoded.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SPECIAL = (
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
)
EOS = ("<|endoftext|>", "<|user|>", "<|observation|>")

# Words with the sign or space before them; single digits; runs of other signs; white space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` tokens, special ones included, which come last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


class Encoder:
    """Turns conversations into tokens exactly as the chat template and the tokenizer do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # What people write is letters, as to the engine: a mention of `<|user|>` ends nothing.
        fields = json.loads(tokenizer.to_str()) | {"added_tokens": []}
        self.plain = Tokenizer.from_str(json.dumps(fields))
        self.id = {token: tokenizer.token_to_id(token) for token in SPECIAL}

    def text(self, text: str) -> list[int]:
        return self.plain.encode("\n" + text, add_special_tokens=False).ids

    def prompt(self, question: str, system: str | None = None) -> list[int]:
        """All that the model is given before it answers the first question."""
        ids = [self.id["[gMASK]"], self.id["<sop>"]]
        if system is not None:
            ids += [self.id["<|system|>"], *self.text(system)]
        return [*ids, self.id["<|user|>"], *self.text(question), self.id["<|assistant|>"]]

    def conversation(
        self, turns: Sequence[tuple[str, str]], system: str | None = None
    ) -> tuple[list[int], list[bool]]:
        """All tokens, and which of them the model has to produce: answers and what ends them."""
        ids: list[int] = []
        learn: list[bool] = []
        for i, (question, answer) in enumerate(turns):
            given = self.prompt(question, system)
            given = given[3:] if i else given  # the end of the last answer opens the question
            said = [*self.text(answer), self.id["<|user|>"]]
            ids += given + said
            learn += [False] * len(given) + [True] * len(said)
            system = None
        return ids, learn


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Writes all that turns messages into tokens and says where an answer ends."""
    eos = [tokenizer.token_to_id(token) for token in EOS]
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "eos_token": EOS[0],
        "pad_token": EOS[0],
        "extra_special_tokens": list(SPECIAL),
        "padding_side": "left",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos[0]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

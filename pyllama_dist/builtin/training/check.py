"""Checks a trained checkpoint: `python check.py OUT_DIR`. Needs transformers besides torch.

Asks the held-out questions and sums, greedily, in float32 with the weights that a Q40 file holds;
and compares prompts and logits with what transformers makes of the same directory.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import evaluate
import network
import questions
import torch
import train
import transformers
import vocabulary
from safetensors.torch import load_file
from tokenizers import Tokenizer


def load(checkpoint: Path) -> network.Glm4:
    config = json.loads((checkpoint / "config.json").read_text())
    sizes = {name: config[name] for name in network.Shape.__dataclass_fields__}
    model = network.Glm4(network.Shape(**sizes))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model


@torch.no_grad()
def compare(checkpoint: Path, model: network.Glm4, encoder: vocabulary.Encoder) -> str:
    """How far our logits are from those of transformers, on a conversation of two turns."""
    theirs = transformers.Glm4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    turns = [("What is Q40?", "Q40 stores weights in 4 bits."), ("17 + 25", "17 + 25 = 42.")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rendered = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    ids, _ = encoder.conversation(turns)
    same = rendered == ids[: len(rendered)]
    tokens = torch.tensor([ids])
    expected = theirs(tokens).logits
    error = (model.eval()(tokens) - expected).abs().max() / expected.abs().max()
    return f"transformers: same prompt {same}, logits differ by {error:.1e} of the largest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    encoder = vocabulary.Encoder(Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    facts = questions.load_facts(train.HERE / "facts.toml")
    exam = evaluate.Exam(facts, encoder, random.Random(train.SEED))
    model = load(checkpoint)
    print(compare(checkpoint, model, encoder))
    print(f"Q40 weights, float32 activations:\n{exam.full(model)}")
    print(f"Q40 weights, Q80 activations:\n{exam.full(model, q80=True)}")


if __name__ == "__main__":
    main()

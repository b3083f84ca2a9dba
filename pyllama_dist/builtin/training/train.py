"""Trains the built-in demonstration model: `python train.py OUT_DIR [--minutes M]`.

Writes a Hugging Face checkpoint of a tiny `glm4` model into OUT_DIR, and the questions and sums that
it never saw into heldout.json beside the package. Needs torch, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

# Threads that spin while they wait stand still when another program uses a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import evaluate
import network
import questions
import torch
import vocabulary
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SEED = 20
VOCAB_SIZE = 1280
BATCH_TOKENS = 2048
POOL = 512  # conversations that are sorted by length before they are cut into batches
PEAK_RATE = 1.8e-3
WARM_UP = 150  # steps
Q40_FROM = 0.7  # the share of the time after which weights are rounded in training


def corpus(facts: list[questions.Fact], teacher: questions.Teacher) -> Iterator[str]:
    """What the tokenizer learns its words from: every text, with the weight of its use."""
    for fact in facts:
        yield from [fact.answer] * 4
        yield from fact.ask
        yield from (teacher.reword(wording) for wording in fact.ask for _ in range(4))
    yield from (teacher.no_answer()[0] for _ in range(600))


def batches(
    teacher: questions.Teacher, encoder: vocabulary.Encoder
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Without end: token ids [B, T] int64, padded at the end, and what to predict, -1 for nothing."""
    while True:
        pool = [teacher.conversation() for _ in range(POOL)]
        encoded = sorted(
            (encoder.conversation(turns, system) for system, turns in pool), key=lambda e: len(e[0])
        )
        cut: list[list[tuple[list[int], list[bool]]]] = [[]]
        for item in encoded:
            if (len(cut[-1]) + 1) * len(item[0]) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(item)
        teacher.random.shuffle(cut)
        for rows in cut:
            width = max(len(ids) for ids, _ in rows)
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            targets = torch.full((len(rows), width), -1)
            for i, (ids, learn) in enumerate(rows):
                row = torch.tensor(ids)
                tokens[i, : len(ids)] = row
                targets[i, : len(ids) - 1] = torch.where(torch.tensor(learn[1:]), row[1:], -1)
            yield tokens, targets


def optimizer_of(model: network.Glm4) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def train(
    model: network.Glm4,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    exam: evaluate.Exam,
    out: Path,
    minutes: float,
) -> int:
    """Trains until the time is over, and saves twenty times on the way. Returns the steps."""
    optimizer = optimizer_of(model)
    start, next_save, recent = time.monotonic(), 0.05, 0.0
    for step, (tokens, targets) in enumerate(data, 1):
        progress = (time.monotonic() - start) / (60 * minutes)
        if progress >= 1:
            return step
        if progress >= Q40_FROM:
            model.act_quantized(q40=True)
        rate = PEAK_RATE * min(step / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(tokens)
            learned = targets >= 0
            logits = model.lm_head(hidden[learned])
        loss = functional.cross_entropy(logits.float(), targets[learned])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += 0.02 * (loss.item() - recent)
        if progress >= next_save:
            next_save += 0.05
            print(f"{progress:4.0%} step {step} loss {recent:.4f} {exam.quick(model)}", flush=True)
            network.save(model, out, exam.eos)
    raise AssertionError("the data never ends")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=42, help="time to train (default: 42)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)

    facts = questions.load_facts(HERE / "facts.toml")
    teacher = questions.Teacher(facts, random.Random(SEED))
    tokenizer = vocabulary.train_tokenizer(corpus(facts, teacher), VOCAB_SIZE)
    vocabulary.save(tokenizer, args.out)
    encoder = vocabulary.Encoder(tokenizer)
    exam = evaluate.Exam(facts, encoder, random.Random(SEED))
    (HERE.parent / "heldout.json").write_text(exam.as_json())

    model = network.Glm4(
        network.Shape(math.ceil(tokenizer.get_vocab_size() / 32) * 32), dropout=0.1
    )
    steps = train(model, batches(teacher, encoder), exam, args.out, args.minutes)
    network.save(model, args.out, exam.eos)
    print(f"{len(facts)} facts, {args.minutes:g} minutes, {steps} steps")
    print(exam.full(model))


if __name__ == "__main__":
    main()

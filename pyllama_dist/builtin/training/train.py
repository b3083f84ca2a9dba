"""Trains the built-in demonstration model: `python train.py OUT_DIR [--minutes M]`.

Writes a Hugging Face checkpoint of a tiny `glm4` model into OUT_DIR, and the questions and sums
that it never saw into ../heldout.json. Needs torch, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

# Threads that spin for long stand still when another program uses a core.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import evaluate
import network
import questions
import torch
import vocabulary
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from pyllama_dist.formats.dllama.model_file import ModelFile
from pyllama_dist.models import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
SEED = 20
VOCAB_SIZE = 1280
BATCH_TOKENS = 3072
WIDTH_STEP = 16  # rows are padded to a multiple of it
LEARN_STEP = 128  # and so is the number of tokens to predict
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
    """Without end: token ids [B, T] int64, padded at the end, and what to predict, -1 for nothing.

    Few shapes occur, because torch prepares its matrix products anew for each.
    """
    waiting = defaultdict[int, list[tuple[list[int], list[bool]]]](list)
    while True:
        system, turns = teacher.conversation()
        ids, learn = encoder.conversation(turns, system)
        width = math.ceil(len(ids) / WIDTH_STEP) * WIDTH_STEP
        rows = waiting[width]
        rows.append((ids, learn))
        if len(rows) < BATCH_TOKENS // width:
            continue
        del waiting[width]
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full((len(rows), width), -1)
        for i, (ids, learn) in enumerate(rows):
            row = torch.tensor(ids)
            tokens[i, : len(ids)] = row
            targets[i, : len(ids) - 1] = torch.where(torch.tensor(learn[1:]), row[1:], -1)
        yield tokens, targets


def loss_of(model: network.Glm4, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of what is to be predicted; the head is given little else."""
    at = (targets.flatten() >= 0).nonzero().squeeze(1)
    at = functional.pad(at, (0, -len(at) % LEARN_STEP), value=targets.numel() - 1)
    wanted = targets.flatten()[at]  # the very last position never has a target: it fills up
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(model.hidden(tokens).flatten(0, 1)[at])
    return functional.cross_entropy(logits.float(), wanted, ignore_index=-1)


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
    peak: float,
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
        rate = peak * min(step / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, tokens, targets)
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


def weights_of(start: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of a model directory as the engine reads it."""
    if (start / "model.safetensors").exists():
        return load_file(start / "model.safetensors")
    with ModelFile.open(start / "model.m", ARCHITECTURES) as file:
        found = {name: torch.tensor(file.float32(name)) for name in file.tensors}
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": weight
        for name, weight in found.items()
    }
    for name in [name for name in weights if ".gate_proj." in name]:
        halves = weights.pop(name), weights.pop(name.replace("gate", "up"))
        weights[name.replace("gate", "gate_up")] = torch.cat(halves)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=42, help="time to train (default: 42)")
    parser.add_argument(
        "--start", type=Path, help="checkpoint or model directory to go on from, with its tokenizer"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)

    facts = questions.load_facts(HERE / "facts.toml")
    teacher = questions.Teacher(facts, random.Random(SEED))
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
    else:
        tokenizer = vocabulary.train_tokenizer(corpus(facts, teacher), VOCAB_SIZE)
    vocabulary.save(tokenizer, args.out)
    encoder = vocabulary.Encoder(tokenizer)
    exam = evaluate.Exam(facts, encoder, random.Random(SEED))
    (HERE.parent / "heldout.json").write_text(exam.as_json())

    model = network.Glm4(
        network.Shape(math.ceil(tokenizer.get_vocab_size() / 32) * 32), dropout=0.1
    )
    if args.start:
        model.load_state_dict(weights_of(args.start))
    peak = PEAK_RATE * (2 / 3 if args.start else 1)
    steps = train(model, batches(teacher, encoder), exam, args.out, args.minutes, peak)
    network.save(model, args.out, exam.eos)
    print(f"{len(facts)} facts, {args.minutes:g} minutes, {steps} steps")
    print(exam.full(model))


if __name__ == "__main__":
    main()

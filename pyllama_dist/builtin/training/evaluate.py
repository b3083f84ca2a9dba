"""The exam: wordings and sums never trained on, asked as a user would, with Q40 weights."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import questions
import torch
import vocabulary

if TYPE_CHECKING:
    from random import Random

    from network import Glm4

SUM_QUESTIONS = ("{a} + {b}", "What is {a} + {b}?", "{a}+{b}=", "add {a} and {b}")
LONGEST_ANSWER = 80  # tokens
ROWS = 64


class Exam:
    """Questions with what their answers must contain, and sums."""

    def __init__(
        self, facts: list[questions.Fact], encoder: vocabulary.Encoder, random: Random
    ) -> None:
        self.encoder = encoder
        self.eos = [encoder.id[token] for token in vocabulary.EOS]
        self.facts = [(fact, wording) for fact in facts for wording in fact.held_out]
        self.sums = sorted(random.sample(questions.held_out_sums(), 100))

    def as_json(self) -> str:
        """The text of heldout.json, a question in each line."""
        asked = ",\n".join(
            json.dumps({"id": fact.id, "question": wording, "expect": fact.expect})
            for fact, wording in self.facts
        )
        return f'{{"questions": [\n{asked}\n],\n"sums": {json.dumps(self.sums)}}}\n'

    def sum_questions(self) -> list[str]:
        """Each sum once, the wordings in turn."""
        return [
            SUM_QUESTIONS[i % len(SUM_QUESTIONS)].format(a=a, b=b)
            for i, (a, b) in enumerate(self.sums)
        ]

    def quick(self, model: Glm4) -> str:
        """A lower bound without generating: how often each token of the answer is the likeliest."""
        facts = self._recited(model, [(w, f.answer) for f, w in self.facts])
        said = [f"{a} + {b} = {a + b}." for a, b in self.sums]
        sums = self._recited(model, list(zip(self.sum_questions(), said, strict=True)))
        return f"questions {sum(facts)}/{len(facts)} sums {sum(sums)}/{len(sums)}"

    def full(self, model: Glm4, *, q80: bool = False) -> str:
        """Asks everything, greedily, and lists what went wrong."""
        blind = [(fact, fact.blind) for fact in dict(self.facts)]
        answers = self.ask(model, self.sum_questions(), q80=q80)
        wrong = [
            f"  {a} + {b} -> {answer!r}"
            for (a, b), answer in zip(self.sums, answers, strict=True)
            if (re.findall(r"\d+", answer) or [""])[-1] != str(a + b)
        ]
        report = [f"sums {len(answers) - len(wrong)}/{len(answers)}", *wrong]
        for name, asked in (("held-out", self.facts), ("blind", blind)):
            answers = self.ask(model, [wording for _, wording in asked], q80=q80)
            wrong = [
                f"  {fact.id}: {wording!r} -> {answer!r}"
                for (fact, wording), answer in zip(asked, answers, strict=True)
                if not questions.is_right(answer, fact.expect)
            ]
            report += [f"{name} questions {len(asked) - len(wrong)}/{len(asked)}", *wrong]
        return "\n".join(report)

    @torch.no_grad()
    def ask(self, model: Glm4, wordings: list[str], *, q80: bool = False) -> list[str]:
        """Greedy answers in float32 with Q40 weights, and Q80 activations where asked for."""
        was_q40 = model.lm_head.q40
        model.eval().act_quantized(q40=True, q80=q80)
        texts = [self.encoder.prompt(wording) for wording in wordings]
        answers: list[list[int]] = [[] for _ in texts]
        open_ = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for _ in range(LONGEST_ANSWER):
            ids = {}
            for rows in [open_[i : i + ROWS] for i in range(0, len(open_), ROWS)]:
                ids |= zip(
                    rows, self._next(model, [texts[i] + answers[i] for i in rows]), strict=True
                )
            for i, token in ids.items():
                answers[i].append(token)
            open_ = [i for i in open_ if ids[i] not in self.eos]
            if not open_:
                break
        model.train().act_quantized(q40=was_q40)
        return [self.encoder.tokenizer.decode(ids).strip() for ids in answers]

    def _next(self, model: Glm4, texts: list[list[int]]) -> list[int]:
        hidden = model.hidden(_padded(texts))
        ends = torch.tensor([len(text) - 1 for text in texts])
        return model.lm_head(hidden[torch.arange(len(texts)), ends]).argmax(-1).tolist()

    @torch.no_grad()
    def _recited(self, model: Glm4, turns: list[tuple[str, str]]) -> list[bool]:
        was_q40 = model.lm_head.q40
        model.eval().act_quantized(q40=True)
        right = []
        for turn in turns:
            ids, learn = self.encoder.conversation([turn])
            best = model(torch.tensor([ids]))[0, :-1].argmax(-1)
            tokens = torch.tensor(ids[1:])
            right.append(bool((best == tokens)[torch.tensor(learn[1:])].all()))
        model.train().act_quantized(q40=was_q40)
        return right


def _padded(texts: list[list[int]]) -> torch.Tensor:
    """[B, T] int64, padded at the end: what stands behind a token does not reach it."""
    width = max(map(len, texts))
    return torch.tensor([text + [0] * (width - len(text)) for text in texts])

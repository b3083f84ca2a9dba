"""What a model thinks, apart from what it answers.

Reasoning models write `<think>...</think>` before the answer. Who opens it differs: GLM-4.7 and
GLM-Z1 find `<think>` at the end of their prompt, so that only `</think>` comes; GLM-4.5 and 4.6
write both. The tags may be tokens of their own, or ordinary text that comes in several pieces.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto

from pyllama_dist.text.special import Rendered

OPEN, CLOSE = "<think>", "</think>"
# One revision of GLM-Z1's template writes a line break as a backslash and an n.
_OPENED = re.compile(rf"{OPEN}(?:\s|\\n)*\Z")
# Between the prompt and an answer's first word: line breaks, and the space of ChatGLM3.
_LEAD = re.compile(r"\A\n*(?: (?=\S))?")


@dataclass(frozen=True)
class Piece:
    """A piece of a reply as it comes: of the reasoning, or of the answer."""

    text: str
    thought: bool


class _Stage(Enum):
    START = auto()  # a tag may come
    THOUGHT = auto()
    LEAD = auto()  # only white space of the answer so far
    ANSWER = auto()


class Reply:
    """A model's reply, cut into reasoning and answer while it comes.

    Only what begins the reply is reasoning: a `<think>` inside the answer is text about it.

    Attributes:
        reasoning: what was thought so far, without tags and white space around it.
        answer: what was answered so far.
    """

    def __init__(self, prompt: Rendered | None) -> None:
        """`prompt` is what the model replies to; None for text to continue as it is."""
        self.reasoning = self.answer = ""
        self._stage = _Stage.ANSWER if prompt is None else _Stage.START
        self._opened = prompt is not None and _OPENED.search(prompt.marked) is not None
        self._held = ""  # may still become a tag, or white space to drop

    def push(self, text: str) -> list[Piece]:
        """The pieces that `text`, the next of the reply, makes certain."""
        self._held += text
        pieces: list[Piece] = []
        if self._stage is _Stage.START:
            self._start()
        if self._stage is _Stage.THOUGHT:
            self._think(pieces)
        if self._stage is _Stage.LEAD and (self._held and not self._held.isspace()):
            self._held = _LEAD.sub("", self._held)
            self._stage = _Stage.ANSWER
        if self._stage is _Stage.ANSWER:
            self._give(pieces, len(self._held))
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back at the end of the reply: a tag that was never finished."""
        pieces: list[Piece] = []
        if self._stage is _Stage.START:
            self._stage = _Stage.THOUGHT if self._opened else _Stage.ANSWER
            self._held = self._held.lstrip()
        if self._stage is _Stage.THOUGHT:
            self._give(pieces, len(self._held.rstrip()))
        elif self._stage is _Stage.ANSWER:
            self._give(pieces, len(self._held))
        return pieces

    def _start(self) -> None:
        body = self._held.lstrip()
        if body.startswith(OPEN):  # also where the prompt has opened it: some models repeat it
            self._held = body.removeprefix(OPEN)
            self._stage = _Stage.THOUGHT
        elif not OPEN.startswith(body):
            self._stage = _Stage.THOUGHT if self._opened else _Stage.LEAD

    def _think(self, pieces: list[Piece]) -> None:
        if not self.reasoning:
            self._held = self._held.lstrip()
        end = self._held.find(CLOSE)
        certain = self._held[: end if end >= 0 else len(self._held) - _begun(self._held)].rstrip()
        self._give(pieces, len(certain))
        if end >= 0:
            self._held = self._held.lstrip().removeprefix(CLOSE)
            self._stage = _Stage.LEAD

    def _give(self, pieces: list[Piece], size: int) -> None:
        """Moves `size` characters of what is held to the reasoning or the answer."""
        text, self._held = self._held[:size], self._held[size:]
        if not text:
            return
        thought = self._stage is _Stage.THOUGHT
        if thought:
            self.reasoning += text
        else:
            self.answer += text
        pieces.append(Piece(text, thought))


def _begun(text: str) -> int:
    """Characters at the end of `text` with which `</think>` may begin."""
    sizes = range(len(CLOSE) - 1, 0, -1)
    return next((size for size in sizes if text.endswith(CLOSE[:size])), 0)

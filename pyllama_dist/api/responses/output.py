"""The output of an answer: items that grow, and the events that tell how they do.

Nothing here knows whether an answer is streamed: its items are the same, and events that nobody
is told are dropped.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyllama_dist.api.answer import Ended, Piece
from pyllama_dist.api.dialect import Json
from pyllama_dist.engine.sampler import TokenLogprobs
from pyllama_dist.text.events import CallArguments, CallEnd, CallStart, Content, Reasoning


def event(type_: str, **fields: Any) -> Json:
    """An event, without its number in the stream."""
    return {"type": f"response.{type_}", **fields}


@dataclass(frozen=True)
class Kind:
    """A kind of items: in what it differs from others.

    Attributes:
        prefix: of ids.
        text: what its text is called in the names of events.
        fields: that each item has.
        part: fields of the one part of its content, which has the text; None if the item itself
            has it, as `arguments`.
        scored: whether its text has logprobs.
    """

    prefix: str
    text: str
    fields: Json
    part: Json | None = None
    scored: bool = False


THOUGHT = Kind(
    "rs", "reasoning_text", {"type": "reasoning", "summary": []}, {"type": "reasoning_text"}
)
MESSAGE = Kind(
    "msg",
    "output_text",
    {"type": "message", "role": "assistant"},
    {"type": "output_text", "annotations": []},
    scored=True,
)
CALL = Kind("fc", "function_call_arguments", {"type": "function_call"})


@dataclass
class Item:
    """One item of the output."""

    kind: Kind
    index: int
    fields: Json = field(default_factory=dict)  # besides those of its kind
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)
    status: str = "in_progress"

    def __post_init__(self) -> None:
        self.id = f"{self.kind.prefix}_{secrets.token_hex(12)}"

    def json(self) -> Json:
        """As much of it as there is."""
        found = {"id": self.id, "status": self.status, **self.kind.fields, **self.fields}
        if self.kind.part is None:
            return {**found, "arguments": self.text}
        return {**found, "content": [self._part()]}

    def begin(self) -> Iterator[Json]:
        """Tells that it is there, and empty."""
        empty = self.json() if self.kind.part is None else {**self.json(), "content": []}
        yield event("output_item.added", output_index=self.index, item=empty)
        if self.kind.part is not None:
            yield self._event("content_part.added", part=self._part())

    def add(self, text: str, logprobs: list[Json]) -> Iterator[Json]:
        """Adds to its text, and tells so."""
        self.text += text
        self.logprobs += logprobs
        yield self._event(f"{self.kind.text}.delta", delta=text, **self._scores(logprobs))

    def end(self, complete: bool) -> Iterator[Json]:
        """Tells that no more of it comes."""
        self.status = "completed" if complete else "incomplete"
        name = f"{self.kind.text}.done"
        if self.kind.part is None:
            yield self._event(name, arguments=self.text, name=self.fields["name"])
        else:
            yield self._event(name, text=self.text, **self._scores(self.logprobs))
            yield self._event("content_part.done", part=self._part())
        yield event("output_item.done", output_index=self.index, item=self.json())

    def _part(self) -> Json:
        return {**(self.kind.part or {}), "text": self.text, **self._scores(self.logprobs)}

    def _scores(self, logprobs: list[Json]) -> Json:
        return {"logprobs": list(logprobs)} if self.kind.scored else {}

    def _event(self, type_: str, **fields: Any) -> Json:
        place: Json = {"item_id": self.id, "output_index": self.index}
        if self.kind.part is not None:
            place["content_index"] = 0
        return event(type_, **place, **fields)


class Output:
    """What an answer consists of so far.

    Attributes:
        items: all that have begun.
    """

    def __init__(self, logprobs: Callable[[Sequence[TokenLogprobs]], list[Json]]) -> None:
        """`logprobs` makes JSON of them."""
        self.items: list[Item] = []
        self._open: Item | None = None  # the last one, if more of it may come
        self._logprobs = logprobs

    def json(self) -> list[Json]:
        """All items."""
        return [item.json() for item in self.items]

    def add(self, piece: Piece) -> Iterator[Json]:
        """Takes what comes next, and tells it."""
        logprobs = self._logprobs(piece.logprobs)
        for event_ in piece.events:
            match event_:
                case Reasoning(text):
                    yield from self._add(THOUGHT, text)
                case Content(text):
                    yield from self._add(MESSAGE, text, logprobs)
                    logprobs = []
                case CallStart(_, id, name):
                    yield from self._begin(CALL, call_id=id, name=name)
                case CallArguments(_, text):
                    yield from self._add(CALL, text)
                case CallEnd(_, complete):
                    yield from self._end(complete)

    def end(self, ended: Ended) -> Iterator[Json]:
        """Tells that nothing more comes."""
        yield from self._end(ended.reason != "length")

    def _add(self, kind: Kind, text: str, logprobs: list[Json] | None = None) -> Iterator[Json]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        yield from self.items[-1].add(text, logprobs or [])

    def _begin(self, kind: Kind, **fields: str) -> Iterator[Json]:
        yield from self._end(True)
        self._open = Item(kind, len(self.items), dict(fields))
        self.items.append(self._open)
        yield from self._open.begin()

    def _end(self, complete: bool) -> Iterator[Json]:
        if self._open is not None:
            yield from self._open.end(complete)
        self._open = None

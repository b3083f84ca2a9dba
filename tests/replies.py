"""Replies of models as tests write them: a text in which tags may be tokens of their own."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyllama_dist.text.added_tokens import AddedToken
from pyllama_dist.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from pyllama_dist.text.reply import Reply, ReplyParser
from pyllama_dist.text.special import Rendered
from pyllama_dist.text.tools.format import ToolFormat

CLOSED = Rendered("<|user|>\nhi<|assistant|>")  # GLM-4.5: the model opens a thought, or does not
OPENED = Rendered("<|user|>hi<|assistant|><think>")  # GLM-4.7
HIDDEN = {"<|assistant|>", "<|python_tag|>"}  # special tokens: they are decoded to nothing
TAGS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *HIDDEN,
]
ADDED = {tag: AddedToken(1000 + n, tag, tag in HIDDEN) for n, tag in enumerate(TAGS)}
_TAG = re.compile("|".join(map(re.escape, TAGS)))

Token = tuple[int, str]  # its id, and what the detokenizer gives for it


def tokens(text: str, cuts: Iterable[int] = (), tagged: bool = True) -> list[Token]:
    """Tokens of a text, cut at `cuts` and, where tags are tokens (`tagged`), around them."""
    found = list(_TAG.finditer(text)) if tagged else []
    ends = {0, len(text), *cuts} | {end for tag in found for end in tag.span()}
    ends -= {at for tag in found for at in range(tag.start() + 1, tag.end())}
    order = sorted(ends)
    pieces = [text[a:b] for a, b in itertools.pairwise(order)]
    return [
        (ADDED[piece].id, "" if piece in HIDDEN else piece)
        if tagged and piece in ADDED
        else (0, piece)
        for piece in pieces
    ]


def splits(text: str, tagged: bool) -> Iterator[list[Token]]:
    """A text in one piece, in two at each place, in characters."""
    yield tokens(text, (), tagged)
    for at in range(1, len(text)):
        yield tokens(text, [at], tagged)
    yield tokens(text, range(len(text)), tagged)


def parsed(
    given: Iterable[Token],
    tool_format: ToolFormat | None = None,
    tools: Sequence[dict[str, Any]] = (),
    *,
    prompt: Rendered | None = CLOSED,
    stops: Sequence[str] = (),
    cut: bool = False,
    added: dict[str, AddedToken] | None = None,
) -> tuple[Reply, list[Event], ReplyParser]:
    """A reply from its tokens: gathered, in events of which neighbours are joined, the parser."""
    parser = ReplyParser(prompt, ADDED if added is None else added, tool_format, tools, stops)
    events = [event for token, text in given for event in parser.push(token, text)]
    events += parser.finish(cut=cut)
    check(events)
    reply = Reply()
    for event in events:
        reply.add(event)
    return reply, joined(events), parser


def check(events: Iterable[Event]) -> None:
    """What holds of the events of any reply."""
    open_call: int | None = None
    n_calls = 0
    answered = False
    for event in events:
        match event:
            case Reasoning(text):
                assert text
                assert not answered
            case Content(text):
                assert text
                assert open_call is None
                answered = True
            case CallStart(index, id, name):
                assert (open_call, index) == (None, n_calls)
                assert re.fullmatch("call_[0-9a-f]{24}", id)
                assert name
                open_call = index
                n_calls += 1
                answered = True
            case CallArguments(index, text):
                assert text
                assert index == open_call
            case CallEnd(index):
                assert index == open_call
                open_call = None
    assert open_call is None


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with neighbours of one kind joined, and without the ids of calls."""
    out: list[Event] = []
    for event in events:
        match out[-1:], event:
            case [Reasoning(before)], Reasoning(text):
                out[-1] = Reasoning(before + text)
            case [Content(before)], Content(text):
                out[-1] = Content(before + text)
            case [CallArguments(_, before)], CallArguments(index, text):
                out[-1] = CallArguments(index, before + text)
            case _, CallStart(index, _, name):
                out.append(CallStart(index, "", name))
            case _:
                out.append(event)
    return out

"""A model's reply, cut into reasoning, answer and tool calls while its tokens come.

Only what begins a reply is reasoning: a `<think>` inside the answer is text about it. A call in
the reasoning ends it. Text before and between calls is part of the answer, text after the last one
is not shown.
"""

import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from pyllama_dist.text.added_tokens import AddedToken
from pyllama_dist.text.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
)
from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.special import Rendered
from pyllama_dist.text.stops import StopMatcher
from pyllama_dist.text.thinking import CLOSE, OPEN, opens
from pyllama_dist.text.tools.declared import DeclaredTools
from pyllama_dist.text.tools.format import Call, ToolFormat

T = TypeVar("T")
Parsing: TypeAlias = Generator[Event | None, None, T]  # None where it waits for more

# Between the prompt and an answer's first word: line breaks, and the space of ChatGLM3.
_LEAD = re.compile(r"\s+\Z|\n*(?: (?=\S))?")


@dataclass
class ToolCall:
    """A call as a whole, or as much of it as came.

    Attributes:
        id: its name in the conversation.
        name: the tool's.
        arguments: JSON text; of a whole object if it is `complete`.
        complete: whether the reply was not cut off in it.
    """

    id: str
    name: str
    arguments: str = ""
    complete: bool = False


class Reply:
    """A reply, gathered from events.

    Attributes:
        reasoning: what the model thought, without tags and white space around it.
        content: what it answered.
        calls: the tools that it called.
    """

    def __init__(self) -> None:
        self.reasoning = self.content = ""
        self.calls: list[ToolCall] = []

    def add(self, event: Event) -> None:
        """Takes what comes next."""
        match event:
            case Reasoning(text):
                self.reasoning += text
            case Content(text):
                self.content += text
            case CallStart(_, id, name):
                self.calls.append(ToolCall(id, name))
            case CallArguments(index, text):
                self.calls[index].arguments += text
            case CallEnd(index, complete):
                self.calls[index].complete = complete


class ReplyParser:
    """Turns the tokens of a reply into events."""

    def __init__(
        self,
        prompt: Rendered | None,
        added: Mapping[str, AddedToken],
        tool_format: ToolFormat | None = None,
        tools: Sequence[Mapping[str, object]] = (),
        stops: Sequence[str] = (),
    ) -> None:
        """Begins a reply.

        Args:
            prompt: what the model replies to; None for a text to continue as it is.
            added: the tokenizer's added tokens by their text.
            tool_format: how the model writes calls; None to look for none.
            tools: what it may call, as in OpenAI's API.
            stops: texts, none empty, that end the answer; they do not in reasoning and calls.
        """
        self._prompt = prompt
        self._format = tool_format
        self._openers = tool_format.openers if tool_format else ()
        self._tools = DeclaredTools(tools)
        self._stops = StopMatcher(stops)
        self._incoming = Incoming(added, (OPEN, CLOSE, *(tool_format.tags if tool_format else ())))
        self._blank = ""  # white space that is dropped if a call follows
        self._n_calls = 0
        self._events = self._reply()

    @property
    def stop(self) -> str | None:
        """The stop string that was met; the reply has ended before it."""
        return self._stops.met

    def push(self, token: int, text: str) -> list[Event]:
        """What a token makes certain; `text` is what the detokenizer gave for it."""
        self._incoming.push(token, text)
        return self._certain()

    def finish(self, text: str = "", *, cut: bool = False) -> list[Event]:
        """What was held back at the end of the reply.

        Args:
            text: what the detokenizer held back.
            cut: the model did not end the reply: a call that is open stays as it is. Else what the
                model forgot is closed.
        """
        self._incoming.finish(text, cut)
        return self._certain()

    def _certain(self) -> list[Event]:
        """The events that what has come makes certain, neighbours of one kind joined."""
        events: list[Event] = []
        for event in self._events:
            if event is None:
                break
            match events[-1:], event:
                case [Reasoning(before)], Reasoning(text):
                    events[-1] = Reasoning(before + text)
                case [Content(before)], Content(text):
                    events[-1] = Content(before + text)
                case [CallArguments(_, before)], CallArguments(index, text):
                    events[-1] = CallArguments(index, before + text)
                case _:
                    events.append(event)
        return events

    def _reply(self) -> Parsing[None]:
        call = None
        if self._prompt is not None:
            # Also where the prompt has opened it: some models repeat the tag.
            tag = yield from self._incoming.opening(OPEN)
            thinks = tag is not None or opens(self._prompt)
            if thinks:
                call = yield from self._thought()
            if call is None:
                yield from self._lead(thinks)
        if call is None:
            call = yield from self._answer()
        while call is not None:
            index = self._n_calls
            self._n_calls += 1
            yield CallStart(index, f"call_{secrets.token_hex(12)}", call.name)
            complete = yield from call.arguments
            yield CallEnd(index, complete)
            call = yield from self._next_call()

    def _thought(self) -> Parsing[Call | None]:
        """Reasoning up to `</think>`, or to a call, which is returned; without space around it."""
        begun, held = False, ""
        while True:
            text, tag = self._incoming.until(CLOSE, *self._openers)
            text = held + text if begun else (held + text).lstrip()
            body = text.rstrip()
            held = text[len(body) :]
            if body:
                begun = True
                yield Reasoning(body)
            if tag == CLOSE:
                return None
            if tag is not None:
                call = yield from self._call(tag)
                if isinstance(call, Call):
                    return call
                held += call
            elif self._incoming.ended:
                return None
            else:
                yield None

    def _lead(self, after_thought: bool) -> Wait[None]:
        """Drops what stands before the answer's first word: space, and `</think>` once more."""
        closing = (CLOSE,) if after_thought or self._incoming.is_token(CLOSE) else ()
        while (yield from self._incoming.opening(*closing)) is not None:
            pass
        self._incoming.skip(_LEAD)

    def _answer(self) -> Parsing[Call | None]:
        """Content up to the first call, which is returned."""
        if self._format is not None and self._format.bare:
            call = yield from self._call(None)
            if isinstance(call, Call):
                return call
        tags = self._openers
        if self._prompt is not None and self._incoming.is_token(CLOSE):
            tags += (CLOSE,)  # no text about it: that would be letters
        while True:
            text, tag = self._incoming.until(*tags)
            yield from self._content(self._stops.push(text))
            if self.stop is None and tag in self._openers:
                call = yield from self._call(tag)
                if isinstance(call, Call):
                    yield from self._content(self._stops.flush())
                    if self.stop is None:
                        return call
                else:
                    yield from self._content(self._stops.push(call))
            last = tag is None and self._incoming.ended
            if last:
                yield from self._content(self._stops.flush())
            if last or self.stop is not None:
                if self._blank:
                    yield Content(self._blank)
                return None
            if tag is None:
                yield None

    def _content(self, text: str) -> Parsing[None]:
        """Gives a piece of the answer; not yet the white space at its end if a call may follow."""
        text = self._blank + text
        body = text.rstrip() if self._openers else text
        self._blank = text[len(body) :]
        if body:
            yield Content(body)

    def _next_call(self) -> Parsing[Call | None]:
        """The call after a call, and the text between them, which is nothing without it."""
        between = ""
        while True:
            # A call in a thought is followed by the thought's end.
            text, tag = self._incoming.until(CLOSE, *self._openers)
            between += text
            if tag in self._openers:
                call = yield from self._call(tag)
                if isinstance(call, Call):
                    self._blank = ""
                    between = self._stops.push(between.strip()) + self._stops.flush()
                    if between:
                        yield Content(between)
                    return call if self.stop is None else None
                between += call
            elif tag is None and self._incoming.ended:
                return None
            elif tag is None:
                yield None

    def _call(self, opener: str | None) -> Wait[Call | str]:
        """The call that begins here; if none does, what people see of the tag before it."""
        call = None
        if self._format is not None:
            call = yield from self._format.call(self._incoming, self._tools, self._n_calls, opener)
        if call is not None:
            return call
        if opener is not None and self._incoming.cut:
            self._incoming.rest()  # a call that was cut off in its name
            return ""
        return "" if opener is None else self._incoming.shown_tag(opener)

"""What a reply consists of, piece by piece, while its tokens come.

No event is empty. The pieces of one kind, joined, are the same however the reply was cut into
tokens.
"""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins.

    Attributes:
        index: its number in the reply, from 0.
        id: its name in the conversation, unlike that of any other call.
        name: the tool's, which need not be a declared one.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """A tool call ends.

    Attributes:
        index: its number in the reply.
        complete: False if the reply was cut off in it, so that its arguments are no whole object.
    """

    index: int
    complete: bool = True


Event: TypeAlias = Reasoning | Content | CallStart | CallArguments | CallEnd

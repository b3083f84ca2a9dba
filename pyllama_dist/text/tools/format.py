"""What all formats of tool calls have in common."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from pyllama_dist.text.events import CallArguments
from pyllama_dist.text.incoming import Incoming, Wait
from pyllama_dist.text.tools.declared import DeclaredTools

# Gives the pieces of a call's arguments, None where it waits, at the end whether it is complete.
Arguments: TypeAlias = Generator[CallArguments | None, None, bool]


@dataclass(frozen=True)
class Call:
    """A call whose name has come.

    Attributes:
        name: the tool's.
        arguments: reads the rest of the call.
    """

    name: str
    arguments: Arguments


class ToolFormat(Protocol):
    """How a generation of models writes tool calls."""

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags that it looks for."""

    @property
    def openers(self) -> tuple[str, ...]:
        """The tags after which a call may come, anywhere in a reply."""

    @property
    def bare(self) -> bool:
        """Whether a call may begin an answer without any tag."""

    def call(
        self, incoming: Incoming, tools: DeclaredTools, index: int, opener: str | None
    ) -> Wait[Call | None]:
        """Reads the beginning of a call.

        Args:
            incoming: text of the reply, after `opener`.
            tools: what the model may call.
            index: the call's number in the reply.
            opener: the tag that was taken; None at the beginning of an answer.

        Returns:
            The call; None if none comes here, and then nothing is taken.
        """
        ...

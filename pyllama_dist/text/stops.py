"""Stop strings: texts that end an answer and are no part of it."""

import re
from collections.abc import Sequence


class StopMatcher:
    """Finds the leftmost stop string in a text that comes in pieces; of those there the longest.

    Attributes:
        met: the stop string that was found. The text before it has been given, and nothing follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        self.met: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self._stops)) or r"(?!)")
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain to lie before any stop string."""
        return self._certain(text, ended=False)

    def flush(self) -> str:
        """What was held back because a stop string might have begun in it."""
        return self._certain("", ended=True)

    def _certain(self, text: str, ended: bool) -> str:
        if self.met is not None:
            return ""
        self._held += text
        found = self._any.search(self._held)
        end = len(self._held) if ended else self._begun()
        if found and found.start() < end:
            self.met = found[0]
            end = found.start()
        certain, self._held = self._held[:end], self._held[end:]
        return certain

    def _begun(self) -> int:
        """Where the first stop string begins that more text may complete; the end if none does."""
        size = len(self._held)
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for at in range(max(0, size - longest), size):
            tail = self._held[at:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stops):
                return at
        return size

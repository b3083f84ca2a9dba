"""What is closed when its context ends, by `close`."""

from types import TracebackType
from typing import Self


class Closing:
    """A context manager that is its own value, and closes itself at the end."""

    def close(self, error: BaseException | None = None) -> None:
        """Frees what it holds; `error` is what ended its context, if anything did."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

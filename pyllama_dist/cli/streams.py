"""Standard streams as a program of the shell needs them, whatever they are connected to.

What an encoding cannot show is replaced, and what is read and is no text too. A stream that the
shell has closed (`<&-`, `>&-`) is an empty one to read from and cannot be written to; its
descriptor is taken, so that no file of ours gets its number. Results that cannot be written are an
error; messages that cannot be written are lost, and the work goes on.
"""

import io
import os
import sys
from contextlib import suppress

from pyllama_dist.errors import OutputError

_IN, _OUT, _ERR = range(3)


class _Results(io.FileIO):
    """Standard output."""

    def write(self, data) -> int | None:  # type: ignore[no-untyped-def, override]
        """Writes, or says where it could not.

        Raises:
            OutputError: the disk is full, the stream is closed, ...
            BrokenPipeError: who read has gone.
        """
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"standard output cannot be written: {error.strerror}; send it elsewhere"
            ) from None


class _Messages(io.FileIO):
    """Standard error."""

    def write(self, data) -> int | None:  # type: ignore[no-untyped-def, override]
        """Writes if it can."""
        with suppress(OSError):
            return super().write(data)
        return len(data)


def prepare_streams() -> None:
    """Sets up `sys.stdin`, `sys.stdout` and `sys.stderr`; those set by a program stay its own."""
    for descriptor in (_IN, _OUT, _ERR):
        _take_if_closed(descriptor)
    if sys.stdin is None:
        sys.stdin = open(_IN, closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Results(_OUT, "w", closefd=False), sys.stdout, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Messages(_ERR, "w", closefd=False), sys.stderr, "backslashreplace")


def drop_output() -> None:
    """Forgets what standard output still holds: it cannot be written, and is not to be tried."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _OUT)
    os.close(null)


def _take_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        # The lowest free descriptor is this one. Writing to what is open for reading fails.
        os.open(os.devnull, os.O_RDONLY)


def _text(raw: io.FileIO, before: io.TextIOWrapper | None, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else None,
        errors=errors,
        line_buffering=raw.fileno() == _ERR or raw.isatty(),
    )

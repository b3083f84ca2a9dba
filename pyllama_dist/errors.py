"""What can go wrong, in the user's words.

Every message is one line that says what happened, where, and what to do. The command line prints it
without a traceback and ends with the exit code of its kind.
"""

import errno
import os


class PyllamaError(Exception):
    """Base of all errors that a user can cause or meet.

    Messages quote files and peers: what is not printable in them is escaped, so that a message is
    one line and cannot move the cursor.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            "".join(
                char if char.isprintable() else char.encode("unicode_escape").decode()
                for char in message
            )
        )


class UsageError(PyllamaError):
    """The request itself cannot be served: flags, prompt, number of nodes."""

    exit_code = 2


class FileError(PyllamaError):
    """A model, checkpoint or tokenizer file is missing, damaged, or of a kind not supported."""

    exit_code = 3


class NodeError(PyllamaError):
    """A node could not be reached, was lost, refused, or did not answer in time."""

    exit_code = 4


class OutputError(PyllamaError):
    """Standard output cannot be written."""


class ProtocolError(NodeError):
    """A message that the wire specification does not allow."""


class SystemLimitError(PyllamaError):
    """The system gives this process no more of something."""


_MEMORY = "use a smaller model, more nodes or a lower --max-seq-len, or raise `ulimit -v`"
_ADVICE = {
    errno.EMFILE: "raise the limit with `ulimit -n 1024`",
    errno.ENFILE: "end other programs",
    errno.ENOMEM: _MEMORY,
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


def refused_by_system(error: Exception) -> PyllamaError | None:
    """What to tell of an error of the system's (ZeroMQ's have its numbers too); None: it is ours.

    Those whose cause is known where they occur are caught there. What is left has no such place:
    files, threads and memory can run out anywhere.
    """
    if isinstance(error, MemoryError):
        return SystemLimitError(f"out of memory; {_MEMORY}")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return SystemLimitError("no thread can be started; raise `ulimit -u` or `ulimit -v`")
    number = getattr(error, "errno", None)
    if isinstance(error, OSError | ImportError) and number is None:  # as dlopen's are told
        said = " ".join(str(error).split()).partition(". ")[0]
        return SystemLimitError(f"{said}; raise `ulimit -v`, or install pyllama-dist again")
    if not isinstance(number, int):
        return None
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    advice = _ADVICE.get(number, "add --debug before the command to see where")
    return SystemLimitError(f"{where}{os.strerror(number)}; {advice}")

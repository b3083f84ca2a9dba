"""What can go wrong, in the user's words.

Every message is one line that says what happened, where, and what to do. The command line prints it
without a traceback and ends with the exit code of its kind.
"""


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


class ProtocolError(NodeError):
    """A message that the wire specification does not allow."""

"""What somebody types at the prompt of a chat, message by message."""

import sys
from collections.abc import Iterator

import click


def messages() -> Iterator[str]:
    """Each message without white space around it, until the input ends.

    On a terminal a pasted text of several lines is one message, and ^C gives up a line.

    Raises:
        KeyboardInterrupt: ^C elsewhere, or on a terminal twice in a row.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # gives `input` its line editing

        # The terminal marks what is pasted, so that line ends in it do not send it. Python
        # switches this off.
        readline.parse_and_bind("set enable-bracketed-paste on")
    given_up = False
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal or given_up:
                raise
            given_up = True
            click.echo("\n^C again, ^D or /exit leaves", err=True)
            continue
        given_up = False
        yield text

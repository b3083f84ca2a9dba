"""The command line. Each command is a file here; only the one that is called is imported."""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import click

from pyllama_dist import __version__, interrupt
from pyllama_dist.cli.streams import drop_output, prepare_streams
from pyllama_dist.errors import OutputError, PyllamaError, refused_by_system

_COMMANDS = {
    "root": "Ask a model: one answer, or a chat.",
    "api": "Serve OpenAI's API to several clients at once.",
    "worker": "Serve a root with this machine's cores and memory.",
    "fetch": "Fetch a checkpoint from Hugging Face.",
    "convert": "Make a model from a Hugging Face checkpoint.",
    "inspect": "Show what is in a model.",
    "doctor": "Show what this machine offers, and what slows it down.",
    "bench": "Measure what a model does on these machines.",
    "logits": "Write the logits of a sequence of tokens.",
    "tokenize": "Show the tokens of a text.",
}
_INTERRUPTED = 130  # what shells report for a program ended by ^C


class _Lazy(click.Group):
    """Imports a command only when it is called: a worker starts without the root's libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"pyllama_dist.cli.{name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pyllama-dist")
@click.option("--debug", is_flag=True, envvar="PYLLAMA_DIST_DEBUG", help="Show tracebacks.")
def group(debug: bool) -> None:
    """Distributed inference of GLM language models on clusters of CPUs."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("numba").setLevel(logging.WARNING)


def main() -> None:
    """Runs a command; errors that a user can cause are one line and an exit code."""
    variable = os.environ.get("PYLLAMA_DIST_DEBUG", "")
    debug = "--debug" in sys.argv[1:2] or variable.lower() not in ("", "0", "false", "no", "off")
    signal.signal(signal.SIGTERM, _terminate)
    interrupt.repeat_dropped()
    prepare_streams()
    code = _exit_code(lambda: group(prog_name="pyllama-dist", standalone_mode=False), debug)
    if code == _INTERRUPTED:
        _exit_now(code)
    unwritten = _exit_code(sys.stdout.flush, debug)
    sys.exit(code or unwritten)


def _exit_code(action: Callable[[], Any], debug: bool) -> int:
    """Runs something; says what went wrong, and returns how the program is to end."""
    try:
        return action() or 0
    except click.exceptions.NoArgsIsHelpError as error:
        return _failed(error.format_message(), error.exit_code)
    except click.ClickException as error:
        said = error.format_message().rstrip(".")
        return _failed(f"error: {said}; --help shows what can be given", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _failed("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        drop_output()  # the reader of our output is gone
        return 1
    except Exception as error:
        if isinstance(error, OutputError):
            drop_output()
        if debug:
            raise
        known = error if isinstance(error, PyllamaError) else refused_by_system(error)
        if known is not None:
            return _failed(f"error: {known}", known.exit_code)
        kind = type(error).__name__
        return _failed(f"internal error: {kind}: {error}; add --debug before the command", 1)


def _failed(said: str, code: int) -> int:
    click.echo(said, err=True)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    """Ends what was started, as ^C does; shells report 143."""
    raise SystemExit(128 + number)


def _exit_now(code: int) -> None:
    """Ends the process with this code, whatever Python thinks of it.

    If a KeyboardInterrupt has passed through code that was compiled from a string (`exec`: named
    tuples, data classes, Numba), CPython ends itself by SIGINT at the end, though it was caught.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)

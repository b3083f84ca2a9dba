"""Jinja as chat templates expect it, for templates that came with a download.

The settings are those of transformers' `apply_chat_template`, for which templates are written.
"""

import json
import re
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.files import one_line
from pyllama_dist.text.special import MARK, unmarked

TEXT_LIMIT = 1 << 24  # characters that a template may write
STEP_LIMIT = 1_000_000  # numbers that one rendering may take from range()
POWER_LIMIT = 64


class SandboxedTemplate:
    """A compiled template.

    Attributes:
        source: its text.
        reads: names of the variables that it reads and does not set itself.
    """

    def __init__(self, source: str, where: str) -> None:
        """Compiles `source`, named by `where` in errors.

        Raises:
            FileError: it is no Jinja template.
        """
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._where = where
        try:
            self._template = environment.from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except TemplateSyntaxError as error:
            raise FileError(
                f"{where} line {error.lineno}: {one_line(error)}; "
                "copy the template again from the checkpoint"
            ) from None
        except (RecursionError, MemoryError):
            raise FileError(f"{where} is nested too deeply to be a chat template") from None

    def render(self, variables: Mapping[str, object]) -> str:
        """What the template writes.

        Raises:
            UsageError: the template does not take these variables.
            FileError: the template does what no template may, or goes beyond a limit.
        """
        try:
            return self._generate({**variables, "range": _counted_range()})
        except _RefusalError as error:
            raise UsageError(
                f"the chat template refuses this conversation: {_shown(error)}"
            ) from None
        except (SecurityError, OverflowError, MemoryError, RecursionError) as error:
            raise FileError(
                f"{self._place(error)} does what no chat template may: {_shown(error)}; "
                "take the template of the original checkpoint"
            ) from None
        except Exception as error:  # a template is a program: it can raise anything
            raise UsageError(
                f"{self._place(error)} cannot render this conversation: {_shown(error)}; "
                "check the messages against what the template reads"
            ) from None

    def _generate(self, variables: dict[str, object]) -> str:
        parts = []
        size = 0
        for part in self._template.generate(variables):
            size += len(part)
            if size > TEXT_LIMIT:
                raise OverflowError(f"it writes more than {TEXT_LIMIT:,} characters")
            parts.append(part)
        return "".join(parts)

    def _place(self, error: BaseException) -> str:
        """The file and, where the traceback tells it, the line in it."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == "<template>"
        ]
        return f"{self._where} line {lines[-1]}" if lines else self._where


class _RefusalError(Exception):
    """The template called `raise_exception`."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuses products that fill the memory before any text is written."""
        if operator == "**" and not (abs(left) <= POWER_LIMIT and abs(right) <= POWER_LIMIT):
            raise OverflowError(f"it raises numbers above {POWER_LIMIT} to a power")
        if operator == "*":
            for part, times in ((left, right), (right, left)):
                if isinstance(part, str | list | tuple) and len(part) * times > TEXT_LIMIT:
                    raise OverflowError(f"it repeats a value to more than {TEXT_LIMIT:,} items")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks for training what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares a set)

    def parse(self, parser: Parser) -> list[Node]:
        """The statements between the tags, as if there were no tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _counted_range() -> Callable[..., range]:
    """`range` for one rendering; loops inside loops count as often as they run."""
    budget = STEP_LIMIT

    def counted(*bounds: int) -> range:
        nonlocal budget
        numbers = range(*bounds)
        budget -= len(numbers)
        if budget < 0:
            raise OverflowError(f"it loops over more than {STEP_LIMIT:,} numbers")
        return numbers

    return counted


def _raise_exception(message: str) -> None:
    raise _RefusalError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it; jinja2's own escapes for HTML."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    # The mark must stay a mark: as an escape it would be shown to the model.
    return re.sub(rf"[^\x00-\x7f{MARK}]", _escape, text) if ensure_ascii else text


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _shown(error: BaseException) -> str:
    return unmarked(one_line(error))

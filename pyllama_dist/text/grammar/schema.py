"""JSON schemas as people send them: checked, then as a part of a grammar."""

import json

from pyllama_dist.errors import UsageError
from pyllama_dist.files import one_line

SIZE_LIMIT = 64 << 10  # bytes of a schema as JSON
DEPTH_LIMIT = 64  # objects and lists inside each other

# llguidance allows any amount of white space by default, and models can fall into endless runs.
_OPTIONS = {"whitespace_pattern": "[ \\n\\r\\t]{1,40}"}

Json = dict[str, object]


def checked_schema(schema: object, where: str) -> Json:
    """A copy of a schema, of known size.

    Args:
        schema: what was parsed from JSON.
        where: what to call it in errors.

    Raises:
        UsageError: it is no object, too large or too deep, or no JSON.
    """
    if not isinstance(schema, dict):
        raise UsageError(f"{where} is no JSON object; give a JSON schema")
    _check_depth(schema, where)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} is no JSON: {one_line(error)}; give a JSON schema") from None
    if len(text) > SIZE_LIMIT:
        raise UsageError(
            f"{where} has {len(text):,} bytes, at most {SIZE_LIMIT:,} are taken; make it smaller"
        )
    copy: Json = json.loads(text)
    # It would change how JSON is written, so that it is none any more.
    copy.pop("x-guidance", None)
    return copy


def _check_depth(schema: Json, where: str) -> None:
    """Refuses what is nested too deeply for the recursive functions that walk it later."""
    level: list[Json | list[object]] = [schema]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise UsageError(f"{where} is nested deeper than {DEPTH_LIMIT} levels; make it flatter")


def inline(schema: Json, *, lenient: bool = False) -> str:
    """A checked schema as Lark has it; if `lenient`, what no grammar can do is left out."""
    options = _OPTIONS | ({"lenient": True} if lenient else {})
    return "%json " + json.dumps({"x-guidance": options, **schema})

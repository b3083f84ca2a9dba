"""Tool calls as grammars: for each way in which a generation of models writes them.

- `glm45` (GLM-4.5, 4.6): `<tool_call>name`, then on lines of their own
  `<arg_key>key</arg_key>` and `<arg_value>value</arg_value>`, then `</tool_call>`.
- `glm47` (GLM-4.7, 5): the same without line breaks.
- `glm0414` (GLM-4, GLM-4-0414): the name, a line break and a JSON object; no tag. `<|assistant|>`
  separates calls, and an answer that is no call begins with a line break.
- `hermes` (Qwen3 and others): `<tool_call>`, a line with a JSON object of `name` and `arguments`,
  `</tool_call>`.

In the first two, strings are written as they are and everything else as JSON.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyllama_dist.errors import UsageError
from pyllama_dist.text.grammar.schema import Json, checked_schema, inline

CALL = "<tool_call>"
FORMATS = ("glm45", "glm47", "glm0414", "hermes")
MAX_TOOLS = 128

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_ARGUMENTS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_TERMINALS = "TEXT: /(?s:.+)/\nPLAIN: /\\n(?s:.*)/\nKEY: /[^\\n]+/\n"
_COMPOSED = ("$ref", "anyOf", "oneOf", "allOf", "patternProperties")
_MAX_REFS = 16

# The token of a tag as Lark has it; None if the tokenizer has no such token.
FindTag = Callable[[str], str | None]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: letters, digits, `_` and `-`.
        parameters: JSON Schema of its arguments.
        strict: whether what the schema says and no grammar can do is an error.
    """

    name: str
    parameters: Json
    strict: bool


def tools_of(values: Sequence[object]) -> list[Tool]:
    """The tools of a request in OpenAI's shape: `{"type": "function", "function": {...}}`.

    Raises:
        UsageError: a tool is of another shape, or there are too many.
    """
    if len(values) > MAX_TOOLS:
        raise UsageError(f"tools: {len(values)} are too many; give at most {MAX_TOOLS}")
    tools = []
    for number, value in enumerate(values):
        match value:
            case {"function": {"name": str(name), **rest}} if _NAME.fullmatch(name):
                parameters = rest.get("parameters")
                where = f"tools[{number}].function.parameters"
                schema = _NO_ARGUMENTS if parameters is None else checked_schema(parameters, where)
                tools.append(Tool(name, {"type": "object", **schema}, rest.get("strict") is True))
            case _:
                raise UsageError(
                    f"tools[{number}] is no function with a name of 1 to 64 letters, digits, "
                    "underscores and dashes; name it so"
                )
    return tools


def calls_source(
    tools: Sequence[Tool], format_name: str, *, required: bool, parallel: bool, tag: FindTag
) -> str:
    """The grammar of an answer in Lark.

    Args:
        tools: that may be called.
        format_name: one of `FORMATS`.
        required: whether the answer is calls, at least one; else text may stand before or instead.
        parallel: whether there may be several calls.
        tag: finds the tokens of tags.

    Raises:
        UsageError: the format is not known, or needs a token that the tokenizer has not.
    """
    if format_name not in FORMATS:
        raise UsageError(f"tool format {format_name!r} is not known; use {', '.join(FORMATS)}")
    if not tools:
        return f"start: {'PLAIN' if format_name == 'glm0414' else 'TEXT?'}\n{_TERMINALS}"
    names = " | ".join(f"call_{i}" for i in range(len(tools)))
    if format_name == "glm0414":
        between = tag("<|assistant|>")
        more = f" ({between} call)*" if parallel and between is not None else ""
        start = f"call{more}" if required else f"PLAIN | call{more}"
        rules = [f"call_{i}: {_name_then_json(tool)}" for i, tool in enumerate(tools)]
        return "\n".join([f"start: {start}", f"call: {names}", *rules, _TERMINALS])
    opening, closing = _needed(tag, CALL), _needed(tag, "</tool_call>")
    gap = "" if format_name == "glm47" else '"\\n" '
    more = f" ({gap}call)*" if parallel else ""
    lead = '("\\n" | "\\n\\n")? ' if gap else ""  # what models write after a thought
    start = f"{lead}call{more}" if required else f"TEXT? (call{more})?"
    rules = []
    for i, tool in enumerate(tools):
        if format_name == "hermes":
            head = json.dumps(f'\n{{"name": "{tool.name}", "arguments": ')
            body = f'{head} {inline(tool.parameters, lenient=not tool.strict)} "}}\\n"'
            rules.append(f"call_{i}: {opening} {body} {closing}")
        else:
            rules += _tagged(f"call_{i}", tool, opening, closing, gap, tag)
    return "\n".join([f"start: {start}", f"call: {names}", *rules, _TERMINALS])


def _needed(tag: FindTag, text: str) -> str:
    found = tag(text)
    if found is None:
        raise UsageError(
            f"the tokenizer has no token {text}, which this tool format needs; use another format"
        )
    return found


def _name_then_json(tool: Tool) -> str:
    schema = inline(tool.parameters, lenient=not tool.strict)
    return f"{json.dumps(tool.name + chr(10))} {schema}"


def _tagged(
    rule: str, tool: Tool, opening: str, closing: str, gap: str, tag: FindTag
) -> Iterator[str]:
    """Rules of a call whose arguments have tags: those named in the schema, in its order."""
    key, end_key = _needed(tag, "<arg_key>"), _needed(tag, "</arg_key>")
    value, end_value = _needed(tag, "<arg_value>"), _needed(tag, "</arg_value>")
    schema = tool.parameters
    properties = schema.get("properties")
    named: Mapping[str, object] = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    needed = required if isinstance(required, list) else []
    parts = []
    for j, (name, of) in enumerate(named.items()):
        content = _value(of, schema, lenient=not tool.strict)
        yield (
            f"{rule}_{j}: {key} {json.dumps(name)} {end_key} {gap}{value} {content} {end_value} "
            f"{gap}"
        )
        parts.append(f"{rule}_{j}" + ("" if name in needed else "?"))
    others = schema.get("additionalProperties")
    if others is True or isinstance(others, dict) or any(word in schema for word in _COMPOSED):
        content = _value(others, schema, lenient=not tool.strict)
        yield f"{rule}_x: {key} KEY {end_key} {gap}{value} {content} {end_value} {gap}"
        parts.append(f"{rule}_x*")
    yield f"{rule}: {opening} {json.dumps(tool.name)} {gap}{' '.join(parts)} {closing}"


def _value(schema: object, root: Json, *, lenient: bool) -> str:
    """What stands between the tags of an argument."""
    if not isinstance(schema, dict):
        return "TEXT?"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
        empty = "?" if "" in texts else ""
        return f"({' | '.join(json.dumps(text) for text in texts if text) or 'TEXT'}){empty}"
    if _may_be_string(schema, root):
        return "TEXT?"
    shared: Json = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return inline({**shared, **schema}, lenient=lenient)


def _may_be_string(schema: object, root: Json, refs: int = 0) -> bool:
    """Whether a string may satisfy the schema; where that is not told, yes."""
    match schema:
        case {"type": str(kind)}:
            return kind == "string"
        case {"type": [*kinds]}:
            return "string" in kinds
        case {"enum": [*values]}:
            return any(isinstance(value, str) for value in values)
        case {"const": value}:
            return isinstance(value, str)
        case {"anyOf": [*parts]} | {"oneOf": [*parts]}:
            return any(_may_be_string(part, root, refs) for part in parts)
        case {"allOf": [*parts]}:
            return all(_may_be_string(part, root, refs) for part in parts)
        case {"$ref": str(ref)} if ref.startswith("#/") and refs < _MAX_REFS:
            found: object = root
            for step in ref[2:].split("/"):
                name = step.replace("~1", "/").replace("~0", "~")
                found = found.get(name) if isinstance(found, dict) else None
            return _may_be_string(found, root, refs + 1)
    return True

"""Which JSON types a tool's argument may have, and its value as JSON.

GLM-4.5 and later write strings as they are and all else as JSON, so that `10` may be a number or a
text: the tool's JSON schema decides. Schemas are a caller's: what is wrong in one, or leads back to
itself, says nothing about types.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any, TypeAlias
from urllib.parse import unquote

Types: TypeAlias = frozenset[str]

ANY: Types = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
STRING: Types = frozenset({"string"})
_STEPS = 1000  # schemas looked into for one argument; a few `$ref` can stand for millions
_DEPTH = 50
_SPELLED = {"True": "true", "False": "false", "None": "null"}  # as Python writes them
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")


def argument_types(parameters: object, name: str) -> Types:
    """The types that the argument `name` may have, by the schema of all of a tool's arguments.

    >>> sorted(argument_types({"properties": {"n": {"type": ["integer", "null"]}}}, "n"))
    ['integer', 'null']
    """
    return _Reader(parameters).of_argument(parameters, name, _DEPTH) or ANY


def typed(text: str, types: Types) -> str:
    """The JSON text of an argument that a model wrote as `text`.

    A text that is JSON stays as it is spelled, so that no digit is lost.

    >>> typed("020", frozenset({"string", "integer"})), typed("20", frozenset({"integer"}))
    ('"020"', '20')
    """
    found = _json_type(text)
    if "string" in types:
        other = found is not None and found != "string" and not types.isdisjoint(_among(found))
        return text.strip() if other else _quoted(text)
    bare = text.strip()
    if found == "string" and not types.isdisjoint({"integer", "number"}):
        inner = json.loads(text)
        if _json_type(inner) in ("integer", "number"):
            return str(inner).strip()
    if found is not None:
        return bare
    spelled = _SPELLED.get(bare)
    return spelled if spelled is not None and _json_type(spelled) in types else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_type(text: str) -> str | None:
    """The type of a strict JSON text; None if it is none."""
    try:
        # The digits of an integer may be more than Python converts.
        value = json.loads(text, parse_int=len, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return _type_of(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _among(kind: str) -> set[str]:
    """The names that a schema may have for a type: an integer is a number too."""
    return {kind, "number"} if kind == "integer" else {kind}


class _Reader:
    """Reads the types out of one tool's schema, with a limit to the work."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._steps = _STEPS

    def of_argument(self, schema: object, name: str, depth: int) -> Types | None:
        """The types of a property; None where this schema does not say."""
        if not isinstance(schema, Mapping) or not self._goes_on(depth):
            return None
        found: list[Types] = []
        match schema.get("properties"):
            case Mapping() as properties if name in properties:
                found.append(self.of(properties[name], depth - 1))
        for part in self._parts(schema):
            if (types := self.of_argument(part, name, depth - 1)) is not None:
                found.append(types)
        if not found and isinstance(schema.get("additionalProperties"), Mapping):
            found.append(self.of(schema["additionalProperties"], depth - 1))
        return frozenset().union(*found) if found else None

    def _parts(self, schema: Mapping[str, Any]) -> Iterator[object]:
        """The schemas that a schema is made of."""
        if "$ref" in schema:
            yield self._target(schema["$ref"])
        for key in ("allOf", "anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list):
                yield from parts

    def of(self, schema: object, depth: int) -> Types:
        """The types that a value of this schema may have."""
        if not isinstance(schema, Mapping) or not self._goes_on(depth):
            return ANY
        limits = [self._named(schema.get("type"))]
        if "const" in schema:
            limits.append(_of_values([schema["const"]]))
        if isinstance(values := schema.get("enum"), list) and values:
            limits.append(_of_values(values))
        if "$ref" in schema:
            limits.append(self.of(self._target(schema["$ref"]), depth - 1))
        if isinstance(parts := schema.get("allOf"), list):
            limits += [self.of(part, depth - 1) for part in parts]
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list) and parts:
                limits.append(frozenset().union(*(self.of(part, depth - 1) for part in parts)))
        types = reduce(frozenset.intersection, limits) or ANY
        return types | {"null"} if schema.get("nullable") is True else types

    def _goes_on(self, depth: int) -> bool:
        self._steps -= 1
        return depth > 0 and self._steps > 0

    @staticmethod
    def _named(value: object) -> Types:
        """What `type` allows: a name or a list of them."""
        names = value if isinstance(value, list) else [value]
        known = {name for name in names if isinstance(name, str)} & ANY
        return frozenset(known | {"integer"} if "number" in known else known) or ANY

    def _target(self, reference: object) -> object:
        """What a local `$ref` points to; None if there is no such place."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        place = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            match place:
                case Mapping():
                    place = place.get(part.replace("~1", "/").replace("~0", "~"))
                case list() if part.isdecimal() and len(part) < 9 and int(part) < len(place):
                    place = place[int(part)]
                case _:
                    return None
        return place


def _of_values(values: list[object]) -> Types:
    return frozenset(map(_type_of, values))

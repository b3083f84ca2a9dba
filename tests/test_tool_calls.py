"""Tool calls of each generation: while they come, their arguments' types, and back in a prompt.

T1 to T12 are the rows of the known bugs of other servers; names have the numbers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from pyllama_dist.errors import UsageError
from pyllama_dist.text.chat_template import ChatTemplate
from pyllama_dist.text.events import CallArguments, CallEnd, CallStart, Content
from pyllama_dist.text.reply import Reply, ReplyParser
from pyllama_dist.text.special import Rendered
from pyllama_dist.text.tokenizer import Tokenizer
from pyllama_dist.text.tools.detect import calls_are_messages, format_of
from pyllama_dist.text.tools.format import ToolFormat
from pyllama_dist.text.tools.glm_bare import GlmBareFormat
from pyllama_dist.text.tools.glm_tags import GlmTagFormat
from pyllama_dist.text.tools.hermes import HermesFormat
from pyllama_dist.text.tools.llama import LlamaFormat
from pyllama_dist.text.tools.schema import ANY, argument_types, typed
from tests.replies import ADDED, CLOSED, OPENED, TAGS, parsed, splits, tokens

GLM, BARE, HERMES, LLAMA = GlmTagFormat(), GlmBareFormat(), HermesFormat(), LlamaFormat()


def tool(name: str, **properties: object) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


STR, INT = {"type": "string"}, {"type": "integer"}
WEATHER = tool("get_weather", city=STR, days=INT)
TOOLS = [WEATHER, tool("get_time")]


def glm(name: str, *arguments: tuple[str, str], lines: bool = False) -> str:
    """A call as GLM-4.7 writes it, or GLM-4.5 with `lines`."""
    end = "\n" if lines else ""
    inner = "".join(
        f"<arg_key>{key}</arg_key>{end}<arg_value>{value}</arg_value>{end}"
        for key, value in arguments
    )
    return f"{end}<tool_call>{name}{end}{inner}</tool_call>"


def arguments_of(schema: object, text: str) -> str:
    """What becomes of the argument `a` with this schema; in one piece and in any other."""
    found = {
        parsed(pieces, GLM, [tool("f", a=schema)])[0].calls[0].arguments
        for pieces in splits(glm("f", ("a", text)), True)
    }
    assert len(found) == 1
    return found.pop()


# --- whole replies


@dataclass(frozen=True)
class Case:
    """A reply and what it means: content, then name and arguments of each call."""

    form: ToolFormat
    text: str
    calls: Sequence[tuple[str, str]]
    content: str = ""
    reasoning: str = ""
    complete: bool = True
    cut: bool = False
    prompt: Rendered = CLOSED
    tools: Sequence[dict[str, Any]] = field(default_factory=lambda: TOOLS)


BERLIN = ("get_weather", '{"city": "Berlin", "days": 2}')
GLM_BERLIN = ("get_weather", ("city", "Berlin"), ("days", "2"))
HERMES_BERLIN = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin", "days": 2}}\n</tool_call>'
)
LLAMA_BERLIN = '{"name": "get_weather", "parameters": {"city": "Berlin", "days": 2}}'
BARE_BERLIN = 'get_weather\n{"city": "Berlin", "days": 2}'
OPEN_CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Ber"

CASES = {
    "glm47": Case(GLM, glm(*GLM_BERLIN), [BERLIN]),
    "glm45": Case(GLM, glm(*GLM_BERLIN, lines=True), [BERLIN]),
    "glm45 thinks": Case(
        GLM,
        "\n<think>I\nsee</think>\nLet me look.\n" + glm(*GLM_BERLIN, lines=True),
        [BERLIN],
        "Let me look.",
        "I\nsee",
    ),
    "glm47 thinks": Case(
        GLM, "I see</think>Look." + glm(*GLM_BERLIN), [BERLIN], "Look.", "I see", prompt=OPENED
    ),
    "a call in a thought": Case(
        GLM, "I see" + glm(*GLM_BERLIN) + "</think>x", [BERLIN], "", "I see", prompt=OPENED
    ),
    "two calls": Case(GLM, glm(*GLM_BERLIN) + glm("get_time"), [BERLIN, ("get_time", "{}")]),
    "two calls, lines": Case(
        GLM,
        glm(*GLM_BERLIN, lines=True) + glm("get_time", lines=True),
        [BERLIN, ("get_time", "{}")],
    ),
    "text between": Case(
        GLM,
        f"A{glm('get_time')}\n and <b> \n{glm('get_time')} after",
        [("get_time", "{}")] * 2,
        "Aand <b>",
    ),
    "unknown name": Case(GLM, glm("other", ("x", "1")), [("other", '{"x": 1}')]),
    "empty name": Case(GLM, "a<tool_call></tool_call>b", [], "a<tool_call></tool_call>b"),
    "no name": Case(
        GLM,
        "<tool_call><arg_key>k</arg_key>",
        [],
        "<tool_call><arg_key>k</arg_key>",
    ),
    "cut in a string": Case(
        GLM, OPEN_CALL, [("get_weather", '{"city": "Ber')], complete=False, cut=True
    ),
    "cut in a number": Case(
        GLM,
        OPEN_CALL + "</arg_value><arg_key>days</arg_key><arg_value>1",
        [("get_weather", '{"city": "Ber"')],
        complete=False,
        cut=True,
    ),
    "cut in a key": Case(GLM, "<tool_call>f<arg_key>ci", [("f", "")], complete=False, cut=True),
    "cut in a name": Case(GLM, "so<tool_call>get_w", [], "so", cut=True),
    "cut after a call": Case(GLM, glm(*GLM_BERLIN) + "<tool_call>ge", [BERLIN], cut=True),
    "hermes": Case(HERMES, f"Look.\n{HERMES_BERLIN}\n", [BERLIN], "Look."),
    "hermes twice": Case(HERMES, f"{HERMES_BERLIN}\n{HERMES_BERLIN}", [BERLIN] * 2),
    "hermes, tag in a string": Case(
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "x</tool_call>\\"}"}}</tool_call>y',
        [("f", '{"a": "x</tool_call>\\"}"}')],
    ),
    "hermes, name last": Case(
        HERMES,
        '<tool_call>{"arguments": {"a": [1, {}]}, "name": "f"}</tool_call>y',
        [("f", '{"a": [1, {}]}')],
    ),
    "hermes, no arguments": Case(HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    "hermes, null": Case(
        HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]
    ),
    "hermes, text of an object": Case(
        HERMES,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [("f", '{"a": 1}')],
    ),
    "hermes, more members": Case(
        HERMES,
        '<tool_call>{"id": 7, "name": "f", "x": [1], "arguments": {"a": 1}, "y": {}}</tool_call>y',
        [("f", '{"a": 1}')],
    ),
    "hermes, not closed": Case(
        HERMES,
        HERMES_BERLIN.removesuffix("</tool_call>") + HERMES_BERLIN.removesuffix("}\n</tool_call>"),
        [BERLIN] * 2,
    ),
    "hermes, cut": Case(
        HERMES,
        '<tool_call>{"name": "f", "arguments": {"a": "x',
        [("f", '{"a": "x')],
        complete=False,
        cut=True,
    ),
    "hermes, no JSON": Case(
        HERMES, "<tool_call>what? {}</tool_call>", [], "<tool_call>what? {}</tool_call>"
    ),
    "hermes, thought": Case(HERMES, f"<think>so\n{HERMES_BERLIN}</think>", [BERLIN], "", "so"),
    "llama": Case(LLAMA, LLAMA_BERLIN, [BERLIN]),
    "llama, token": Case(LLAMA, f"<|python_tag|>{LLAMA_BERLIN}", [BERLIN]),
    "llama, token, unknown": Case(
        LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', [("f", "{}")]
    ),
    "llama, unknown": Case(
        LLAMA, '{"name": "f", "parameters": {}}', [], '{"name": "f", "parameters": {}}'
    ),
    "llama, JSON": Case(LLAMA, '{"a": "name"}', [], '{"a": "name"}'),
    "llama, text": Case(LLAMA, f"So: {LLAMA_BERLIN}", [], f"So: {LLAMA_BERLIN}"),
    "bare": Case(BARE, BARE_BERLIN, [BERLIN]),
    "bare, none": Case(BARE, "get_time\n{}", [("get_time", "{}")]),
    "bare, lead": Case(BARE, f"\n{BARE_BERLIN}\n", [BERLIN]),
    "bare, two": Case(
        BARE, f"{BARE_BERLIN}<|assistant|>get_time\n{{}}", [BERLIN, ("get_time", "{}")]
    ),
    "bare, text first": Case(BARE, f"\nLook.<|assistant|>{BARE_BERLIN}", [BERLIN], "Look."),
    "bare, unknown": Case(BARE, 'other\n{"a": 1}', [], 'other\n{"a": 1}'),
    "bare, in text": Case(BARE, f"\nCall {BARE_BERLIN}", [], f"Call {BARE_BERLIN}"),
    "bare, only a name": Case(BARE, "get_time\nis a tool", [], "get_time\nis a tool"),
    "bare, shorter name": Case(BARE, "get_\n{}", [], "get_\n{}"),
    "bare, longer name": Case(BARE, "get_times\n{}", [], "get_times\n{}"),
    "bare, cut": Case(
        BARE, 'get_weather\n{"city": "B', [("get_weather", '{"city": "B')], complete=False, cut=True
    ),
    "bare, cut in the name": Case(BARE, "get_we", [], "get_we", cut=True),
    "bare, braces in strings": Case(
        BARE,
        'get_time\n{"a": "}\\"{", "b": {"c": [{}]}} x',
        [("get_time", '{"a": "}\\"{", "b": {"c": [{}]}}')],
    ),
}


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_t14_replies_in_every_split(case: Case, tagged: bool) -> None:
    added = ADDED if tagged else {}
    for pieces in splits(case.text, tagged):
        reply, *_ = parsed(
            pieces, case.form, case.tools, prompt=case.prompt, cut=case.cut, added=added
        )
        assert [(call.name, call.arguments) for call in reply.calls] == list(case.calls)
        assert (reply.reasoning, reply.content) == (case.reasoning, case.content)
        assert [call.complete for call in reply.calls[-1:]] == [case.complete] * bool(case.calls)


@given(st.sampled_from(sorted(CASES)), st.booleans(), st.data())
def test_any_split_of_calls(name: str, tagged: bool, data: st.DataObject) -> None:
    case = CASES[name]
    cuts = data.draw(st.lists(st.integers(0, len(case.text))))
    added = ADDED if tagged else {}
    events = [
        parsed(pieces, case.form, TOOLS, prompt=case.prompt, cut=case.cut, added=added)[1]
        for pieces in (tokens(case.text, (), tagged), tokens(case.text, cuts, tagged))
    ]
    assert events[0] == events[1]


@given(st.data())
def test_cut_anywhere_is_a_beginning(data: st.DataObject) -> None:
    """What has come of a call when the reply is cut off is how the whole call begins."""
    case = data.draw(st.sampled_from([case for case in CASES.values() if case.complete]))
    pieces = tokens(case.text, range(len(case.text)))
    some = pieces[: data.draw(st.integers(0, len(pieces)))]
    whole = parsed(pieces, case.form, TOOLS, prompt=case.prompt)[0].calls
    part = parsed(some, case.form, TOOLS, prompt=case.prompt, cut=True)[0].calls
    for begun, call in zip(part, whole, strict=False):
        assert call.name == begun.name
        assert call.arguments.startswith(begun.arguments)
        assert begun.arguments == call.arguments or not begun.complete


# --- known bugs of others


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (INT, "10", 10),
        ({"type": "array"}, "[]", []),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": ["null", "integer"]}, "None", None),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "number"}, " 1.5\n", 1.5),
        (INT, '"3"', 3),
        ({"type": "number"}, '"-3.5"', -3.5),
        (INT, '"three"', "three"),
        ({}, "10", 10),
        ({}, "text", "text"),
        ({}, '"q"', '"q"'),
        ({}, "None", "None"),
        (None, "[1]", [1]),
    ],
)
def test_t1_values_have_their_types(schema: object, text: str, value: object) -> None:
    assert json.loads(arguments_of(schema, text)) == {"a": value}


@pytest.mark.parametrize("text", ['{"a":1}', "[1,2]", '"q"', "020", "true", "null", " x\n", ""])
def test_t2_strings_stay_as_they_are(text: str) -> None:
    assert json.loads(arguments_of(STR, text)) == {"a": text}
    assert json.loads(arguments_of({"enum": ["x", "y"]}, text)) == {"a": text}


@pytest.mark.parametrize(
    ("types", "text", "arguments"),
    [
        (["string", "null"], "x", '{"a": "x"}'),
        (["string", "null"], '"x"', '{"a": "\\"x\\""}'),
        (["string", "null"], "null", '{"a": null}'),
        (["string", "null"], "12", '{"a": "12"}'),
        (["string", "integer"], "12", '{"a": 12}'),
        (["string", "integer"], "1e3", '{"a": "1e3"}'),
        (["string", "number"], "12", '{"a": 12}'),
        (["string", "array"], "[[1,2],[3]]", '{"a": [[1,2],[3]]}'),
        (["array"], "[[1,2],  [3]]", '{"a": [[1,2],  [3]]}'),
    ],
)
def test_t3_one_of_several_types(types: list[str], text: str, arguments: str) -> None:
    assert arguments_of({"type": types}, text) == arguments
    assert arguments_of({"anyOf": [{"type": kind} for kind in types]}, text) == arguments


@pytest.mark.parametrize("properties", [None, [], "x", {"a": None}, {"a": 1}, {"a": {"type": 5}}])
def test_t3_malformed_properties_say_nothing(properties: object) -> None:
    parameters = {"type": "object", "properties": properties}
    assert argument_types(parameters, "a") == ANY


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("123", '{"a": "123"}'), ("123abc", '{"a": "123abc"}'), ("12}", '{"a": "12}"}')],
)
def test_t4_streamed_arguments_are_the_unstreamed(text: str, arguments: str) -> None:
    assert arguments_of(STR, text) == arguments
    assert json.loads(arguments_of(INT, "123abc")) == {"a": "123abc"}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>get_time</tool_call>",
        "<tool_call>get_time\n</tool_call>",
        "<tool_call> get_time </tool_call>",
        "<tool_call>get_time",
        "<tool_call>get_time\n",
        "<tool_call>get_time<arg_key>x</arg_key></tool_call>",
    ],
)
def test_t5_calls_without_arguments(text: str) -> None:
    for pieces in splits(text, True):
        reply, *_ = parsed(pieces, GLM, TOOLS)
        assert [(call.name, call.arguments, call.complete) for call in reply.calls] == [
            ("get_time", "{}", True)
        ]


def test_t7_what_is_certain_comes_at_once() -> None:
    """A long string is not held back, nor a name once it cannot become longer."""
    parser = ReplyParser(CLOSED, ADDED, GLM, TOOLS)

    def shown(text: str) -> list[object]:
        events = [event for token in tokens(text) for event in parser.push(*token)]
        return [event.text if isinstance(event, CallArguments) else type(event) for event in events]

    assert shown("\n<tool_call>get_") == shown("weather") == []
    assert shown("\n") == [CallStart]
    assert shown("<arg_key>city</arg_key>\n<arg_value>") == ['{"city": "']
    assert shown("Ber") == ["Ber"]
    assert shown('l"in') == ['l\\"in']
    assert shown("</arg_value>\n<arg_key>days</arg_key>\n<arg_value>") == ['"']
    assert shown("1") == shown("2") == []
    assert shown("</arg_value>") == [', "days": 12']
    assert shown("\n</tool_call>") == ["}", CallEnd]


@pytest.mark.parametrize(
    ("form", "text"), [(HERMES, HERMES_BERLIN), (BARE, BARE_BERLIN), (LLAMA, LLAMA_BERLIN)]
)
def test_t7_objects_come_at_once(form: ToolFormat, text: str) -> None:
    parser = ReplyParser(CLOSED, ADDED, form, TOOLS)
    before, _ = text.split("Berlin")
    events = [event for token in tokens(before) for event in parser.push(*token)]
    assert events[-1] == CallArguments(0, '{"city": "')
    assert parser.push(0, "Ber") == [CallArguments(0, "Ber")]
    assert parser.push(0, "lin") == [CallArguments(0, "lin")]
    assert parser.push(0, '", "days": 2}')[0] == CallArguments(0, '", "days": 2}')


def test_what_is_not_yet_a_call_is_held_no_longer_than_needed() -> None:
    parser = ReplyParser(CLOSED, {}, GLM, TOOLS)
    assert parser.push(0, "a <tool") == [Content("a")]
    assert parser.push(0, "box") == [Content(" <toolbox")]
    parser = ReplyParser(CLOSED, ADDED, BARE, TOOLS)
    assert parser.push(0, "get_") == []
    assert parser.push(0, "up") == [Content("get_up")]
    parser = ReplyParser(CLOSED, ADDED, LLAMA, TOOLS)
    assert parser.push(0, '{"ans') == []
    assert parser.push(0, 'wer":') == [Content('{"answer":')]


def test_t8_line_breaks_stay_line_breaks() -> None:
    text = 'a\nb\\n\t"c"\\\r\n天\u2028'
    assert json.loads(arguments_of(STR, text)) == {"a": text}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Berlin",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Berlin</tool_call>",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Berlin</arg_value>",
        "<tool_call>get_weather<arg_key>city<arg_value>Berlin</arg_value></tool_call>",
        "<think>x</think></think><tool_call>get_weather<arg_key>city</arg_key>"
        "<arg_value>Berlin</arg_value></tool_call></think>so",
    ],
)
def test_t11_what_is_missing_or_too_much(text: str) -> None:
    for tagged in (True, False):
        for pieces in splits(text, tagged):
            reply, *_ = parsed(pieces, GLM, TOOLS, added=ADDED if tagged else {})
            assert [(call.arguments, call.complete) for call in reply.calls] == [
                ('{"city": "Berlin"}', True)
            ]
            assert reply.content == ""


def test_t11_a_call_that_was_never_closed() -> None:
    reply, *_ = parsed(tokens("<tool_call>get_time" + glm(*GLM_BERLIN)), GLM, TOOLS)
    assert [(call.name, call.arguments) for call in reply.calls] == [("get_time", "{}"), BERLIN]


NO_JSON = ["NaN", "Infinity", "-01", "1_000", "0x10", "'a'", "(1, 2)", "{1: 2}", "exit()"]


@pytest.mark.parametrize("text", [*NO_JSON, "[" * 100_000, "1" * 5000 + "x"])
def test_t12_only_strict_json_is_read(text: str) -> None:
    assert typed(text, frozenset({"number"})) == json.dumps(text)
    assert typed(text, ANY) == json.dumps(text)


def test_digits_are_kept() -> None:
    for text in ("1" * 5000, "0.1000000000000000055511", "1e400"):
        assert typed(text, frozenset({"number", "integer"})) == text


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sets(st.sampled_from(sorted(ANY))))
def test_typed_is_json(text: str, types: set[str]) -> None:
    value = json.loads(typed(text, frozenset(types)))
    assert value == text or types != {"string"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=3,
)  # fmt: skip


@given(json_values, st.booleans())
def test_typed_reads_what_templates_write(value: object, spaced: bool) -> None:
    """Strings as they are, all else as JSON; any type but a string's may be any JSON."""
    if isinstance(value, str):
        assert json.loads(typed(value, frozenset({"string"}))) == value
    else:
        text = json.dumps(value, ensure_ascii=False, separators=None if spaced else (",", ":"))
        assert json.loads(typed(text, ANY)) == value
        assert json.loads(typed(text, ANY - {"string"})) == value


# --- schemas

NUMBERS = {"integer", "number"}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, NUMBERS),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"enum": [1, 2]}, {"integer"}),
        ({"enum": ["a", 1.5, None]}, {"string", "number", "null"}),
        ({"type": ["string", "integer"], "enum": ["a"]}, {"string"}),
        ({"const": True}, {"boolean"}),
        ({"const": None}, {"null"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"oneOf": [{"type": "array"}, {"enum": [1]}]}, {"array", "integer"}),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, {"integer"}),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, {"string"}),
        ({"allOf": [{"type": "string"}, {"type": "array"}]}, ANY),  # nothing fits: says nothing
        ({"$ref": "#/$defs/city"}, {"string"}),
        ({"$ref": "#/$defs/a~1b%20c"}, {"integer"}),
        ({"$ref": "#/$defs/list/anyOf/1"}, {"null"}),
        ({"$ref": "#/$defs/list/anyOf/9"}, ANY),
        ({"$ref": "#/$defs/none"}, ANY),
        ({"$ref": "http://example.org/x"}, ANY),
        ({"$ref": "#/$defs/loop"}, ANY),
        ({"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "string"}]}, {"object", "string"}),
        ({"anyOf": []}, ANY),
        ({"enum": []}, ANY),
        ({}, ANY),
        (True, ANY),
        ({"type": "any"}, ANY),
        ({"anyOf": 5, "allOf": {}, "enum": "x", "$ref": 7}, ANY),
    ],
)
def test_t13_schemas(schema: object, types: set[str]) -> None:
    parameters = {
        "properties": {"a": schema},
        "$defs": {
            "city": {"type": "string"},
            "a/b c": {"type": "integer"},
            "list": {"anyOf": [{"type": "array"}, {"type": "null"}]},
            "loop": {"$ref": "#/$defs/loop"},
            "tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}},
        },
    }
    assert argument_types(parameters, "a") == types


@pytest.mark.parametrize(
    ("parameters", "types"),
    [
        (None, ANY),
        ({}, ANY),
        ({"properties": None}, ANY),
        ({"properties": {}, "additionalProperties": {"type": "integer"}}, {"integer"}),
        ({"properties": {"b": INT}, "additionalProperties": False}, ANY),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": INT}}}}, {"integer"}),
        ({"allOf": [{"properties": {"a": STR}}, {"properties": {"b": INT}}]}, {"string"}),
        ({"anyOf": [{"properties": {"a": x}} for x in (STR, INT)]}, {"string", "integer"}),
        ({"$ref": "#"}, ANY),
    ],
)  # fmt: skip
def test_t13_parameters(parameters: object, types: set[str]) -> None:
    assert argument_types(parameters, "a") == types


def test_t13_schema_bombs_end_soon() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(10_000):
        deep = {"anyOf": [deep]}
    assert argument_types({"properties": {"a": deep}}, "a") == ANY
    defs: dict[str, Any] = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 9} for n in range(40)
    }
    assert argument_types({"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": defs}, "a") == ANY


# --- which format

HERMES_PROMPT = (
    '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}\\n</tool_call>'
)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("<tool_call>{n}\n<arg_key>{k}</arg_key>", GlmTagFormat),
        (HERMES_PROMPT, HermesFormat),
        ('<tool_call>{"name": n, "arguments": a}</tool_call>', HermesFormat),
        ('<tool_call>\n<function=f>\n{{ m["arguments"] }}: {"arguments": 1}', type(None)),
        ('Respond in the format {"name": function name, "parameters": dictionary', LlamaFormat),
        ("'<|python_tag|>' + x", LlamaFormat),
        ('{{ m.get("metadata", "") }}', GlmBareFormat),
        ("{{ m.content }}", type(None)),
    ],
)
def test_formats(source: str, kind: type) -> None:
    assert type(format_of(source)) is kind


def test_templates_that_know_calls_as_messages() -> None:
    assert calls_are_messages('{{ m.get("metadata", "") }}')
    assert not calls_are_messages("{{ m.metadata }}{{ m.tool_calls }}")
    assert not calls_are_messages("{{ m.content }}")


# --- there and back

SPECIAL = ["[gMASK]", "<sop>", "<|user|>", "<|system|>", "<|observation|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte and each tag."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([LibraryToken(tag, special=True) for tag in SPECIAL])
    library.add_tokens([LibraryToken(tag, normalized=False) for tag in TAGS if "|" not in tag])
    directory = tmp_path_factory.mktemp("tokenizer")
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer.open(directory)


GLM45_TEMPLATE = """[gMASK]<sop>
{%- for m in messages %}
{%- if m.role == 'user' %}<|user|>
{{ m.content }}
{%- elif m.role == 'tool' %}
{{- '<|observation|>' if messages[loop.index0 - 1].role != 'tool' }}
<tool_response>
{{ m.content }}
</tool_response>
{%- else %}<|{{ m.role }}|>
{{- '\\n<think>' ~ (m.reasoning_content or '') ~ '</think>' }}
{{- '\\n' ~ m.content.strip() if m.content.strip() }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>' ~ call.function.name }}
{% for k, v in call.function.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>
{% endfor %}
</tool_call>
{%- endfor %}
{%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""
GLM47_TEMPLATE = """[gMASK]<sop>
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|><think>' ~ m.reasoning_content ~ '</think>' ~ m.content.strip() }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' ~ call.function.name }}
{%- for k, v in call.function.arguments.items() %}
{{- '<arg_key>' ~ k ~ '</arg_key><arg_value>' }}
{{- v if v is string else v | tojson(ensure_ascii=False) }}
{{- '</arg_value>' }}
{%- endfor %}
{{- '</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{{- '<|observation|>' if messages[loop.index0 - 1].role != 'tool' }}
{{- '<tool_response>' ~ m.content ~ '</tool_response>' }}
{%- else %}
{{- '<|' ~ m.role ~ '|>' ~ m.content }}
{%- endif %}
{%- endfor %}
{{- '<|assistant|><think>' if add_generation_prompt }}"""
GLM0414_TEMPLATE = """[gMASK]<sop>
{%- for m in messages %}<|{{ m.role }}|>{{ m.get("metadata", "") }}
{{ m.content }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""
HERMES_TEMPLATE = """{# {"name": f, "arguments": a} #}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|user|>
<tool_response>
{{ m.content }}
</tool_response>
{%- else %}<|{{ m.role }}|>
{{ m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if m.content or not loop.first }}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson ~ '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt }}"""

USER: dict[str, Any] = {"role": "user", "content": "Weather?"}
VALUES = '["a", {"b": null}]'
ANY_TOOLS = [tool("get_weather", city=STR, days=INT, of={}), tool("get_time")]


def template_of(source: str, tokenizer: Tokenizer, directory: Path) -> ChatTemplate:
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    template = ChatTemplate.open(directory, tokenizer)
    assert template is not None
    return template


def reply_to(
    prompt: Rendered, written: str, tokenizer: Tokenizer, form: ToolFormat | None
) -> Reply:
    """The reply of a model that writes this, through the tokens of it."""
    parser = ReplyParser(prompt, tokenizer.added, form, ANY_TOOLS)
    stream, reply = tokenizer.stream(), Reply()
    for token in tokenizer.encode_template(Rendered(written)):
        for event in parser.push(token, stream.push(token)):
            reply.add(event)
    for event in parser.finish(stream.flush()):
        reply.add(event)
    return reply


def as_message(reply: Reply) -> dict[str, Any]:
    """As OpenAI's API sends it, and takes it back."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None}
    if reply.reasoning:
        message["reasoning"] = reply.reasoning
    message["tool_calls"] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in reply.calls
    ]
    return message


GLM_WRITTEN = [
    glm("get_weather", ("city", 'Zürich "天"\n{"a": 1}'), ("days", "2"), ("of", VALUES)),
    glm("get_time"),
]
OBJECT = '{"city": "Zürich \\"天\\"\\n", "days": 2, "of": ["a", {"b": null}]}'


@pytest.mark.parametrize(
    ("source", "written", "results"),
    [
        (
            GLM45_TEMPLATE,
            "\n<think>I see.</think>\nLet me look."
            + glm("get_weather", ("city", 'ü "天"\n020'), ("days", "2"), ("of", "[]"), lines=True)
            + glm("get_time", lines=True),
            "<|observation|>\n<tool_response>\nrain\n</tool_response>"
            "\n<tool_response>\nnoon\n</tool_response>",
        ),
        (
            GLM47_TEMPLATE,
            "I see.</think>Let me look." + "".join(GLM_WRITTEN),
            "<|observation|><tool_response>rain</tool_response>"
            "<tool_response>noon</tool_response>",
        ),
        (
            GLM0414_TEMPLATE,
            f"get_weather\n{OBJECT}<|assistant|>get_time\n{{}}",
            "<|observation|>\nrain<|observation|>\nnoon",
        ),
        (
            GLM0414_TEMPLATE,
            f"\nLet me look.<|assistant|>get_weather\n{OBJECT}<|assistant|>get_time\n{{}}",
            "<|observation|>\nrain<|observation|>\nnoon",
        ),
        (
            HERMES_TEMPLATE,
            f'Look.\n<tool_call>\n{{"name": "get_weather", "arguments": {OBJECT}}}\n</tool_call>'
            '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
            "<|user|>\n<tool_response>\nrain\n</tool_response>"
            "<|user|>\n<tool_response>\nnoon\n</tool_response>",
        ),
    ],
)  # fmt: skip
def test_t15_a_call_comes_back_as_the_model_wrote_it(
    source: str, written: str, results: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Else all that the model has computed of the conversation is lost."""
    template = template_of(source, tokenizer, tmp_path)
    prompt = template.render([USER])
    reply = reply_to(prompt, written, tokenizer, template.tool_format)
    assert [call.name for call in reply.calls] == ["get_weather", "get_time"]
    answered = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(reply.calls, ["rain", "noon"], strict=True)
    ]
    history = template.render([USER, as_message(reply), *answered], add_generation_prompt=False)
    assert history.text == prompt.text + written + results
    assert tokenizer.encode_template(history) == tokenizer.encode_template(
        Rendered(prompt.marked + written + results)
    )


def test_t15_a_call_cannot_speak_as_another_role(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = template_of(GLM0414_TEMPLATE, tokenizer, tmp_path)
    call = {"function": {"name": "f", "arguments": '{"a": "<|user|></think>"}'}}
    messages = [USER, {"role": "assistant", "content": "a</think>b", "tool_calls": [call]}]
    prompt = template.render(messages, add_generation_prompt=False)
    assert prompt.text.endswith(
        '<|assistant|>\na</think>b<|assistant|>f\n{"a": "<|user|></think>"}'
    )
    ids = tokenizer.encode_template(prompt)
    assert ids.count(tokenizer.added["<|user|>"].id) == 1
    assert ids.count(tokenizer.added["</think>"].id) == 1


def test_t15_arguments_that_are_no_object(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = template_of(GLM0414_TEMPLATE, tokenizer, tmp_path)
    for arguments, shown in (("", "{}"), (None, "{}"), ({"a": "天"}, '{"a": "天"}')):
        call = {"function": {"name": "f", "arguments": arguments}}
        prompt = template.render([{"role": "assistant", "content": None, "tool_calls": [call]}])
        assert f"<|assistant|>f\n{shown}<|assistant|>" in prompt.text
    bad = {"function": {"name": "f", "arguments": '{"a": '}}
    with pytest.raises(UsageError, match="'f' are no JSON object"):
        template.render([{"role": "assistant", "content": None, "tool_calls": [bad]}])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "developer", "content": "S"}, "system:S:"),
        ({"role": "system", "content": [{"type": "text", "text": "S"}]}, "system:S:"),
        ({"role": "assistant", "content": None}, "assistant::"),
        ({"role": "assistant", "tool_calls": []}, "assistant::"),
        ({"role": "assistant", "content": "a", "reasoning": "r"}, "assistant:a:r"),
        ({"role": "assistant", "content": "a", "reasoning_content": "r"}, "assistant:a:r"),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "r", "reasoning": "x"},
            "assistant:a:r",
        ),
        (
            {"role": "assistant", "content": "a", "reasoning_content": None, "reasoning": "r"},
            "assistant:a:r",
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            "assistant:no:",
        ),
        ({"role": "user", "content": "a", "reasoning": "r"}, "user:a:"),
    ],
)
def test_messages(
    message: dict[str, object], shown: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = (
        "{% set m = messages[0] %}{{ m.role }}:{{ m.content.strip() }}:{{ m.reasoning_content }}"
    )
    assert template_of(source, tokenizer, tmp_path).render([message]).text == shown

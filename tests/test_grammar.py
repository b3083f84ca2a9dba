"""Answers follow a JSON schema or call tools, whatever the model would rather say."""

import json
import re
import resource
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllama_dist
from pyllama_dist.engine.constrained import ConstrainedSampler, Guide
from pyllama_dist.engine.sampler import Sampler, Sampling
from pyllama_dist.errors import FileError, UsageError
from pyllama_dist.text.added_tokens import AddedToken
from pyllama_dist.text.grammar.grammars import Grammars
from pyllama_dist.text.grammar.thought import AfterThought, ThinkTags
from pyllama_dist.text.scored import ScoredVocabulary
from pyllama_dist.text.tokenizer import Tokenizer
from tests.tiers import slow_but

BUILTIN = Path(pyllama_dist.__file__).parent / "builtin"
ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
TAGS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
WORDS = ('{"', '":', '",', '"}', "}}", ">\n", ">{", "true", "name", "days", " 1", "\n\n", "日", "é")
LIMIT = 3000  # tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 8},
        "kind": {"enum": ["a", "b", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "id": {"type": "string", "pattern": "^[a-f]{2}-[0-9]+$"},
    },
    "required": ["name", "kind", "id"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
                "unit": {"enum": ["C", "F"]},
                "zones": {"type": "array", "items": {"$ref": "#/$defs/zone"}, "maxItems": 2},
            },
            "required": ["city", "days"],
            "$defs": {"zone": {"type": "integer"}},
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock-now"}}
TOOLS = [WEATHER, CLOCK]


def tiny_tokenizer(directory: Path, added: Sequence[str] = (*ENDS, "<|assistant|>", *TAGS)) -> Any:
    """Byte-level BPE of some words, in files."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([word for word in WORDS for _ in range(9)], trainer)
    fields = json.loads(library.to_str())
    first = len(fields["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    fields["added_tokens"] = [
        {"id": first + i, "content": text, "special": text not in TAGS, **flags}
        for i, text in enumerate(added)
    ]
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    return Tokenizer.open(directory)


def scored_tokenizer() -> Tokenizer:
    """As distributed-llama's `.t` files give: bytes, words, and at last special tokens."""
    texts = [*(bytes([i]) for i in range(256)), *(word.encode() for word in WORDS)]
    special = ["<s>", *ENDS, *TAGS]
    pieces = texts + [text.encode() for text in special]
    ends = [pieces.index(text.encode()) for text in ENDS]
    vocabulary = ScoredVocabulary(pieces, [0.0] * len(pieces), len(texts), ends)
    added = [AddedToken(len(texts) + i, text, text in ENDS) for i, text in enumerate(special)]
    return Tokenizer(vocabulary, added, ends)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tags are ordinary text, as in GLM-Z1."""
    return tiny_tokenizer(tmp_path_factory.mktemp("plain"), (*ENDS, "<|assistant|>"))


@contextmanager
def started(tokenizer: Tokenizer) -> Iterator[Grammars]:
    """Grammars whose process runs: what a test starts itself it must end."""
    with Grammars(tokenizer) as grammars:
        grammars.lark('start: "a"')
        yield grammars


@pytest.fixture(scope="module")
def grammars(tiny: Tokenizer) -> Iterator[Grammars]:
    with started(tiny) as grammars:
        yield grammars


@pytest.fixture(scope="module")
def bare_grammars(plain: Tokenizer) -> Iterator[Grammars]:
    with started(plain) as grammars:
        yield grammars


@pytest.fixture(scope="module")
def all_grammars(tiny: Tokenizer, grammars: Grammars) -> Iterator[list[tuple[Tokenizer, Grammars]]]:
    """Of three kinds of tokenizers."""
    builtin, scored = Tokenizer.open(BUILTIN), scored_tokenizer()
    with started(builtin) as second, started(scored) as third:
        yield [(tiny, grammars), (builtin, second), (scored, third)]


def generate(
    tokenizer: Tokenizer,
    guide: Guide,
    seed: int,
    *,
    likely: Sequence[str] = ('"', "}", "]", "</think>", "</arg_value>"),
    never: Sequence[str] = (),
) -> list[int]:
    """Tokens drawn from noise, without the one that ends them. Some are likelier, to end soon."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(Sampling(1.0, 1.0, seed), tokenizer.vocab_size)
    constrained = ConstrainedSampler(sampler, guide)
    likelier = [*tokenizer.eos_ids, *(tokens_of(tokenizer, text)[0] for text in likely)]
    unlikely = [tokens_of(tokenizer, text)[0] for text in never]
    found: list[int] = []
    while len(found) < LIMIT:
        logits = rng.standard_normal(tokenizer.vocab_size + 70, np.float32) * np.float32(2)
        logits[likelier] += 5
        logits[unlikely] = -1000
        token = constrained(logits)
        assert token < tokenizer.vocab_size
        if token in tokenizer.eos_ids:
            return found
        found.append(token)
    raise AssertionError(f"no end: {text_of(tokenizer, found)[:500]!r}")


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    added = tokenizer.added.get(text)
    return tokenizer.encode(text) if added is None else [added.id]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def allowed(tokenizer: Tokenizer, guide: Guide) -> set[str]:
    """The texts of the tokens that may come next."""
    mask = guide.mask()
    if mask is None:
        return {"everything"}
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-tokenizer.vocab_size // 32),)
    ids = [i for i in range(32 * mask.size) if mask[i // 32] >> (i % 32) & 1]
    assert all(i < tokenizer.vocab_size for i in ids)
    return set(tokenizer.tokens(ids))


def feed(tokenizer: Tokenizer, guide: Any, *texts: str) -> Any:
    """Accepts the texts, each of which is a tag or plain text; the mask must allow them."""
    for text in texts:
        for token in tokens_of(tokenizer, text):
            mask = guide.mask()
            assert mask is None or mask[token // 32] >> (token % 32) & 1, (text, token)
            guide.accept(token)
    return guide


def refusal(call: Callable[[], object]) -> str:
    """The message of the error, which must be ours, of one line, and come at once."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    with pytest.raises(UsageError) as caught:
        call()
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(
        b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime
        for a, b in zip(before, after, strict=True)
    )
    assert spent < 1.5, "seconds of CPU; others may use it meanwhile"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# JSON


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 2))
def test_noise_satisfies_the_schema(all_grammars, seed, which):
    tokenizer, grammars = all_grammars[which]
    ids = generate(tokenizer, grammars.json_schema(SCHEMA).start(), seed)
    jsonschema.validate(json.loads(text_of(tokenizer, ids)), SCHEMA)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((None, {})))
def test_any_object(tiny, grammars, seed, schema):
    ids = generate(tiny, grammars.json_schema(schema).start(), seed)
    assert isinstance(json.loads(text_of(tiny, ids)), dict)


def test_what_may_come_next_by_hand(tiny, grammars):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    matcher = grammars.json_schema({**schema, "additionalProperties": False}).start()
    assert allowed(tiny, matcher) == {"{", '{"', "\\n", "\\n\\n"}
    feed(tiny, matcher, "{", '"', "a", '"', ":")
    assert not matcher.accepting
    space = {" ", "\\t", "\\n", "\\r", "\\n\\n"}
    assert allowed(tiny, matcher) == {"t", "f", "tru", "true", *space}
    assert not matcher.finished
    feed(tiny, matcher, "true", "}")
    assert matcher.accepting
    assert matcher.finished
    assert allowed(tiny, matcher) == set(ENDS)
    feed(tiny, matcher, "<|user|>")
    assert matcher.finished


def test_a_copy_goes_its_own_way(tiny, grammars):
    matcher = feed(tiny, grammars.json_schema({"enum": ["ab", "ac"]}).start(), '"', "a")
    copy = matcher.copy()
    feed(tiny, copy, "b", '"')
    assert copy.finished
    assert allowed(tiny, matcher) == {"b", "c"}
    with pytest.raises(UsageError, match="grammar"):
        matcher.accept(tokens_of(tiny, "z")[0])
    with pytest.raises(UsageError, match="grammar"):
        matcher.mask()
    assert copy.finished
    assert allowed(tiny, copy) == set(ENDS)


def test_white_space_ends(tiny, grammars):
    matcher = feed(tiny, grammars.json_schema(None).start(), "{", *[" "] * 40)
    assert " " not in allowed(tiny, matcher)


def test_how_json_is_written_is_not_the_schemas_choice(tiny, grammars):
    schema = {"x-guidance": {"item_separator": ";"}, "type": "array", "minItems": 2}
    matcher = feed(tiny, grammars.json_schema(schema).start(), "[", "1")
    assert "," in allowed(tiny, matcher)
    assert ";" not in allowed(tiny, matcher)


def test_tokens_that_the_model_lacks_are_masked(tiny):
    n_ids = tiny.added["<tool_call>"].id
    fitted = tiny.fitted(n_ids)
    assert fitted.vocab_size % 32 != 0
    with Grammars(fitted) as grammars:
        assert allowed(fitted, grammars.lark("start: /(?s:.*)/").start()) > set(ENDS)
        said = refusal(lambda: grammars.tool_calls(TOOLS, "glm47", required=True))
    assert "no token <tool_call>" in said


# what cannot be


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("a", "no JSON object"),
        ([], "no JSON object"),
        (True, "no JSON object"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": 3}, "cannot be used"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"if": {"type": "string"}, "then": False}, '"if"'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "["}, "unclosed"),
        ({"type": "string", "format": "no-such"}, "no-such"),
        ({"$ref": "#/$defs/nowhere"}, "cannot be used"),
        ({"$ref": "http://127.0.0.1:1/x.json"}, "cannot be used"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"const": "\ud800"}, "cannot be used"),
        ({"minimum": float("nan")}, "no JSON"),
        ({"minimum": 10**5000}, "no JSON"),
        ({"minimum": 10**400}, "cannot be used"),
        ({"const": {1, 2}}, "no JSON"),
        ({3: {"a": {"type": object}}}, "no JSON"),
    ],
)
def test_bad_schemas_are_refused(grammars, schema, said):
    assert said in refusal(lambda: grammars.json_schema(schema))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS = {
    "deep": nested(100_000),
    "just too deep": nested(65),
    "enum": {"enum": list(range(1_000_000))},
    "long": {"description": "x" * 70_000},
    "intersections": {
        "allOf": [{"type": "string", "pattern": f".*a{{{i}}}.{{{20 + i}}}"} for i in range(40)]
    },
    "properties": {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
    "many properties": {"type": "object", "properties": {f"p{i}": {} for i in range(1200)}},
    "alternatives": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"a{i}": {"const": i}}} for i in range(9)]}
            for _ in range(9)
        ]
    },
}


@pytest.mark.parametrize("name", slow_but(["alternatives"], BOMBS))
def test_x5_bombs_are_refused_at_once(tiny, name):
    with Grammars(tiny) as grammars:
        said = refusal(lambda: grammars.json_schema(BOMBS[name]))
        assert "simplify" in said or "make it" in said
        matcher = grammars.json_schema({"const": 7}).start()  # it goes on as before
        assert feed(tiny, matcher, "7").finished


def chain(depth: int) -> dict[str, Any]:
    """Schemas of which each one refers to the next one twice."""
    step = {
        f"d{i}": {
            "type": "object",
            "properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in ("a", "b")},
            "required": ["a", "b"],
        }
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**step, f"d{depth}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema",
    [
        chain(60),
        {"type": "string", "pattern": "(((a{1000}){1000}){1000}){1000}"},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(.*a.{20}){5}"},
        {"type": "string", "maxLength": 10**9, "minLength": 10**8},
        {"type": "array", "items": {}, "minItems": 10**6},
    ],
)
def test_x5_what_others_choke_on_takes_no_time(tiny, grammars, schema):
    """Each step is short, or ends in an error of our own."""
    matcher = grammars.json_schema(schema).start()
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        for _ in range(100):
            mask = matcher.mask()
            ids = [i for i in range(32 * mask.size) if mask[i // 32] >> (i % 32) & 1]
            going_on = sorted(set(ids) - tiny.eos_ids)
            if not going_on:
                break
            matcher.accept(int(rng.choice(going_on)))
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 2


@pytest.mark.parametrize(
    "source", ["", "start: (", "start: a", "start: /[/", "start: <no_such>", "\0", "start: \ud800"]
)
def test_bad_lark_is_refused(grammars, source):
    refusal(lambda: grammars.lark(source))


def test_x5_deep_and_long_lark_is_refused(grammars):
    assert "too deeply" in refusal(lambda: grammars.lark("start: " + "(" * 90_000))
    assert "bytes" in refusal(lambda: grammars.lark("start: " + '"a"' * 90_000))


def test_a_dead_checker_is_replaced(tiny):
    with Grammars(tiny) as grammars:
        grammars.json_schema({"const": 1})
        process = grammars._checker._process
        process.kill()
        process.wait()
        assert "memory" in refusal(lambda: grammars.json_schema({"const": 2}))
        assert grammars.json_schema({"const": 2}).start()
        process = grammars._checker._process
    assert process.returncode is not None


def test_a_checked_grammar_is_not_checked_again(tiny):
    with Grammars(tiny) as grammars:
        grammars.json_schema({"const": 1})
    assert grammars.json_schema({"const": 1}).start()
    assert grammars._checker._process is None


def test_without_llguidance(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert "pyllama-dist[grammar]" in refusal(lambda: Grammars(tiny).json_schema(None))


def test_the_empty_package_is_told_from_the_real_one(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", types.ModuleType("llguidance"))
    assert "empty package" in refusal(lambda: Grammars(tiny).json_schema(None))


def test_a_tokenizer_without_ends_is_refused(tmp_path):
    with pytest.raises(FileError, match="ends an answer"):
        Grammars(tiny_tokenizer(tmp_path, TAGS)).json_schema(None)


# tool calls


def calls_in(text: str, format_name: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The text before the calls, and the calls: names and arguments, strings as they are."""
    if format_name == "glm0414":
        if text.startswith("\n"):
            return text, []
        parts = [call.partition("\n") for call in text.split("<|assistant|>")]
        return "", [(name, json.loads(arguments)) for name, _, arguments in parts]
    line = "" if format_name == "glm47" else "\n"
    before, *found = re.split(f"{line}<tool_call>" if line else "<tool_call>", "\n" + text)
    calls = []
    for call in found:
        assert call.endswith("</tool_call>")
        body = call.removesuffix("</tool_call>")
        if format_name == "hermes":
            match = re.fullmatch(r'\n(\{"name": "[^"]*", "arguments": .*\})\n', body, re.DOTALL)
            value = json.loads(match[1])
            calls.append((value["name"], value["arguments"]))
            continue
        argument = f"<arg_key>(.*?)</arg_key>{line}<arg_value>(.*?)</arg_value>{line}"
        match = re.fullmatch(rf"([\w-]+){line}((?:{argument})*)", body, re.DOTALL)
        pairs = re.findall(argument, match[2], re.DOTALL)
        calls.append(
            (match[1], {k: v if k in ("city", "unit") else json.loads(v) for k, v in pairs})
        )
    return before[1:], calls


def check_calls(calls: list[tuple[str, dict[str, Any]]]) -> None:
    for name, arguments in calls:
        assert name in ("get_weather", "clock-now")
        schema = (
            WEATHER["function"]["parameters"] if name == "get_weather" else {"maxProperties": 0}
        )
        jsonschema.validate(arguments, schema)


FORMATS = ("glm45", "glm47", "glm0414", "hermes")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(FORMATS), st.booleans())
def test_t16_required_always_calls(tiny, grammars, seed, format_name, parallel):
    grammar = grammars.tool_calls(TOOLS, format_name, required=True, parallel=parallel)
    ids = generate(tiny, grammar.start(), seed)
    before, calls = calls_in(text_of(tiny, ids), format_name)
    assert before.strip() == ""
    assert len(calls) == 1 if not parallel else calls
    check_calls(calls)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1 << 30), st.sampled_from(FORMATS), st.sampled_from(("get_weather", "clock-now"))
)
def test_t16_only_the_named_tool_is_called(tiny, grammars, seed, format_name, only):
    tools = [tool for tool in TOOLS if tool["function"]["name"] == only]
    grammar = grammars.tool_calls(tools, format_name, required=True)
    _, calls = calls_in(text_of(tiny, generate(tiny, grammar.start(), seed)), format_name)
    assert {name for name, _ in calls} == {only}
    check_calls(calls)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(FORMATS))
def test_t16_auto_may_call(tiny, grammars, seed, format_name):
    grammar = grammars.tool_calls(TOOLS, format_name, required=False)
    ids = generate(tiny, grammar.start(), seed, likely=('"', "}", "<tool_call>", "</arg_value>"))
    check_calls(calls_in(text_of(tiny, ids), format_name)[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(FORMATS))
def test_t16_none_never_calls(tiny, grammars, seed, format_name):
    grammar = grammars.tool_calls([], format_name, required=False)
    ids = generate(tiny, grammar.start(), seed, likely=("<tool_call>", "c", "l", "o"))
    assert calls_in(text_of(tiny, ids), format_name)[1] == []


def accepts(tokenizer: Tokenizer, grammar: Any, *texts: str) -> bool:
    matcher = grammar.start()
    ids = [token for text in texts for token in tokens_of(tokenizer, text)]
    for token in [*ids, *sorted(tokenizer.eos_ids)[:1]]:
        if not matcher.allows(token):
            return False
        matcher.accept(token)
    return True


def split(text: str) -> list[str]:
    """At tags."""
    return re.split(r"(</?(?:think|tool_call|arg_key|arg_value)>|<\|assistant\|>)", text)


WRITTEN = {  # as the templates write the history of calls
    "glm45": (
        '\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>St. Gallen "x"\n'
        "</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
        "\n<tool_call>clock-now\n</tool_call>"
    ),
    "glm47": (
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>{"a": 1</arg_value>'
        "<arg_key>days</arg_key><arg_value>14</arg_value>"
        "<arg_key>zones</arg_key><arg_value>[1, -2]</arg_value></tool_call>"
        "<tool_call>clock-now</tool_call>"
    ),
    "glm0414": 'get_weather\n{"city": "Bern", "days": 3, "unit": "C"}<|assistant|>clock-now\n{}',
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "é\\n", "days": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock-now", "arguments": {}}\n</tool_call>'
    ),
}


@pytest.mark.parametrize("format_name", FORMATS)
def test_calls_as_templates_write_them(tiny, grammars, format_name):
    text, required = WRITTEN[format_name], grammars.tool_calls(TOOLS, format_name, required=True)
    alone = grammars.tool_calls(TOOLS, format_name, required=True, parallel=False)
    auto = grammars.tool_calls(TOOLS, format_name, required=False)
    assert accepts(tiny, required, *split(text))
    assert accepts(tiny, auto, *split(text))
    assert not accepts(tiny, alone, *split(text))
    assert not accepts(tiny, required, "\nhello")
    assert not accepts(tiny, required, "")
    assert accepts(tiny, auto, "\nhello")
    for right, wrong in (("days", "hours"), ("clock", "clack"), ("get_weather", "get_wether")):
        assert not accepts(tiny, required, *split(text.replace(right, wrong)))
        assert not accepts(tiny, auto, *split(text.replace(right, wrong)))


def one_argument(schema: object, text: str, tiny: Tokenizer, grammars: Grammars) -> bool:
    """Whether an argument may be written so."""
    parameters = {"type": "object", "properties": {"v": schema}, "$defs": {"t": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    grammar = grammars.tool_calls([tool], "glm47", required=True)
    call = f"<tool_call>f<arg_key>v</arg_key><arg_value>{text}</arg_value></tool_call>"
    return accepts(tiny, grammar, *split(call))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, ["", "020", '{"a', "a\nb", "<b>"], []),
        ({"type": "integer"}, ["20", "-1"], ["020", "a", "", "1.5"]),
        ({"type": ["integer", "string"]}, ["020", "a"], []),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["null", "a"], []),
        ({"oneOf": [{"type": "boolean"}, {"type": "null"}]}, ["null", "true"], ["a"]),
        ({"$ref": "#/$defs/t"}, ["a"], []),
        ({"enum": ["", "a b", 3]}, ["", "a b", "3"], ['"a b"', "4"]),
        ({"const": "x"}, ["x"], ["y", ""]),
        ({}, ["x", "1"], []),
        ({"type": "array", "items": {"type": "string"}}, ['["a"]'], ["[a]", "a"]),
        ({"type": "integer", "no-such-word": 1, "not": {}}, ["3"], ["a"]),
    ],
)
def test_arguments_by_type(tiny, grammars, schema, right, wrong):
    assert [text for text in right if not one_argument(schema, text, tiny, grammars)] == []
    assert [text for text in wrong if one_argument(schema, text, tiny, grammars)] == []


def test_arguments_that_the_schema_does_not_name(tiny, grammars):
    call = ("<tool_call>", "f", "<arg_key>", "other", "</arg_key>")
    call += ("<arg_value>", "x", "</arg_value>", "</tool_call>")
    for parameters, may in (
        ({"type": "object", "additionalProperties": True}, True),
        ({"type": "object", "additionalProperties": {"type": "string"}}, True),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, False),
        ({"anyOf": [{"properties": {"other": {}}}]}, True),
        ({"type": "object", "properties": {}}, False),
        (None, False),
    ):
        tool = {"function": {"name": "f", "parameters": parameters}}
        grammar = grammars.tool_calls([tool], "glm47", required=True)
        assert accepts(tiny, grammar, *call) is may, parameters


@pytest.mark.parametrize(
    ("tools", "settings", "said"),
    [
        ([{"function": {"name": "a.b"}}], {}, "tools[0]"),
        ([CLOCK, {"function": {"name": ""}}], {}, "tools[1]"),
        ([CLOCK, "clock"], {}, "tools[1]"),
        ([{"function": {"name": "f", "parameters": 3}}], {}, "tools[0].function.parameters"),
        ([{"function": {"name": "f", "parameters": nested(99)}}], {}, "nested deeper"),
        ([CLOCK] * 10_000, {}, "too many"),
        ([], {}, "there are no tools"),
        (TOOLS, {"format_name": "glm9"}, "glm45, glm47"),
        (
            [{"function": {"name": "f", "strict": True, "parameters": {"not": {}}}}],
            {"format_name": "hermes"},
            '"not"',
        ),
    ],
)
def test_t13_bad_tools_are_refused(grammars, tools, settings, said):
    settings = {"format_name": "glm47", "required": True, **settings}
    assert said in refusal(lambda: grammars.tool_calls(tools, **settings))


def test_a_tokenizer_without_tags(plain, bare_grammars):
    hermes = refusal(lambda: bare_grammars.tool_calls(TOOLS, "hermes", required=True))
    assert "<tool_call>" in hermes
    grammar = bare_grammars.tool_calls(TOOLS, "glm0414", required=True)
    assert accepts(plain, grammar, *split(WRITTEN["glm0414"]))


# thoughts


def test_a_thought_is_free_and_the_answer_is_not(tiny, grammars):
    grammar = grammars.json_schema({"const": 7})
    tags = ThinkTags.of(tiny)
    guide = AfterThought(tags, grammar, opened=True)
    everything = allowed(tiny, guide)
    # Neither a call, nor the end of the reply: then there would be no answer.
    assert everything == set(tiny.tokens(range(tiny.vocab_size))) - {"<tool_call>", *ENDS}
    feed(tiny, guide, "so: {", "<think>", " 8")
    assert guide.thinking
    feed(tiny, guide, "</think>")
    assert not guide.thinking
    assert allowed(tiny, guide) == {"7", "\\n", "\\n\\n"}
    feed(tiny, guide, "\n", "7")
    assert guide.finished
    assert allowed(tiny, guide) == set(ENDS)


def test_a_model_may_think_or_not(tiny, grammars):
    grammar, tags = grammars.json_schema({"const": 7}), ThinkTags.of(tiny)
    first = {"7", "\\n", "\\n\\n", "<think>"}
    for lead in ((), ("\n",)):
        assert allowed(tiny, AfterThought(tags, grammar, opened=False)) == first
        guide = feed(tiny, AfterThought(tags, grammar, opened=False), *lead, "<think>", "8")
        assert guide.thinking
        feed(tiny, guide, "</think>", "7")
        assert guide.finished
        guide = feed(tiny, AfterThought(tags, grammar, opened=False), *lead, "7")
        assert guide.finished
        assert allowed(tiny, guide) == set(ENDS)
    guide = feed(tiny, AfterThought(tags, grammar, opened=False), "\n")
    assert allowed(tiny, guide) == {"7", "\\n", "<think>"}


def test_a_line_break_that_only_a_thought_may_follow(tiny, grammars):
    guide = AfterThought(ThinkTags.of(tiny), grammars.lark('start: "7"'), opened=False)
    assert allowed(tiny, guide) == {"7", "\\n", "<think>"}
    assert allowed(tiny, feed(tiny, guide, "\n")) == {"<think>"}
    feed(tiny, guide, "<think>", "</think>", "7")
    assert guide.finished


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans(), st.sampled_from((None, 0, 1, 7)))
def test_noise_after_a_thought(tiny, grammars, seed, opened, budget):
    grammar = grammars.json_schema(SCHEMA)
    guide = AfterThought(ThinkTags.of(tiny), grammar, opened=opened, budget=budget)
    ids = generate(tiny, guide, seed, likely=('"', "}", "]", "</think>"), never=ENDS)
    close, open_ = (tiny.added[text].id for text in ("</think>", "<think>"))
    thought: list[int] = []
    if opened or open_ in ids[:2]:
        end = ids.index(close)
        thought, ids = ids[0 if opened else ids.index(open_) + 1 : end], ids[end + 1 :]
    assert budget is None or len(thought) <= budget
    jsonschema.validate(json.loads(text_of(tiny, ids)), SCHEMA)


def test_a_tool_call_ends_a_thought(tiny, grammars):
    grammar = grammars.tool_calls(TOOLS, "glm47", required=True)
    guide = AfterThought(ThinkTags.of(tiny), grammar, opened=True)
    assert allowed(tiny, guide) == set(tiny.tokens(range(tiny.vocab_size))) - set(ENDS)
    feed(tiny, guide, "I call", "<tool_call>")
    assert not guide.thinking
    assert allowed(tiny, guide) == {"g", "c"}


def test_no_tool_is_called_in_a_thought_where_none_may_be(tiny, grammars):
    grammar = grammars.tool_calls([], "glm47", required=False)
    guide = AfterThought(ThinkTags.of(tiny), grammar, opened=True)
    assert "<tool_call>" not in allowed(tiny, guide)
    assert "<think>" in allowed(tiny, guide)


def test_the_budget_of_a_thought(tiny, grammars):
    tags = ThinkTags.of(tiny)
    for grammar, after in ((None, {"everything"}), (grammars.json_schema({"const": 7}), None)):
        guide = AfterThought(tags, grammar, opened=True, budget=3)
        for text in "abc":
            assert len(allowed(tiny, guide)) == 1 or len(allowed(tiny, guide)) > 100
            feed(tiny, guide, text)
        assert allowed(tiny, guide) == {"</think>"}
        assert guide.thinking
        feed(tiny, guide, "</think>")
        assert allowed(tiny, guide) == (after or {"7", "\\n", "\\n\\n"})
    assert allowed(tiny, AfterThought(tags, None, opened=True, budget=0)) == {"</think>"}
    guide = AfterThought(tags, None, opened=False, budget=0)
    assert allowed(tiny, guide) == {"everything"}
    assert allowed(tiny, feed(tiny, guide, "<think>")) == {"</think>"}
    guide = feed(tiny, AfterThought(tags, None, opened=False, budget=0), "x", "<think>")
    assert allowed(tiny, guide) == {"everything"}


def test_tags_of_ordinary_text(plain, bare_grammars):
    tags = ThinkTags.of(plain)
    assert len(tags.close) > 1
    grammar = bare_grammars.json_schema({"const": 7})
    guide = AfterThought(tags, grammar, opened=True)
    ends = set(plain.tokens(plain.eos_ids))
    assert allowed(plain, guide) == set(plain.tokens(range(plain.vocab_size))) - ends
    feed(plain, guide, "a </thin> </think")
    near = allowed(plain, guide)
    assert ">{" not in near
    assert {">", ">\\n", "x", "<"} < near
    feed(plain, guide, ">\n")
    assert not guide.thinking
    assert allowed(plain, guide) == {"7", "\\n", "\\n\\n"}


def test_a_model_without_tokens_for_tags_is_not_made_to_think(plain, bare_grammars):
    """It would spell `<think>` where the answer's grammar forbids what it likes best."""
    grammar = bare_grammars.json_schema({"const": 7})
    guide = AfterThought(ThinkTags.of(plain), grammar, opened=False)
    assert allowed(plain, guide) == {"7", "\\n", "\\n\\n"}
    assert allowed(plain, feed(plain, guide, "\n", "7")) == set(ENDS)


def test_the_budget_where_tags_are_text(plain, bare_grammars):
    grammar = bare_grammars.json_schema({"const": 7})
    guide = AfterThought(ThinkTags.of(plain), grammar, opened=True, budget=2)
    feed(plain, guide, "ab")
    for token in plain.encode("</think>"):
        assert allowed(plain, guide) == set(plain.tokens([token]))
        guide.accept(token)
    assert allowed(plain, guide) == {"7", "\\n", "\\n\\n"}


def test_a_copied_thought_goes_its_own_way(tiny, grammars):
    grammar = grammars.json_schema({"enum": ["ab", "ac"]})
    guide = AfterThought(ThinkTags.of(tiny), grammar, opened=True, budget=5)
    copy = feed(tiny, guide, "x").copy()
    feed(tiny, copy, "</think>", '"', "a", "b", '"')
    assert copy.finished
    feed(tiny, guide, "xxxx")
    assert allowed(tiny, guide) == {"</think>"}
    assert allowed(tiny, feed(tiny, guide, "</think>", '"', "a").copy()) == {"b", "c"}


def test_a_guide_that_allows_everything_again(tiny):
    """The mask of an earlier token is not left behind."""
    sampler = Sampler(Sampling(0.0), tiny.vocab_size)
    guide = AfterThought(ThinkTags.of(tiny), None, opened=True, budget=0)
    constrained = ConstrainedSampler(sampler, guide)
    logits = np.zeros(tiny.vocab_size, np.float32)
    logits[5] = 1
    assert [constrained(logits) for _ in range(2)] == [tiny.added["</think>"].id, 5]

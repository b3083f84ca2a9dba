"""Replies cut into reasoning, answer and calls while they come; stop strings.

Names have the numbers of the checks that users' complaints ask for.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from pyllama_dist.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from pyllama_dist.text.reply import ReplyParser
from pyllama_dist.text.special import Rendered
from pyllama_dist.text.stops import StopMatcher
from pyllama_dist.text.tokenizer import Tokenizer
from pyllama_dist.text.tools.glm_tags import GlmTagFormat
from tests.replies import ADDED, CLOSED, OPENED, TAGS, parsed, splits, tokens

GLM = GlmTagFormat()
CALL = "<tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call>"
CALLED: list[Event] = [CallStart(0, "", "f"), CallArguments(0, '{"k": 1}'), CallEnd(0)]


# --- stop strings


@pytest.mark.parametrize(
    ("text", "stops", "content", "met"),
    [
        ("one two\nthree", ["o\nth"], "one tw", "o\nth"),  # over several tokens
        ("xabcx", ["ab", "abc"], "x", "abc"),
        ("xabdx", ["ab", "abc"], "x", "ab"),
        ("xab", ["ab", "abc"], "x", "ab"),
        ("xabab", ["abc", "babc"], "xabab", None),  # nothing is lost
        ("xaab", ["ab"], "xa", "ab"),
        ("STOP now", ["STOP"], "", "STOP"),  # the first token
        ("STOP", ["STOP"], "", "STOP"),  # all of it
        ("ends in ST", ["STOP"], "ends in ST", None),
        ("a🙂b你c", ["b你"], "a🙂", "b你"),
        ("a  \nb", ["b"], "a  \n", "b"),
        ("a\n\nb", ["\n"], "a", "\n"),
        ("a\n", ["\n\n"], "a\n", None),
        ("abc", [], "abc", None),
    ],
)
def test_s1_stop_strings(text: str, stops: list[str], content: str, met: str | None) -> None:
    for tool_format in (None, GLM):
        for pieces in splits(text, True):
            reply, _, parser = parsed(pieces, tool_format, stops=stops)
            assert (reply.content, parser.stop) == (content, met)


def test_s1_no_more_is_held_back_than_a_stop_string_needs() -> None:
    parser = ReplyParser(CLOSED, {}, stops=["STOP", "\n\n"])
    assert parser.push(0, "a S") == [Content("a ")]
    assert parser.push(0, "T") == []
    assert parser.push(0, "A") == [Content("STA")]
    assert parser.push(0, "\n") == []
    assert parser.push(0, "b") == [Content("\nb")]
    assert parser.push(0, "c STO") == [Content("c ")]
    assert parser.push(0, "P and") == []
    assert parser.stop == "STOP"
    assert parser.push(0, "more") == parser.finish("and more") == []


@pytest.mark.parametrize("tagged", [True, False])
def test_s2_stop_strings_are_of_the_answer_alone(tagged: bool) -> None:
    """Not of thoughts and calls; and a call ends the text in which one may begin."""
    text = f"<think>an f, k 1</think>so f{CALL}"
    for pieces in splits(text, tagged):
        added = ADDED if tagged else {}
        _, events, parser = parsed(pieces, GLM, stops=["k", "an", "fk", "1"], added=added)
        assert events == [Reasoning("an f, k 1"), Content("so f"), *CALLED]
        assert parser.stop is None
    for pieces in splits(f"<think>x</think>so it is{CALL}", tagged):
        _, events, parser = parsed(pieces, GLM, stops=[" it"], added=ADDED if tagged else {})
        assert events == [Reasoning("x"), Content("so")]
        assert parser.stop == " it"


def test_s2_a_call_ends_the_wait_for_a_longer_stop_string() -> None:
    for pieces in splits(f"xab{CALL}", True):
        _, events, parser = parsed(pieces, GLM, stops=["ab", "abc"])
        assert events == [Content("x")]
        assert parser.stop == "ab"


def test_s2_a_stop_string_before_a_second_call() -> None:
    for pieces in splits(f"{CALL} and x so {CALL}", True):
        _, events, parser = parsed(pieces, GLM, stops=["x"])
        assert events == [*CALLED, Content("and ")]
        assert parser.stop == "x"


few = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


@given(few, stop_lists, st.lists(st.integers(0, 12)))
def test_s3_leftmost_then_longest(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    pieces = tokens(text, [cut for cut in cuts if cut <= len(text)])
    certain = "".join(matcher.push(piece) for _, piece in pieces) + matcher.flush()
    places = [(at, -len(stop), stop) for at in range(12) for stop in stops
              if text.startswith(stop, at)]  # fmt: skip
    at, _, met = min(places, default=(len(text), 0, None))
    assert (certain, matcher.met) == (text[:at], met)


# --- tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte and each tag."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([LibraryToken(tag, normalized=False) for tag in TAGS if "|" not in tag])
    library.add_tokens([LibraryToken(tag, special=True) for tag in TAGS if "|" in tag])
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer.open(directory)


def events_of(tokenizer: Tokenizer, ids: list[int], prompt: Rendered | None) -> list[Event]:
    parser = ReplyParser(prompt, tokenizer.added, GLM)
    stream = tokenizer.stream()
    events = [event for token in ids for event in parser.push(token, stream.push(token))]
    return events + parser.finish(stream.flush())


letters = st.text(st.characters(exclude_categories=["Cs"]))
mixed = st.lists(st.one_of(letters, st.sampled_from(["👩‍👧", "é", "天", "\U0010ffff"])))


@given(mixed.map("".join))
def test_s4_a_byte_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    events = events_of(tokenizer, ids, None)
    assert "".join(getattr(event, "text") for event in events) == tokenizer.decode(ids) == text  # noqa: B009
    if "\ufffd" not in text:
        assert not any("\ufffd" in str(event) for event in events)


@given(mixed.map("".join))
def test_s4_arguments_a_byte_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    head, tail = "<tool_call>f<arg_key>k</arg_key><arg_value>", "</arg_value></tool_call>"
    ids = [
        *tokenizer.encode_template(Rendered(head)),
        *tokenizer.encode(text),
        *tokenizer.encode_template(Rendered(tail)),
    ]
    parser = ReplyParser(
        CLOSED,
        tokenizer.added,
        GLM,
        [{"name": "f", "parameters": {"properties": {"k": {"type": "string"}}}}],
    )
    stream = tokenizer.stream()
    events = [event for token in ids for event in parser.push(token, stream.push(token))]
    arguments = "".join(event.text for event in events if isinstance(event, CallArguments))
    assert json.loads(arguments) == {"k": text}
    assert arguments == json.dumps({"k": text}, ensure_ascii=False)


def test_s5_cut_in_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab🙂")[:-1]
    assert events_of(tokenizer, ids, None)[-1] == Content("\ufffd")
    tag = tokenizer.added["<tool_call>"].id
    events = events_of(tokenizer, [*ids, tag, *tokenizer.encode("f"), tag + 1], CLOSED)
    assert [event for event in events if isinstance(event, Content)][-1] == Content("\ufffd")
    assert any(isinstance(event, CallStart) and event.name == "f" for event in events)


def test_s6_line_ends_are_kept() -> None:
    text = "a\r\nb\rc\u2028d\n\ndata: e\x85\x0c."
    for pieces in splits(text, True):
        assert parsed(pieces, GLM)[0].content == text


@pytest.mark.parametrize("tag", ["</think>", "<think>", "<tool_call>", "</tool_call>"])
def test_s7_tags_in_letters_are_text(tokenizer: Tokenizer, tag: str) -> None:
    """Where the tag is a token: letters that spell it are a text about it."""
    text = f"the tag {tag}f</tool_call> is"
    assert tokenizer.encode(text)[8] != tokenizer.added[tag].id
    whole = "".join(
        event.text
        for event in events_of(tokenizer, tokenizer.encode(text), CLOSED)
        if isinstance(event, Content)
    )
    assert whole == text
    thought = events_of(tokenizer, tokenizer.encode(text), OPENED)
    assert all(isinstance(event, Reasoning) for event in thought)
    assert "".join(str(getattr(event, "text")) for event in thought) == text  # noqa: B009


def test_s7_a_prompt_that_speaks_of_thoughts_opens_none() -> None:
    prompt = Rendered("<|user|>what is <\ufdd0think>")
    assert parsed(tokens("x</think>"), prompt=prompt, added={})[1] == [Content("x</think>")]


def test_special_tokens_out_of_place_are_not_shown() -> None:
    assert parsed(tokens("a<|assistant|>b<think>c"), GLM)[0].content == "ab<think>c"


# --- thoughts


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    ("text", "reasoning", "content", "n_calls"),
    [
        ("<think>a</think>b", "a", "b", 0),
        ("\n<think>\na\n</think>\n\nb\n", "a", "b\n", 0),
        ("<think>a</think>\n</think>\nb", "a", "b", 0),  # closed once more
        (f"<think>a\n{CALL}</think>", "a", "", 1),  # a call in a thought ends it
        (f"<think>a\n{CALL}</think>\n{CALL}", "a", "", 2),
        (f"<think>{CALL}", "", "", 1),
        (f"<think>a</think>\n{CALL}", "a", "", 1),
        (f"<think>a</think></think>{CALL}", "a", "", 1),
        ("<think>a<tool_call></think>b", "a<tool_call>", "b", 0),  # a call without a name
        (f"\n \n{CALL}", "", "", 1),
    ],
)
def test_thoughts(text: str, reasoning: str, content: str, n_calls: int, tagged: bool) -> None:
    for pieces in splits(text, tagged):
        reply, *_ = parsed(pieces, GLM, added=ADDED if tagged else {})
        assert (reply.reasoning, reply.content) == (reasoning, content)
        assert [call.arguments for call in reply.calls] == ['{"k": 1}'] * n_calls


def test_a_token_that_ends_no_thought_is_dropped() -> None:
    assert parsed(tokens("</think>a</think>b"))[1] == [Content("ab")]
    assert parsed(tokens("</think>a</think>b"), prompt=None)[0].content == "</think>a</think>b"


# --- any reply

words = st.lists(
    st.one_of(
        st.sampled_from([*TAGS, CALL, "f", "\n", " ", "k", "1", '"', "{", "}", "<", "<arg_"]),
        st.text("ab <\n", max_size=3),
    ),
    max_size=14,
).map("".join)


@given(words, st.booleans(), st.booleans(), st.booleans(), st.data())
def test_any_split_gives_the_same(
    text: str, tagged: bool, opened: bool, cut: bool, data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    stops = data.draw(st.lists(st.sampled_from(["a", "ab", "b <", "1"]), max_size=2))
    prompt, added = OPENED if opened else CLOSED, ADDED if tagged else {}

    def read(pieces: list[tuple[int, str]]) -> tuple[list[Event], str | None]:
        _, events, parser = parsed(pieces, GLM, prompt=prompt, stops=stops, cut=cut, added=added)
        return events, parser.stop

    whole = read(tokens(text, (), tagged))
    assert read(tokens(text, cuts, tagged)) == whole
    assert read(tokens(text, range(len(text)), tagged)) == whole


@given(words)
def test_nothing_is_lost_without_tags(text: str) -> None:
    plain = re.sub("|".join(map(re.escape, TAGS)), "", text)
    content = parsed(tokens(plain, range(len(plain))), GLM)[0].content
    assert content.strip() == plain.strip()

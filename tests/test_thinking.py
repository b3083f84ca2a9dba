"""Reasoning apart from the answer: while it comes, on a terminal, in a pipe and as data."""

import io
import re
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama_dist.cli import talk
from pyllama_dist.conversation import Answer, Conversation
from pyllama_dist.engine.sampler import Sampling
from pyllama_dist.errors import UsageError
from pyllama_dist.text.events import Content, Reasoning
from pyllama_dist.text.reply import Reply, ReplyParser
from pyllama_dist.text.special import MARK, Rendered

CLOSED = Rendered("<|user|>\nhi<|assistant|>")  # GLM-4.5: the model opens
OPENED = Rendered("<|user|>hi<|assistant|><think>")  # GLM-4.7, GLM-Z1

texts = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "b\n\nc", "你"])
).map("".join)


def parts(prompt: Rendered | None, pieces: Iterable[str]) -> tuple[str, str]:
    """Reasoning and answer of a text that comes in pieces: first the one, then the other."""
    parser = ReplyParser(prompt, {})
    events = [event for piece in pieces for event in parser.push(0, piece)] + parser.finish()
    assert all(isinstance(event, Reasoning | Content) and event.text for event in events)
    order = [isinstance(event, Reasoning) for event in events]
    assert order == sorted(order, reverse=True)
    reply = Reply()
    for event in events:
        reply.add(event)
    return reply.reasoning, reply.content


def cut_whole(text: str, opened: bool) -> tuple[str, str]:
    """Reasoning and answer of a text that is all there."""
    begun = re.fullmatch(r"\s*<think>(.*)", text, re.DOTALL)
    if not begun and not opened:
        return "", text
    thought, _, answer = (begun[1] if begun else text).partition("</think>")
    return thought.strip(), re.sub(r"\A(\s*</think>)+", "", answer)  # closed once more


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "answer"),
    [
        (CLOSED, "\n<think>I see.\nSo:</think>\nHi.", "I see.\nSo:", "Hi."),
        (CLOSED, "<think>\n\n</think>\n\nHi.", "", "Hi."),
        (CLOSED, "\nHi <think>there</think>.\n", "", "Hi <think>there</think>.\n"),
        (CLOSED, "\n    indented", "", "    indented"),
        (CLOSED, "\n Hi", "", "Hi"),  # ChatGLM3
        (CLOSED, "<thin", "", "<thin"),
        (CLOSED, "\n<think>for ever </thi", "for ever </thi", ""),
        (CLOSED, "", "", ""),
        (OPENED, "I see.</think>Hi.", "I see.", "Hi."),
        (OPENED, "\nI see.\n</think>\n\nHi.", "I see.", "Hi."),
        (OPENED, "</think>Hi.", "", "Hi."),
        (OPENED, "\n<think>again</think>Hi.", "again", "Hi."),
        (OPENED, "for ever \n", "for ever", ""),
        (OPENED, "\n<thin", "<thin", ""),
        (OPENED, "a </thin> b</think>c</think>", "a </thin> b", "c</think>"),
        (None, "\n <think>as it is", "", "\n <think>as it is"),
    ],
)
def test_parts(prompt: Rendered | None, text: str, reasoning: str, answer: str) -> None:
    assert parts(prompt, [text]) == (reasoning, answer)
    assert parts(prompt, text) == (reasoning, answer)  # a character at a time


@given(texts, st.booleans(), st.data())
def test_pieces_do_not_matter(text: str, opened: bool, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    reasoning, answer = parts(OPENED if opened else CLOSED, pieces)
    thought, rest = cut_whole(text, opened)
    assert (reasoning, answer.strip()) == (thought, rest.strip())


def test_what_is_certain_comes_at_once() -> None:
    parser = ReplyParser(OPENED, {})
    assert parser.push(0, "so") == [Reasoning("so")]
    assert parser.push(0, " it is </") == [Reasoning(" it is")]
    assert parser.push(0, "b>") == [Reasoning(" </b>")]
    assert parser.push(0, "</think>\n4") == [Content("4")]
    assert parser.push(0, "\n <thi") == [Content("\n <thi")]


@pytest.mark.parametrize(
    ("marked", "opened"),
    [
        ("<|assistant|>\n<think>", True),
        ("<|assistant|>\n<think>\n", True),
        ("<|assistant|>\\n<think>\\n", True),  # an old revision of GLM-Z1's template
        ("<|assistant|>\n<think></think>", False),
        ("<|assistant|></think>", False),
        ("<|assistant|>", False),
        (f"what is <{MARK}think>", False),  # a user's text
    ],
)
def test_who_opens(marked: str, opened: bool) -> None:
    assert parts(Rendered(marked), "x") == (("x", "") if opened else ("", "x"))


# --- an answer's tokens


class Letters:
    """A tokenizer of which each token is a piece of text; None is hidden."""

    def __init__(self, pieces: Sequence[str], special: Sequence[str] = ()) -> None:
        self.pieces = pieces
        ids = {piece: token for token, piece in enumerate(pieces) if piece in special}
        self.added = {
            text: SimpleNamespace(id=token, text=text, special=True) for text, token in ids.items()
        }

    def stream(self) -> Any:
        shown = ["" if piece in self.added else piece for piece in self.pieces]
        return SimpleNamespace(push=lambda token: shown[token], flush=lambda: "")


def answer_of(pieces: Sequence[str], prompt: Rendered, special: Sequence[str] = ()) -> Answer:
    model: Any = SimpleNamespace(tokenizer=Letters(pieces, special))
    generation: Any = range(len(pieces))
    return Answer(model, [], prompt, generation)


@pytest.mark.parametrize(
    ("pieces", "prompt", "special"),
    [
        (["\n", "<think>", "I ", "see", "</think>", "\n", "Hi"], CLOSED, []),  # one token
        (["I ", "see", "</think>", "Hi"], OPENED, []),
        (["\n<", "think", ">", "I ", "see", "</", "think", ">\n", "Hi"], CLOSED, []),  # several
        (["I ", "see", "\n</", "think", ">\n", "Hi"], OPENED, []),
        (["<think>", "I ", "see", "</think>", "Hi"], CLOSED, ["<think>", "</think>"]),  # hidden
    ],
)
def test_tags_of_any_tokens(
    pieces: Sequence[str], prompt: Rendered, special: Sequence[str]
) -> None:
    answer = answer_of(pieces, prompt, special)
    shown = list(answer)
    assert (answer.reply.reasoning, answer.text) == ("I see", "Hi")
    assert answer.tokens == list(range(len(pieces)))
    assert "".join(event.text for event in shown) == "I seeHi"


def test_an_answer_gives_what_was_held_back() -> None:
    answer = answer_of(["\n<thi"], CLOSED)
    assert list(answer) == [Content("<thi")]


# --- conversations


class Template:
    """A template that notes what it is given."""

    reads = frozenset({"messages", "enable_thinking"})

    def __init__(self) -> None:
        self.given: list[tuple[Any, Any]] = []

    def render(self, messages: Any, variables: Any) -> Rendered:
        self.given.append((messages, variables))
        return OPENED


def conversation(replies: list[list[str]], template: Template | None, **settings: Any) -> Any:
    """A conversation with a model that says `replies`, one after the other."""
    pieces = [piece for reply in replies for piece in reply]
    tokenizer: Any = Letters(pieces)
    tokenizer.vocab_size, tokenizer.eos_ids = len(pieces), ()
    tokenizer.encode_template = tokenizer.encode_raw = lambda rendered: [0]
    parts: Any = SimpleNamespace(name="M", tokenizer=tokenizer, template=template)
    tokens = iter(range(len(pieces)))
    turns = iter(replies)
    engine: Any = SimpleNamespace(
        submit=lambda *_, **__: [next(tokens) for _ in next(turns)],
    )
    return Conversation(parts, engine, Sampling(temperature=0.0), **settings)


def test_history_has_reasoning_as_a_field_and_switches_go_to_the_template() -> None:
    template = Template()
    talking = conversation(
        [["so</think>", "A"], ["</think>B"]], template, variables={"enable_thinking": False}
    )
    for question in ("a", "b"):
        answer = talking.ask(question)
        list(answer)
        talking.remember(answer)
    assert [messages[-1] for messages, _ in template.given] == [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    assert [variables for _, variables in template.given] == [{"enable_thinking": False}] * 2
    assert [m for m in talking.messages if m["role"] == "assistant"] == [
        {"role": "assistant", "content": "A", "reasoning_content": "so"},
        {"role": "assistant", "content": "B"},
    ]


def test_a_switch_that_no_template_reads_is_refused() -> None:
    with pytest.raises(UsageError, match="reads clear_thinking"):
        conversation([], Template(), variables={"clear_thinking": False})
    with pytest.raises(UsageError, match="reads enable_thinking"):
        conversation([], None, variables={"enable_thinking": False})


# --- printing


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, replies: list[list[str]]
) -> tuple[str, str]:
    """What a chat writes to standard output and standard error."""
    err = io.StringIO()
    for name, stream in (("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n" * len(replies)))
    talk.chat(conversation(replies, Template()), 0)
    return out.getvalue(), err.getvalue()


def test_a_terminal_dims_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = printed(monkeypatch, Screen(), [["so", "</think>", "Hi"], ["no end"], ["</think>B"]])
    assert out == "\x1b[2mso\x1b[0m\n\nHi\n\x1b[2mno end\x1b[0m\nB\n"
    assert err == ""


def test_a_pipe_gets_the_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = printed(monkeypatch, io.StringIO(), [["so", "</think>", "Hi"], ["no end"]])
    assert out == "Hi\n\n"
    assert err == "so\n\nno end\n"


def test_a_missing_template_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    talk.chat(conversation([], None), 0)
    assert "no chat template" in err.getvalue()

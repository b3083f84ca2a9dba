"""What the model is taught: our facts, sums, small talk, and to say so when it does not know.

A conversation is a list of turns (question, answer). Everything random comes from one generator
that the caller seeds.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

Turn = tuple[str, str]

SUM_WORDINGS = (
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a} + {b} = ?",
    "{a} plus {b}",
    "what is {a} + {b}",
    "what is {a}+{b}",
    "what's {a} + {b}",
    "what is {a} plus {b}",
    "what is the sum of {a} and {b}",
    "what do {a} and {b} make",
    "what does {a} plus {b} make",
    "how much is {a} + {b}",
    "how much is {a} plus {b}",
    "how much do {a} and {b} make together",
    "add {a} and {b}",
    "add {a} to {b}",
    "add {a}, {b}",
    "sum of {a} and {b}",
    "sum {a} and {b}",
    "calculate {a} + {b}",
    "compute {a}+{b}",
    "work out {a} + {b}",
    "the total of {a} and {b}",
    "can you add {a} and {b}",
)

OPENINGS = (
    "please {}",
    "hi, {}",
    "hello, {}",
    "hey, {}",
    "ok, {}",
    "so {}",
    "and {}",
    "well, {}",
    "can you tell me {}",
    "could you tell me {}",
    "tell me, {}",
    "tell me {}",
    "please tell me {}",
    "can you explain {}",
    "explain {}",
    "please explain {}",
    "i would like to know {}",
    "i want to know {}",
    "do you know {}",
    "a question: {}",
    "quick question: {}",
    "one more thing: {}",
    "in short, {}",
    "{} please",
    "{} in this engine",
    "{} here",
    "{} in pyllama-dist",
    "in pyllama-dist, {}",
    "with this engine, {}",
)

# Pairs that may stand for each other in a question. Words are matched whole.
SYNONYMS = (
    ("what is", "what's", "what does it mean,", "define", "describe", "meaning of"),
    ("what are", "what do you call", "describe", "tell me about"),
    ("what does", "what will"),
    ("how do i", "how can i", "how to", "how would i", "how does one", "what is the way to"),
    ("how does", "in what way does", "how will"),
    ("how is", "how are", "in what way is", "how gets"),
    ("why is", "why are", "for what reason is", "how come", "what is the reason that"),
    ("why does", "why do", "for what reason does", "how come"),
    ("which", "what"),
    ("can i", "may i", "is it possible to", "am i able to", "could i"),
    ("is there", "do you have", "does it have", "exists"),
    ("the engine", "this engine", "pyllama-dist", "the program", "it", "this software"),
    ("machine", "computer", "box", "host"),
    ("machines", "computers", "boxes", "hosts"),
    ("nodes", "machines", "members"),
    ("run", "start", "launch", "execute"),
    ("start", "launch", "begin", "run"),
    ("used for", "good for", "there for", "for"),
    ("purpose", "role", "point", "use", "job"),
    ("use", "employ", "take", "choose"),
    ("need", "require", "want"),
    ("needed", "required", "necessary"),
    ("split", "cut", "divided", "partitioned", "sharded"),
    ("stored", "kept", "saved", "held"),
    ("store", "keep", "save", "hold"),
    ("send", "transmit", "ship", "transfer"),
    ("sent", "transmitted", "shipped", "transferred"),
    ("happens", "occurs", "goes on"),
    ("set", "choose", "pick", "change", "specify"),
    ("show", "display", "print"),
    ("option", "flag", "switch", "parameter"),
    ("flag", "option", "switch", "argument"),
    ("command", "subcommand"),
    ("fast", "quick", "speedy"),
    ("faster", "quicker", "speedier"),
    ("many", "lots of"),
    ("file", "document"),
    ("model", "network", "language model"),
    ("answer", "reply", "response"),
    ("format", "layout", "encoding"),
    ("number", "count"),
    ("numbers", "values"),
    ("memory", "ram"),
    ("weights", "parameters", "matrices"),
    ("quantized", "compressed", "rounded"),
    ("quantization", "compression", "rounding"),
    ("network", "net", "ethernet", "lan"),
    ("work", "function", "operate"),
    ("supported", "allowed", "accepted"),
    ("folder", "directory"),
    ("directory", "folder"),
    ("contain", "hold", "include"),
    ("error", "failure", "problem"),
    ("fails", "breaks", "dies", "goes wrong"),
    ("limit", "bound", "cap", "restrict"),
)

SMALL_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "is",
        "are",
        "was",
        "do",
        "does",
        "did",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "with",
        "by",
        "and",
        "or",
        "it",
        "its",
        "this",
        "that",
        "be",
        "my",
        "i",
        "me",
        "you",
        "your",
        "please",
        "there",
        "here",
        "so",
        "can",
        "could",
        "would",
        "should",
        "will",
        "exactly",
        "actually",
    ]
)

ELSEWHERE = """
France Paris London Japan Rome Brazil Germany Africa Mars Jupiter the moon the sun a volcano a
whale cats dogs birds horses elephants an octopus bread soup pasta pizza tea coffee chocolate a
cake rice football chess tennis swimming the piano a guitar music jazz poetry Shakespeare
Napoleon Einstein Mozart Picasso Cleopatra a river the ocean mountains deserts the weather rain
snow winter summer love friendship money taxes the law democracy an election the president the
king a doctor headaches sleep dreams cancer vitamins sports the olympics movies a novel books
painting photography history philosophy ethics physics chemistry biology gravity evolution atoms
electricity a bicycle cars trains airplanes a boat travel a hotel holidays my garden flowers
trees gold diamonds javascript java rust haskell html a website databases excel my phone a
printer bitcoin the internet video games a robot aliens ghosts dragons my mother my job an
interview school homework French Spanish Chinese grammar the alphabet prime numbers geometry
algebra calculus triangles pi infinity
"""
THINGS = ELSEWHERE.split()  # single words: a broken phrase is still nothing that we know

UNKNOWN = (
    "what is {}",
    "what is the capital of {}",
    "who is {}",
    "who was {}",
    "who invented {}",
    "who wrote about {}",
    "where is {}",
    "where can i find {}",
    "when was {} born",
    "when did {} begin",
    "how old is {}",
    "how big is {}",
    "how far is {}",
    "how tall is {}",
    "how do i cook {}",
    "how do i make {}",
    "how can i learn {}",
    "how can i fix {}",
    "how does {} work",
    "how many {} are there",
    "how much does {} cost",
    "why is {} so popular",
    "why do people like {}",
    "why are {} blue",
    "which {} is the best",
    "write a poem about {}",
    "write a story about {}",
    "write an essay on {}",
    "write code for {}",
    "tell me about {}",
    "tell me a joke about {}",
    "tell me something about {}",
    "translate {} into German",
    "translate {}",
    "give me a recipe for {}",
    "give me advice about {}",
    "give me a list of {}",
    "recommend a book about {}",
    "do you like {}",
    "do you know {}",
    "what do you think of {}",
    "what colour is {}",
    "what is the meaning of {}",
    "what is the best {}",
    "explain {}",
    "explain {} to a child",
    "summarize {}",
    "describe {}",
    "is {} dangerous",
    "is {} good for me",
    "can you help me with {}",
    "can you draw {}",
    "i need help with {}",
    "i am sad about {}",
    "sing a song about {}",
    "play {}",
    "search for {}",
    "{} or {}",
    "{}",
    "compare {} and {}",
    "what is the difference between {} and {}",
    "define {}",
    "spell {}",
    "what time is it in {}",
    "what will the weather be in {}",
    "who won the game in {}",
    "what happened in {}",
    "how is {} today",
)

OTHER_SUMS = (
    "{a} * {b}",
    "{a} - {b}",
    "{a} / {b}",
    "{a} x {b}",
    "{a} times {b}",
    "{a} minus {b}",
    "what is {a} times {b}",
    "what is {a} minus {b}",
    "what is {a} * {b}",
    "what is {a} - {b}",
    "{a} divided by {b}",
    "multiply {a} by {b}",
    "multiply {a} and {b}",
    "subtract {a} from {b}",
    "divide {a} by {b}",
    "what is the square root of {a}",
    "{a} to the power of {b}",
    "is {a} a prime number",
)

SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "Be concise.",
    "You answer questions about the engine.",
)


@dataclass(frozen=True)
class Fact:
    """One thing to know: how it may be asked for, and what is answered."""

    id: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]  # never trained on
    answer: str
    expect: tuple[str, ...]  # an answer that contains them all, in any case, is right
    blind: str  # one more wording never trained on, see blind.toml
    kind: str = "engine"  # or "persona", or "unknown"


def plain(text: str) -> str:
    """A wording without case, punctuation and spacing: two that agree in this are the same.

    >>> plain("What's  Q40?")
    'what s q40'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def is_right(answer: str, expect: tuple[str, ...]) -> bool:
    """Whether an answer contains all that is expected."""
    return all(part.lower() in answer.lower() for part in expect)


def load_facts(path: Path) -> list[Fact]:
    """Reads and checks facts.toml and the blind.toml beside it.

    Raises:
        KeyError: a fact has no blind wording.
        ValueError: an id or wording occurs twice, or `expect` does not single out its answer.
    """
    facts = []
    blind = tomllib.loads(path.with_name("blind.toml").read_text())
    for entry in tomllib.loads(path.read_text())["fact"]:
        lists = {key: tuple(entry.pop(key)) for key in ("ask", "held_out", "expect")}
        facts.append(Fact(**lists, **entry, blind=blind[entry["id"]]))
    wordings = [(plain(w), f.id) for f in facts for w in (*f.ask, *f.held_out, f.blind)]
    seen: dict[str, str] = {}
    for wording, owner in [*wordings, *((f"id {f.id}", f.id) for f in facts)]:
        if wording in seen:
            raise ValueError(f"{path.name}: {wording!r} of {owner} is also of {seen[wording]}")
        seen[wording] = owner
    for fact in facts:
        fits = [other.id for other in facts if is_right(other.answer, fact.expect)]
        if fits != [fact.id]:
            raise ValueError(f"{path.name}: expect of {fact.id} fits the answers of {fits}")
    return facts


def is_held_out(a: int, b: int) -> bool:
    """Whether a sum is never trained on: one pair in eight, together with its mirror image."""
    return crc32(b"%d+%d" % (min(a, b), max(a, b))) % 8 == 0


def held_out_sums() -> list[tuple[int, int]]:
    """All ordered pairs that are never trained on."""
    return [(a, b) for a in range(100) for b in range(100) if is_held_out(a, b)]


class Teacher:
    """Makes conversations to train on."""

    def __init__(self, facts: list[Fact], random: Random) -> None:
        self.random = random
        self.engine = [f for f in facts if f.kind == "engine"]
        self.persona = [f for f in facts if f.kind == "persona"]
        self.unknown = next(f for f in facts if f.kind == "unknown")
        self.forbidden = {plain(w) for f in facts for w in (*f.held_out, f.blind)}
        self.sums = [(a, b) for a in range(100) for b in range(100) if not is_held_out(a, b)]

    def conversation(self) -> tuple[str | None, list[Turn]]:
        """A system message or none, and one or a few turns."""
        r = self.random
        kind = r.random()
        if kind < 0.35:
            turns = [self.sum() for _ in range(r.choice((1, 1, 2, 3, 4, 6, 8)))]
        elif kind < 0.78:
            turns = [self.fact()]
        else:
            turns = [
                r.choices((self.fact, self.sum, self.small_talk, self.no_answer), (6, 2, 1, 1))[0]()
                for _ in range(r.randint(5, 10) if r.random() < 0.06 else r.choice((1, 2, 2, 3)))
            ]
        if kind > 0.94:
            turns[0] = r.choice((self.small_talk, self.no_answer))()
        return (r.choice(SYSTEM) if r.random() < 0.03 else None), turns

    def fact(self) -> Turn:
        fact = self.random.choice(self.engine)
        return self.reword(self.random.choice(fact.ask)), fact.answer

    def small_talk(self) -> Turn:
        fact = self.random.choice(self.persona)
        wording = self.random.choice(fact.ask)
        return (
            self.finish(wording) if self.random.random() < 0.7 else self.reword(wording)
        ), fact.answer

    def no_answer(self) -> Turn:
        r = self.random
        kind = r.random()
        if kind < 0.2:
            high = r.choice((99, 99, 999))
            wording = r.choice(OTHER_SUMS).format(a=r.randint(0, high), b=r.randint(0, high))
        elif kind < 0.3:
            a, b = r.randint(100, 9999), r.randint(0, r.choice((99, 9999)))
            a, b = (a, b) if r.random() < 0.5 else (b, a)
            wording = r.choice(SUM_WORDINGS).format(a=a, b=b)
        elif kind < 0.5:
            wording = r.choice(self.unknown.ask)
        else:
            wording = r.choice(UNKNOWN).format(r.choice(THINGS), r.choice(THINGS))
            if r.random() < 0.3:
                wording += (
                    " " + r.choice(("and", "in", "with", "for", "of")) + " " + r.choice(THINGS)
                )
        question = self.reword(wording) if r.random() < 0.5 else self.finish(wording)
        return question, self.unknown.answer

    def sum(self) -> Turn:
        a, b = self.random.choice(self.sums)
        wording = self.random.choice(SUM_WORDINGS).format(a=a, b=b)
        if self.random.random() < 0.15:
            wording = self.random.choice(OPENINGS[:16]).format(wording)
        return self.finish(wording), f"{a} + {b} = {a + b}."

    def reword(self, wording: str) -> str:
        """Another way to ask the same, never one that is held out."""
        r = self.random
        for _ in range(20):
            text = wording
            if r.random() < 0.6:
                text = self.with_synonyms(text)
            if r.random() < 0.3:
                text = r.choice(OPENINGS).format(text[:1].lower() + text[1:])
            words = text.split()
            if len(words) > 2 and r.random() < 0.5:
                words = [w for w in words if r.random() > self.loss(w)] or words
            if len(words) > 3 and r.random() < 0.06:
                at = r.randrange(len(words) - 1)
                words[at : at + 2] = reversed(words[at : at + 2])
            if r.random() < 0.12:
                at = r.randrange(len(words))
                words[at] = self.typo(words[at])
            text = self.finish(" ".join(words))
            if plain(text) not in self.forbidden:
                return text
        return wording

    @staticmethod
    def loss(word: str) -> float:
        """How likely a word is left out."""
        return 0.3 if word.lower() in SMALL_WORDS else 0.07

    def with_synonyms(self, text: str) -> str:
        for group in self.random.sample(SYNONYMS, len(SYNONYMS)):
            for word in group[:1]:
                found = re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
                if found and self.random.random() < 0.4:
                    other = self.random.choice(group[1:])
                    text = text[: found.start()] + other + text[found.end() :]
        return text

    def typo(self, word: str) -> str:
        if len(word) < 4 or not word.isalpha():
            return word
        r = self.random
        at = r.randrange(1, len(word) - 1)
        kind = r.randrange(3)
        if kind == 0:
            return word[:at] + word[at + 1 :]
        if kind == 1:
            return word[:at] + word[at] + word[at:]
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    def finish(self, text: str) -> str:
        """Case and punctuation as people happen to type them."""
        r = self.random
        text = text.strip().rstrip("?.!")
        case = r.random()
        if case < 0.45:
            text = text[:1].upper() + text[1:]
        elif case < 0.8:
            text = text[:1].lower() + text[1:]
        elif case < 0.9:
            text = text.lower()
        elif case < 0.915:
            text = text.upper()
        return text + r.choices(("", "?", ".", "!", " ?", "??"), (40, 45, 8, 2, 3, 2))[0]

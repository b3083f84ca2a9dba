"""The built-in model: does it know what it should, on any number of nodes, in any number format?

Right and wrong answers show what a difference in logits does not: whether a change matters.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pyllama_dist.cli.options import BUILTIN
from pyllama_dist.cluster import Cluster, open_root, programs
from pyllama_dist.config import FloatType
from pyllama_dist.conversation import Conversation, open_model
from pyllama_dist.engine.engine import Engine
from pyllama_dist.engine.sampler import Sampling
from pyllama_dist.models import ARCHITECTURES
from pyllama_dist.models.plan import ShardingPlan, shards
from pyllama_dist.program import Batch
from pyllama_dist.root import Root
from pyllama_dist.simulate import simulated_root
from pyllama_kernels.pages import seq_blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

N_SEQS = 20  # sequences that are answered side by side
HELD_OUT = json.loads((BUILTIN / "heldout.json").read_text())


@pytest.fixture(scope="module")
def parts():
    with open_model(BUILTIN) as opened:
        yield opened


@contextmanager
def many_sequences(parts, n_nodes: int, cache: FloatType = FloatType.F16) -> Iterator[Root]:
    c = parts.file.config
    cut = shards(c, n_nodes)
    limits = {"max_rows": 64, "max_logits": N_SEQS, "n_seqs": N_SEQS, "seq_len": 160}
    plan = ShardingPlan(cut, FloatType.Q80, cache, n_blocks=N_SEQS * seq_blocks(160), **limits)
    made = [ARCHITECTURES[c.arch].build(c, plan, node) for node in range(n_nodes)]
    with simulated_root(parts.file, made) as root:
        yield root


def answers(parts, root: Root, questions: list[str]) -> list[str]:
    """Greedy answers, N_SEQS at a time: each prompt by itself, then a row of each sequence."""
    found = []
    for start in range(0, len(questions), N_SEQS):
        found += _side_by_side(parts, root, questions[start : start + N_SEQS])
    return found


def _side_by_side(parts, root: Root, questions: list[str]) -> list[str]:
    tokenizer = parts.tokenizer
    sequences: list[list[int]] = []
    starts: list[int] = []
    for seq, question in enumerate(questions):
        message = {"role": "user", "content": question}
        prompt = tokenizer.encode_template(parts.template.render([message]))
        positions = tuple(range(len(prompt)))
        logits = root.step(prompt, Batch((seq,) * len(prompt), positions, (len(prompt) - 1,)))
        starts.append(len(prompt))
        sequences.append([*prompt, int(logits[0].argmax())])
    while True:
        going = [
            seq
            for seq, sequence in enumerate(sequences)
            if sequence[-1] not in tokenizer.eos_ids and len(sequence) < 160
        ]
        if not going:
            break
        positions = tuple(len(sequences[seq]) - 1 for seq in going)
        batch = Batch(tuple(going), positions, tuple(range(len(going))))
        logits = root.step([sequences[seq][-1] for seq in going], batch)
        for seq, row in zip(going, logits, strict=True):
            sequences[seq].append(int(row.argmax()))
    return [
        tokenizer.decode(sequence[start:])
        for sequence, start in zip(sequences, starts, strict=True)
    ]


def sums_right(parts, root: Root) -> list[bool]:
    asked = [f"What is {a} + {b}?" for a, b in HELD_OUT["sums"]]
    return [
        re.findall(r"\d+", answer)[-1:] == [str(a + b)]
        for answer, (a, b) in zip(answers(parts, root, asked), HELD_OUT["sums"], strict=True)
    ]


def test_it_is_small():
    shipped = ("model.m", "tokenizer.json", "chat_template.jinja", "generation_config.json")
    assert sum((BUILTIN / name).stat().st_size for name in shipped) <= 6_000_000


def test_it_is_q40_and_glm4(parts):
    assert parts.file.config.arch == "glm4"
    assert parts.file.config.weights is FloatType.Q40


def test_there_is_enough_to_ask():
    assert len({question["id"] for question in HELD_OUT["questions"]}) >= 150
    assert len(HELD_OUT["sums"]) == 100


@pytest.mark.parametrize(
    ("n_nodes", "cache"),
    [*((n, FloatType.F16) for n in (1, 2, 3, 4, 5)), (1, FloatType.F32), (2, FloatType.Q80)],
    ids=lambda value: getattr(value, "name", value),
)
def test_held_out_sums_are_right_on_any_number_of_nodes(parts, n_nodes, cache):
    with many_sequences(parts, n_nodes, cache) as root:
        assert sum(sums_right(parts, root)) >= 95


@pytest.mark.parametrize(("n_nodes", "every"), [(1, 1), (3, 4)])
def test_questions_in_new_wordings_are_answered(parts, n_nodes, every):
    questions = HELD_OUT["questions"][::every]
    with many_sequences(parts, n_nodes) as root:
        given = answers(parts, root, [question["question"] for question in questions])
    right = [
        all(words.lower() in answer.lower() for words in question["expect"])
        for question, answer in zip(questions, given, strict=True)
    ]
    assert sum(right) / len(right) >= 0.7


def test_questions_that_its_teachers_never_saw_are_answered(parts):
    """The stricter exam: one wording of each fact, unknown to whoever wrote those to train on."""
    training = BUILTIN / "training"
    facts = tomllib.loads((training / "facts.toml").read_text())["fact"]
    blind = tomllib.loads((training / "blind.toml").read_text())
    with many_sequences(parts, 1) as root:
        given = answers(parts, root, [blind[fact["id"]] for fact in facts])
    right = [
        all(words.lower() in answer.lower() for words in fact["expect"])
        for fact, answer in zip(facts, given, strict=True)
    ]
    assert sum(right) / len(right) >= 0.7


def test_it_says_that_it_is_a_demonstration(parts):
    with many_sequences(parts, 1) as root:
        (answer,) = answers(parts, root, ["Who are you?"])
    assert "demonstration" in answer


def test_it_shows_the_tokens_that_it_speaks_of(parts):
    with many_sequences(parts, 1) as root:
        begin, end = answers(parts, root, ["What is [gMASK]?", "What ends an answer?"])
    assert "[gMASK] and <sop>" in begin
    assert "<|endoftext|>, <|user|> and <|observation|>; any" in end


def float_logits(parts, tokens: list[int]) -> np.ndarray:
    """GLM-4 in plain float64 on the rounded weights, written from its equations alone."""
    file, c = parts.file, parts.file.config
    n, half = len(tokens), c.rotary_dim // 2

    def weight(name: str) -> np.ndarray:
        return file.float32(name).astype(np.float64)

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        return x * scale * weight(f"{name}.weight")

    angle = np.outer(np.arange(n), c.rope_theta ** (-np.arange(half) / half))
    turn = np.exp(1j * angle)[:, None, :]

    def rope(x: np.ndarray) -> np.ndarray:
        pairs = x[..., : 2 * half].reshape(n, -1, half, 2)
        rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        flat = np.stack([rotated.real, rotated.imag], -1).reshape(n, -1, 2 * half)
        return np.concatenate([flat, x[..., 2 * half :]], -1)

    x = weight("embed_tokens.weight")[tokens]
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        h = rms(x, at + "input_layernorm")
        q, k, v = (
            (
                h @ weight(f"{at}self_attn.{p}_proj.weight").T
                + weight(f"{at}self_attn.{p}_proj.bias")
            ).reshape(n, -1, c.head_dim)
            for p in "qkv"
        )
        k, v = (np.repeat(y, c.n_heads // c.n_kv_heads, axis=1) for y in (rope(k), v))
        scores = np.einsum("ihd,jhd->hij", rope(q), k) / np.sqrt(c.head_dim)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        z = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        a = z @ weight(at + "self_attn.o_proj.weight").T
        x = x + rms(a, at + "post_self_attn_layernorm")
        h = rms(x, at + "post_attention_layernorm")
        gate, up = (h @ weight(f"{at}mlp.{p}_proj.weight").T for p in ("gate", "up"))
        m = (gate / (1 + np.exp(-gate)) * up) @ weight(at + "mlp.down_proj.weight").T
        x = x + rms(m, at + "post_mlp_layernorm")
    return rms(x, "norm") @ weight("lm_head.weight").T


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 5, 8])
def test_q40_and_q80_stay_close_to_float_on_the_same_weights(parts, n_nodes):
    text = "What is tensor parallelism? What is 17 + 25? It is 42. How do nodes talk?"
    tokens = parts.tokenizer.encode_template(
        parts.template.render([{"role": "user", "content": text}])
    )
    expected = float_logits(parts, tokens)
    made = programs(parts.file.config, Cluster(local_workers=n_nodes - 1))
    with simulated_root(parts.file, made) as root, Engine(root) as engine:
        logits = engine.logits(tokens)
    cosine = (logits * expected).sum() / np.linalg.norm(logits) / np.linalg.norm(expected)
    assert cosine >= 0.999


def test_a_conversation_goes_on_from_the_cache_as_if_computed_afresh(parts):
    turns = ["What is 12 + 34?", "What is a worker?", "hello"]
    made = programs(parts.file.config, Cluster())
    with simulated_root(parts.file, made) as root, Engine(root) as engine:
        kept = Conversation(parts, engine, Sampling(temperature=0))
        texts = []
        for i, turn in enumerate(turns):
            answer = kept.ask(turn)
            texts.append("".join(piece.text for piece in answer))
            kept.remember(answer)
            cached = answer.generation.timings.cached_tokens
            assert (cached > 10) == (i > 0)
    for i, text in enumerate(texts):
        with simulated_root(parts.file, made) as root, Engine(root) as engine:
            afresh = Conversation(parts, engine, Sampling(temperature=0))
            for before, said in zip(turns[:i], texts, strict=False):
                afresh.messages += [
                    {"role": "user", "content": before},
                    {"role": "assistant", "content": said},
                ]
            assert "".join(piece.text for piece in afresh.ask(turns[i])) == text


def test_progress_tells_what_is_done_so_far_of_all(parts):
    """As `convert` does: a bar takes both."""
    told: list[tuple[int, int]] = []
    with open_root(parts.file, Cluster(), lambda done, total: told.append((done, total))):
        pass
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}

"""Printing answers: streamed, as JSON, or turn by turn."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

import click

from pyllama_dist.chat import Answer, Conversation
from pyllama_dist.errors import UsageError
from pyllama_dist.text.thinking import Piece


@contextmanager
def _catch_interrupt() -> Iterator["_Flag"]:
    """The first ^C raises a flag, so that a step can end in order; the second one interrupts."""
    flag = _Flag()
    before = signal.signal(signal.SIGINT, flag.raise_)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


class _Flag:
    def __init__(self) -> None:
        self.raised = False

    def raise_(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGINT."""
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True

    def __call__(self) -> bool:
        return self.raised


def _stream(conversation: Conversation, text: str, steps: int) -> Answer:
    with _catch_interrupt() as interrupted:
        answer = conversation.ask(text, steps, interrupted)
        _print(answer)
    return answer


def _print(pieces: Iterable[Piece]) -> None:
    """Prints pieces as they come.

    What the model thinks is dimmed on a terminal. Elsewhere it goes to standard error: standard
    output has the answer alone.
    """
    aside = sys.stdout if sys.stdout.isatty() else sys.stderr
    thinking = False
    for piece in pieces:
        if piece.thought:
            thinking = True
            # Each piece alone, so that an interruption leaves no terminal dimmed.
            aside.write(click.style(piece.text, dim=True) if aside.isatty() else piece.text)
            aside.flush()
            continue
        if thinking:
            thinking = False
            aside.write("\n\n")
            aside.flush()
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    if thinking and aside is not sys.stdout:
        aside.write("\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


def _tell_if_raw(conversation: Conversation) -> None:
    if conversation.parts.template is None:
        click.echo(
            f"{conversation.parts.name} has no chat template: it continues each text as it is, "
            "and knows none that came before",
            err=True,
        )


def answer(conversation: Conversation, prompt: str, steps: int) -> None:
    """Prints one answer as it comes, and what it took on standard error."""
    _tell_if_raw(conversation)
    done = _stream(conversation, prompt, steps)
    click.echo(_summary(conversation, done), err=True)
    if done.generation.finish_reason == "interrupted":
        raise KeyboardInterrupt


def answer_json(conversation: Conversation, prompt: str, steps: int) -> None:
    """Prints one answer as a JSON object."""
    with _catch_interrupt() as interrupted:
        done = conversation.ask(prompt, steps, interrupted)
        for _ in done:
            pass
    timings, program = done.generation.timings, conversation.engine.root.node.program
    print(
        json.dumps(
            {
                "model": conversation.parts.name,
                "text": done.text,
                "reasoning": done.reply.reasoning,
                "tokens": done.tokens,
                "prompt_tokens": done.prompt,
                "finish_reason": done.generation.finish_reason,
                "nodes": program.n_nodes,
                "timings": {
                    "prefill_seconds": timings.prefill_seconds,
                    "decode_seconds": timings.decode_seconds,
                    **asdict(timings.spent),
                },
            }
        )
    )
    if done.generation.finish_reason == "interrupted":
        raise KeyboardInterrupt


def chat(conversation: Conversation, steps: int) -> None:
    """Question and answer until the input ends. `/clear` forgets, `/exit` leaves."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` its line editing)

        click.echo("^C stops an answer, /clear starts anew, /exit or ^D leaves", err=True)
    _tell_if_raw(conversation)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        match text:
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                conversation.clear()
                continue
        try:
            conversation.remember(_stream(conversation, text, steps))
        except UsageError as error:
            click.echo(f"error: {error}; /clear starts anew", err=True)


def _summary(conversation: Conversation, done: Answer) -> str:
    timings, program = done.generation.timings, conversation.engine.root.node.program
    computed = timings.prompt_tokens - timings.cached_tokens
    prefill = computed / timings.prefill_seconds if timings.prefill_seconds else 0
    # The first token comes out of the prompt's last step; each further one takes a step.
    steps = max(0, timings.generated_tokens - 1)
    decode = steps / timings.decode_seconds if timings.decode_seconds else 0
    return (
        f"[{program.n_nodes} nodes; prompt {computed} tokens, {prefill:.1f}/s; answer "
        f"{timings.generated_tokens} tokens, {decode:.1f}/s; computing "
        f"{timings.spent.compute_seconds:.2f} s, exchanging {timings.spent.sync_seconds:.2f} s, "
        f"{timings.spent.bytes_moved / 1000:.0f} kB]"
    )

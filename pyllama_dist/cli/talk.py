"""Printing answers: streamed, as JSON, or turn by turn."""

import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from types import FrameType
from typing import Self

import click

from pyllama_dist.cli.prompt import messages
from pyllama_dist.conversation import Answer, Conversation
from pyllama_dist.errors import UsageError
from pyllama_dist.text.events import Content, Event, Reasoning

_PATIENCE = 2.0  # seconds for a step to end after ^C


class _Interrupt:
    """The first ^C cancels an answer, so that a step can end in order; the second one interrupts.

    To be used as a context around the answer. Where nothing comes after the answer, a step that
    goes on for long is interrupted without a second ^C.
    """

    def __init__(self, *, last: bool = False) -> None:
        self._last, self._raised = last, False
        self._answer: Answer | None = None

    def cancels(self, answer: Answer) -> Answer:
        """Says which answer; one that was interrupted before it began ends at once."""
        self._answer = answer
        if self._raised:
            answer.generation.cancel()
        return answer

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGALRM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            raise KeyboardInterrupt
        self._raised = True
        if self._last:
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        if self._answer is not None:
            self._answer.generation.cancel()


def _stream(conversation: Conversation, text: str, steps: int, *, last: bool = False) -> Answer:
    with _Interrupt(last=last) as interrupt:
        answer = interrupt.cancels(conversation.ask(text, steps))
        _print(answer)
    return answer


def _print(events: Iterable[Event]) -> None:
    """Prints a reply as it comes.

    What the model thinks is dimmed on a terminal. Elsewhere it goes to standard error: standard
    output has the answer alone.
    """
    aside = sys.stdout if sys.stdout.isatty() else sys.stderr
    thinking = False
    for event in events:
        match event:
            case Reasoning(text):
                thinking = True
                # Each piece alone, so that an interruption leaves no terminal dimmed.
                aside.write(click.style(text, dim=True) if aside.isatty() else text)
                aside.flush()
            case Content(text):
                if thinking:
                    thinking = False
                    aside.write("\n\n")
                    aside.flush()
                sys.stdout.write(text)
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
    done = _stream(conversation, prompt, steps, last=True)
    click.echo(_summary(conversation, done), err=True)
    if done.generation.finish_reason == "interrupted":
        raise KeyboardInterrupt


def answer_json(conversation: Conversation, prompt: str, steps: int) -> None:
    """Prints one answer as a JSON object."""
    with _Interrupt(last=True) as interrupt:
        done = interrupt.cancels(conversation.ask(prompt, steps))
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
        click.echo("^C stops an answer, /clear starts anew, /exit or ^D leaves", err=True)
    _tell_if_raw(conversation)
    for text in messages():
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

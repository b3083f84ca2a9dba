"""`pyllama-dist root`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from pyllama_dist.cli.options import (
    BUILTIN,
    SpaceSeparated,
    cluster_options,
    make_cluster,
    option,
    progress_bar,
    text,
    tokenizer_option,
)
from pyllama_dist.errors import UsageError


@click.command("root", cls=SpaceSeparated)
@cluster_options
@tokenizer_option
@option("--prompt", type=text, help="Answer this and end. Without it: a chat.")
@option("--system", type=text, help="What the model is told before the conversation.")
@option(
    "--think/--no-think",
    default=None,
    help="Let the model reason before it answers, or not (enable_thinking of its chat template).",
)
@option(
    "--steps",
    type=click.IntRange(min=0),
    default=0,
    help="Positions in all, prompt included. [default: as long as the answer takes]",
)
@option("--temperature", type=click.FloatRange(min=0), help="0: always the most likely token.")
@option("--topp", type=click.FloatRange(0, 1), help="Draw from the most likely tokens only.")
@option("--seed", type=click.IntRange(min=0), help="Draw the same tokens again.")
@option("--json", "as_json", is_flag=True, help="With --prompt: print one JSON object.")
def command(
    model: Path | None,
    tokenizer: Path | None,
    prompt: str | None,
    system: str | None,
    think: bool | None,
    steps: int,
    temperature: float | None,
    topp: float | None,
    seed: int | None,
    as_json: bool,
    **cluster_settings: Any,
) -> None:
    """Ask a model: one answer with --prompt, else a chat that keeps its cache between turns.

    Sampling that is not given here follows the model's generation_config.json, and then
    distributed-llama: temperature 0.8, top-p 0.9.
    """
    from pyllama_dist.cli import talk
    from pyllama_dist.cluster import open_root
    from pyllama_dist.conversation import Conversation, open_model
    from pyllama_dist.engine.engine import Engine

    if as_json and prompt is None:
        raise UsageError("--json prints one answer; say what to answer with --prompt")
    if model is None:
        click.echo(
            "built-in demonstration model: it knows how this engine works, and sums up to 99; "
            "for a real one: --model DIR",
            err=True,
        )
    cluster = make_cluster(**cluster_settings)
    with ExitStack() as stack:
        parts = stack.enter_context(open_model(model or BUILTIN, tokenizer))
        with progress_bar("weights") as progress:
            root = stack.enter_context(open_root(parts.file, cluster, progress))
        sampling = parts.sampling(temperature, topp, seed)
        variables = {} if think is None else {"enable_thinking": think}
        engine = stack.enter_context(Engine(root))
        conversation = Conversation(parts, engine, sampling, system, variables)
        if prompt is None:
            talk.chat(conversation, steps)
        elif as_json:
            talk.answer_json(conversation, prompt, steps)
        else:
            talk.answer(conversation, prompt, steps)

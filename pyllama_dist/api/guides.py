"""What an answer must look like: from a request's fields to guides of its choices."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyllama_dist.api.errors import bad_request, of_engine
from pyllama_dist.api.prompts import Prompt
from pyllama_dist.api.requests import ChatRequest
from pyllama_dist.api.service import Service
from pyllama_dist.engine.constrained import ConstrainedSampler
from pyllama_dist.engine.sampler import F32, Sampler
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.grammar.grammars import Grammars
from pyllama_dist.text.grammar.matcher import Grammar
from pyllama_dist.text.grammar.thought import AfterThought, ThinkTags
from pyllama_dist.text.thinking import opens

Constrain = Callable[[Sampler], Callable[[F32], int]]


async def constraint_of(service: Service, body: ChatRequest, prompt: Prompt) -> Constrain | None:
    """What makes a choice's sampler obey the request; None if it is free.

    Raises:
        ApiError: a schema or a choice of tools cannot be obeyed.
    """
    choice = _choice(body, prompt)
    build = _format(body) or _calls(service, body, prompt, choice)
    if build is None and body.thinking_budget is None:
        return None
    try:
        # A schema may take a second to check, in which other answers go on.
        return await asyncio.to_thread(_constrain, service, build, prompt, body.thinking_budget)
    except PyllamaError as error:
        failed = of_engine(error)
        failed.param = "response_format" if _format(body) else "tools"
        raise failed from None


def _constrain(
    service: Service,
    build: Callable[[Grammars], Grammar] | None,
    prompt: Prompt,
    budget: int | None,
) -> Constrain:
    parts, _, _ = service.ready()
    grammar = build(service.grammars) if build is not None else None
    tags = ThinkTags.of(parts.tokenizer)
    opened = prompt.rendered is not None and opens(prompt.rendered)
    AfterThought(tags, grammar, opened=opened, budget=budget)  # what is wrong is found here

    def constrain(sampler: Sampler) -> Callable[[F32], int]:
        guide = AfterThought(tags, grammar, opened=opened, budget=budget)
        return ConstrainedSampler(sampler, guide)

    return constrain


def _format(body: ChatRequest) -> Callable[[Grammars], Grammar] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return partial(_schema, schema=wanted.schema)
    schema = wanted.json_schema.schema if wanted.json_schema else wanted.schema
    if not isinstance(schema, dict):
        where = "response_format.json_schema.schema"
        raise bad_request(f"{where} is no JSON schema", where)
    return partial(_schema, schema=schema)


def _schema(grammars: Grammars, schema: object) -> Grammar:
    return grammars.json_schema(schema)


def _calls(
    service: Service, body: ChatRequest, prompt: Prompt, choice: "tuple[str, str | None]"
) -> Callable[[Grammars], Grammar] | None:
    mode, only = choice
    strict = any(tool.function is not None and tool.function.strict for tool in body.tools or ())
    parallel = body.parallel_tool_calls is not False
    if not prompt.tools or (mode == "auto" and not strict and parallel):
        return None
    parts, _, _ = service.ready()
    name = parts.template.grammar_format if parts.template else None
    if name is None:
        if mode == "required":
            raise bad_request("this model cannot be made to call a tool", "tool_choice")
        return None
    tools: list[Mapping[str, Any]] = [] if mode == "none" else list(prompt.tools)
    return lambda grammars: grammars.tool_calls(
        tools, name, required=mode == "required", only=only, parallel=parallel
    )


def _choice(body: ChatRequest, prompt: Prompt) -> tuple[str, str | None]:
    """Whether a tool may or must be called, and which one alone."""
    names = {tool["function"]["name"] for tool in prompt.tools}
    match body.tool_choice:
        case None:
            return "auto", None
        case "none" | "auto" as mode:
            return mode, None
        case "required" if names:
            return "required", None
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return "required", name
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode}}:
            return str(mode), None
        case {"type": "function", "function": {"name": str(name)}}:
            raise bad_request(f"tool_choice: there is no tool {name[:64]!r}", "tool_choice")
        case "required":
            raise bad_request("tool_choice is required, and there are no tools", "tool_choice")
    raise bad_request(
        "tool_choice is none of none, auto, required and {type: function, function: {name}}",
        "tool_choice",
    )

"""What an answer must look like: from a request's fields to guides of its choices."""

import asyncio
from collections.abc import Callable

from pyllama_dist.api.errors import bad_request, of_engine
from pyllama_dist.api.prompts import Prompt
from pyllama_dist.api.requests import ChatRequest
from pyllama_dist.api.service import Service
from pyllama_dist.engine.constrained import ConstrainedSampler
from pyllama_dist.engine.sampler import F32, Sampler
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.grammar.grammars import Grammars
from pyllama_dist.text.grammar.matcher import Grammar
from pyllama_dist.text.grammar.thought import AfterThought
from pyllama_dist.text.thinking import opens

Constrain = Callable[[Sampler], Callable[[F32], int]]


async def constraint_of(service: Service, body: ChatRequest, prompt: Prompt) -> Constrain | None:
    """What makes a choice's sampler obey the request; None if it is free.

    Raises:
        ApiError: a schema or a choice of tools cannot be obeyed.
    """
    form = _format(body)
    build = form or _calls(service, body, prompt)
    budget = service.limits.thinking if body.thinking_budget is None else body.thinking_budget
    if build is None and budget is None:
        return None
    try:
        # A schema may take a second to check, in which other answers go on.
        return await asyncio.to_thread(_constrain, service, build, prompt, budget)
    except PyllamaError as error:
        failed = of_engine(error)
        failed.param = "response_format" if form else "tools"
        raise failed from None


def _constrain(
    service: Service,
    build: Callable[[Grammars], Grammar] | None,
    prompt: Prompt,
    budget: int | None,
) -> Constrain:
    model = service.ready()
    grammar = build(model.grammars) if build is not None else None
    tags = model.think_tags
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
        return lambda grammars: grammars.json_schema(wanted.schema)
    schema = wanted.json_schema.schema if wanted.json_schema else wanted.schema
    if not isinstance(schema, dict):
        where = "response_format.json_schema.schema"
        raise bad_request(f"{where} is no JSON schema", where)
    return lambda grammars: grammars.json_schema(schema)


def _calls(
    service: Service, body: ChatRequest, prompt: Prompt
) -> Callable[[Grammars], Grammar] | None:
    mode, allowed = _choice(body, prompt)
    if not prompt.tools:
        return None
    strict = any(tool.function is not None and tool.function.strict for tool in body.tools or ())
    parallel = body.parallel_tool_calls is not False
    tools = [tool for tool in prompt.tools if tool["function"]["name"] in allowed]
    if tools == prompt.tools and mode == "auto" and not strict:
        return None  # of several calls where one is allowed, the answer ends after the first
    template = service.ready().parts.template
    if template is None or template.grammar_format is None:
        if mode == "required":
            raise bad_request("this model cannot be made to call a tool", "tool_choice")
        return None
    name, required = template.grammar_format, mode == "required"
    return lambda grammars: grammars.tool_calls(tools, name, required=required, parallel=parallel)


def _choice(body: ChatRequest, prompt: Prompt) -> tuple[str, frozenset[str]]:
    """Whether a tool may or must be called, and which ones."""
    known = frozenset(tool["function"]["name"] for tool in prompt.tools)
    match body.tool_choice:
        case None | "auto":
            mode, names = "auto", known
        case "none":
            mode, names = "none", frozenset[str]()
        case "required":
            mode, names = "required", known
        case {"type": "function", "function": {"name": str(name)}}:
            mode, names = "required", frozenset({name})
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as how, "tools": [*tools]},
        }:
            mode, names = str(how), frozenset(map(_name, tools))
        case _:
            raise bad_request(
                "tool_choice is none of none, auto, required, {type: function, function: {name}} "
                "and {type: allowed_tools, allowed_tools: {mode, tools}}",
                "tool_choice",
            )
    if unknown := sorted(names - known):
        raise bad_request(f"tool_choice: there is no tool {unknown[0][:64]!r}", "tool_choice")
    if mode == "required" and not names:
        raise bad_request("tool_choice asks for a call, and there are no tools", "tool_choice")
    return mode, names


def _name(tool: object) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise bad_request("tool_choice: a tool is {type: function, function: {name}}", "tool_choice")

"""/v1/responses: how an answer is told as a response object, whole or as the events of a stream."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec

from pyllama_dist.api.answer import Answer, Ended, Item, Piece, Ping
from pyllama_dist.api.chat import begin_answer, logprobs_json
from pyllama_dist.api.dialect import Dialect, Json, named_event
from pyllama_dist.api.errors import ApiError
from pyllama_dist.api.responses.conversation import chat_request, functions
from pyllama_dist.api.responses.output import Output, event
from pyllama_dist.api.responses.requests import PlainFormat, ResponsesRequest
from pyllama_dist.api.service import Service
from pyllama_dist.conversation import ModelParts

_PARAMS = {"messages": "input", "response_format": "text.format"}  # of a chat: what it is here


@dataclass
class Response:
    """A response that is made."""

    fixed: Json  # what is true of it from beginning to end
    answer: Answer
    output: Output

    async def whole(self) -> Json:
        """The response in one piece.

        Raises:
            ApiError: the generation failed.
        """
        async for item in self.answer.items():
            for _ in self._events(item):
                pass
        return self._ended()

    async def chunks(self) -> AsyncIterator[Json | None]:
        """Events. A generation that fails is told as a response that has failed."""
        numbers = count()

        def numbered(told: Json) -> Json:
            return {**told, "sequence_number": next(numbers)}

        yield numbered(event("created", response=self._json("in_progress")))
        yield numbered(self._in_progress())
        try:
            async for item in self.answer.items():
                for told in self._events(item):
                    yield numbered(told)
            last = self._ended()
        except ApiError as error:
            # OpenAI names a fixed set of errors here, and clients check that it is one of them.
            last = self._json("failed", error={"code": "server_error", "message": error.message})
        yield numbered(event(last["status"], response=last))

    def _events(self, item: Item) -> Sequence[Json]:
        match item:
            case Piece():
                return list(self.output.add(item))
            case Ended():
                return list(self.output.end(item))
            case Ping():
                # An event, since Codex gives up after five minutes in which only comments come.
                return [self._in_progress()]
        return ()

    def _in_progress(self) -> Json:
        return event("in_progress", response=self._json("in_progress"))

    def _ended(self) -> Json:
        (choice,) = self.answer.choices
        if choice.reason == "length":
            return self._json("incomplete", incomplete_details={"reason": "max_output_tokens"})
        return self._json("completed", completed_at=int(time.time()))

    def _json(self, status: str, **more: object) -> Json:
        told = {**self.fixed, "status": status, "output": self.output.json(), **more}
        return told if status == "in_progress" else {**told, "usage": self._usage()}

    def _usage(self) -> Json:
        usage: Any = self.answer.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }


async def begin(service: Service, body: ResponsesRequest, key: str, held: ExitStack) -> Response:
    """Begins to make a response; `held` ends that.

    Raises:
        ApiError: it cannot be.
    """
    model = service.check_model(body.model)
    chat = chat_request(body)
    try:
        answer = await begin_answer(service, chat, key, held)
    except ApiError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise
    parts = service.ready().parts
    output = Output(lambda found: logprobs_json(parts.tokenizer, found, chat.top_logprobs or 0))
    return Response(_fixed(parts, model, body), answer, output)


def _fixed(parts: ModelParts, model: str, body: ResponsesRequest) -> Json:
    sampling = parts.sampling(body.temperature, body.top_p, None)
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "tools": [
            {"type": "function", **msgspec.to_builtins(function)} for function in functions(body)
        ],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": sampling.temperature,
        "top_p": sampling.topp,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": (body.text and body.text.format) or PlainFormat()},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "metadata": body.metadata or {},
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "user": body.user,
        "service_tier": "default",
        "truncation": "disabled",
        "store": False,
        "background": False,
        "previous_response_id": None,
        "usage": None,
    }


DIALECT = Dialect(ResponsesRequest, lambda body: 1, begin, event=named_event, last=b"")

"""/v1/completions: a text goes on, without a chat template."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from pyllama_dist.api.answer import Answer, Ended, Head, Piece, requests_of
from pyllama_dist.api.dialect import Dialect, Json
from pyllama_dist.api.errors import bad_request, of_engine
from pyllama_dist.api.prompts import stop_strings
from pyllama_dist.api.requests import CompletionRequest
from pyllama_dist.api.service import Service
from pyllama_dist.engine.sampler import F32, Sampler, Sampling, TokenLogprobs
from pyllama_dist.engine.sequence import Request
from pyllama_dist.errors import PyllamaError
from pyllama_dist.text.events import Content
from pyllama_dist.text.reply import ReplyParser
from pyllama_dist.text.tokenizer import Tokenizer

_PROMPTS = 64
_INFIX = ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")  # as GLM-4 names them

Scored = tuple[int, TokenLogprobs | None]  # a token, and its logprobs if they are known


@dataclass(frozen=True)
class Text:
    """One prompt and what it becomes."""

    prompt: str  # empty unless it is echoed
    tokens: Sequence[int]
    answer: Answer | None  # None if nothing is generated
    echoed: Sequence[Scored] = ()  # of the prompt, if asked for


@dataclass
class Completion:
    """Texts that go on."""

    body: CompletionRequest
    texts: Sequence[Text]
    head: Head
    tokenizer: Tokenizer

    async def whole(self) -> Json:
        """All texts in one piece.

        Raises:
            ApiError: a generation failed.
        """
        found = await asyncio.gather(*map(self._choices, self.texts))
        choices = [choice for choices in found for choice in choices]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return {**self.head.fields("text_completion"), "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[Json | None]:
        """The text piece by piece; None if nothing has happened for some time.

        Raises:
            ApiError: the generation failed.
        """
        (text,) = self.texts
        options = self.body.stream_options
        usage = options is not None and bool(options.include_usage)

        def chunk(choices: list[Json], **more: object) -> Json:
            empty: Json = {"usage": None} if usage else {}
            return {**self.head.fields("text_completion"), "choices": choices, **empty, **more}

        if self.body.echo:
            logprobs = self._logprobs(text.echoed, 0)
            yield chunk([_choice(index, text.prompt, logprobs, None) for index in self._indices])
        offsets = [len(text.prompt) if self.body.echo else 0] * len(self._indices)
        if text.answer is not None:
            async for item in text.answer.items():
                match item:
                    case Piece(index, events, found):
                        piece = "".join(e.text for e in events if isinstance(e, Content))
                        logprobs = self._logprobs(_scored(found), offsets[index])
                        offsets[index] += len(piece)
                        if piece:
                            yield chunk([_choice(index, piece, logprobs, None)])
                    case Ended(index, reason):
                        timings = text.answer.timings()
                        yield chunk([_choice(index, "", None, reason)], timings=timings)
                    case _:
                        yield None
        else:
            yield chunk([_choice(index, "", None, "length") for index in self._indices])
        if usage:
            yield chunk([], usage=self._usage())

    @property
    def _indices(self) -> range:
        return range(self.body.n or 1)

    async def _choices(self, text: Text) -> list[Json]:
        count = self.body.n or 1
        said, logprobs = [""] * count, [list(text.echoed) for _ in range(count)]
        reasons = ["length"] * count
        if text.answer is not None:
            async for item in text.answer.items():
                if isinstance(item, Piece):
                    said[item.index] += "".join(
                        event.text for event in item.events if isinstance(event, Content)
                    )
                    logprobs[item.index] += _scored(item.logprobs)
                elif isinstance(item, Ended):
                    reasons[item.index] = item.reason
        begin = text.prompt if self.body.echo else ""
        return [
            _choice(index, begin + said[index], self._logprobs(logprobs[index], 0), reasons[index])
            for index in range(count)
        ]

    def _logprobs(self, found: Sequence[Scored], offset: int) -> Json | None:
        """Logprobs of tokens, of which the first stands at this character of the text."""
        most = self.body.logprobs
        if most is None:
            return None
        tokens = [self._text(token) for token, _ in found]
        ends = accumulate(map(len, tokens), initial=offset)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob if one else None for _, one in found],
            "top_logprobs": [
                {self._text(id): value for id, value in one.top[:most]} if one else None
                for _, one in found
            ],
            "text_offset": list(ends)[:-1],
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _usage(self) -> Json:
        prompt = sum(len(text.tokens) for text in self.texts)
        answers = [text.answer for text in self.texts if text.answer is not None]
        generated = sum(answer.generated_tokens for answer in answers)
        cached = sum(answer.cached_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _scored(found: Sequence[TokenLogprobs]) -> list[Scored]:
    return [(one.token, one) for one in found]


def _choice(index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def count_of(body: CompletionRequest) -> int:
    """Sequences that a request asks for."""
    prompt = body.prompt
    several = isinstance(prompt, list) and not all(type(one) is int for one in prompt)
    return (len(prompt) if isinstance(prompt, list) and several else 1) * (body.n or 1)


async def begin(service: Service, body: CompletionRequest, key: str, held: ExitStack) -> Completion:
    """Begins to continue texts; `held` ends that.

    Raises:
        ApiError: they cannot be.
    """
    tokenizer = service.ready().parts.tokenizer
    head = Head.of(service, "cmpl", body.model)
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0; ask for one at least, or for echo", "max_tokens")
    prompts = await asyncio.to_thread(_prompts, tokenizer, body)
    if body.stream and len(prompts) > 1:
        raise bad_request("a stream continues one prompt; send one, or stream: false", "prompt")
    texts = []
    for prompt in prompts:
        echoed: Sequence[Scored] = ()
        if body.echo and body.logprobs is not None:
            echoed = await _echoed(service, prompt, body.logprobs, key)
        answer = None
        if body.max_tokens != 0:
            requests = requests_of(
                service,
                body,
                prompt,
                body.max_tokens or 16,  # OpenAI's, where none is given
                param="prompt",
                top_logprobs=body.logprobs,
                key=key,
            )
            stops = stop_strings(body.stop)
            answer = Answer(service, prompt, requests, partial(_parser, tokenizer, stops))
            held.callback(answer.close)
        text = tokenizer.decode(prompt) if body.echo else ""
        texts.append(Text(text, prompt, answer, echoed))
    return Completion(body, texts, head, tokenizer)


async def _echoed(service: Service, prompt: Sequence[int], count: int, key: str) -> list[Scored]:
    """Logprobs of a prompt's tokens: the first has nothing before it."""
    sampler = Sampler(Sampling(), service.ready().parts.tokenizer.vocab_size)
    find = sampler.logprobs(max(1, count))
    (stream,) = service.submit([Request(prompt, _never, prompt_logits=True, group=key)])
    found: list[Scored] = [(prompt[0], None)]
    rows: list[F32] = stream.prompt_logits
    async for _ in service.tokens(stream):
        while rows:
            row, place = rows.pop(0), len(found)
            if place < len(prompt):
                found.append((prompt[place], find(row, prompt[place])))
    return found


def _parser(tokenizer: Tokenizer, stops: Sequence[str]) -> ReplyParser:
    return ReplyParser(None, tokenizer.added, stops=stops)


def _never(logits: F32) -> int:
    raise ValueError("no token is asked for")


def _prompts(tokenizer: Tokenizer, body: CompletionRequest) -> list[list[int]]:
    try:
        match body.prompt:
            case None | []:
                prompts = [list(tokenizer.prefix)]
            case str(text):
                prompts = [_with_suffix(tokenizer, text, body.suffix)]
            case [int(), *_] as ids:
                prompts = [_ids(ids, tokenizer, "prompt")]
            case [*several]:
                if len(several) > _PROMPTS:
                    raise bad_request(f"{len(several)} prompts, {_PROMPTS} at most", "prompt")
                prompts = [
                    _with_suffix(tokenizer, one, body.suffix)
                    if isinstance(one, str)
                    else _ids(one, tokenizer, f"prompt[{number}]")
                    for number, one in enumerate(several)
                ]
    except PyllamaError as error:
        raise of_engine(error) from None
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise bad_request(f"prompt[{number}] is empty; write something", "prompt")
    return prompts


def _with_suffix(tokenizer: Tokenizer, text: str, suffix: str | None) -> list[int]:
    if suffix is None:
        return tokenizer.encode_raw(text)
    tags = [tokenizer.added.get(tag) for tag in _INFIX]
    if None in tags:
        raise bad_request("this model has no tokens to fill in between two texts", "suffix")
    first, last, middle = (tag.id for tag in tags if tag is not None)
    before, after = tokenizer.encode(text), tokenizer.encode(suffix)
    return [*tokenizer.prefix, first, *before, last, *after, middle]


def _ids(value: object, tokenizer: Tokenizer, place: str) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise bad_request(f"{place} is neither a text nor a list of token ids", place)
    wrong = [id for id in value if not 0 <= id < tokenizer.vocab_size]
    if wrong:
        raise bad_request(
            f"{place}: {wrong[0]} is no token id from 0 to {tokenizer.vocab_size - 1}", place
        )
    return value


DIALECT = Dialect(CompletionRequest, count_of, begin)

"""Asks a server as several users do at once, and notes when what came.

Nothing is read while it comes: HTTP and JSON are taken apart afterwards, so that the one who asks
takes next to none of the cores that the server computes with.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import numpy as np

from pyllama_dist.errors import NodeError

Json = dict[str, Any]
_END = b"\r\n\r\n"  # of an answer's head
_WAIT_SECONDS = 240.0  # for all answers


@dataclass(frozen=True)
class Ask:
    """What one user asks for."""

    prompt: Sequence[int]
    tokens: int  # of the answer
    at: float = 0.0  # seconds after the first


@dataclass(frozen=True)
class Heard:
    """When one user heard what; seconds since all began."""

    sent: float
    pieces: Sequence[float]  # of the answer: a token each, unless the reader was slow
    tokens: int
    cached_tokens: int

    @property
    def ttft(self) -> float:
        """Seconds from the request to the first token."""
        return self.pieces[0] - self.sent

    @property
    def tpot(self) -> float:
        """Seconds of each token but the first."""
        return (self.pieces[-1] - self.pieces[0]) / max(1, self.tokens - 1)

    def gaps(self, first: float = 0.0, last: float = np.inf) -> list[float]:
        """Seconds between two pieces, of which the second came within a span of time."""
        return [
            float(gap)
            for gap, at in zip(np.diff(self.pieces), self.pieces[1:], strict=True)
            if first <= at <= last
        ]


def throughput(heard: Sequence[Heard]) -> Json:
    """How much came from the first request to the last token, under vLLM's names."""
    seconds = max(one.pieces[-1] for one in heard) - min(one.sent for one in heard)
    return {
        "duration": seconds,
        "request_throughput": len(heard) / seconds,
        "output_throughput": sum(one.tokens for one in heard) / seconds,
    }


def latencies(heard: Sequence[Heard]) -> Json:
    """Times to the first token, of each further one, and between two, under vLLM's names."""
    gaps = [gap for one in heard for gap in one.gaps()]
    return (
        milliseconds("ttft", [one.ttft for one in heard])
        | milliseconds("tpot", [one.tpot for one in heard])
        | milliseconds("itl", gaps)
    )


def milliseconds(name: str, seconds: Sequence[float]) -> Json:
    """The mean and percentiles of some times, NaN if there are none: all came in one piece."""
    found = 1e3 * np.array(seconds or [np.nan])
    percentiles = {f"p{p}_{name}_ms": float(np.percentile(found, p)) for p in (50, 90, 99)}
    return {f"mean_{name}_ms": float(found.mean()), **percentiles}


class _Client(asyncio.Protocol):
    """One connection: what came, and when; `answered` and `over` tell of the first and the last."""

    def __init__(self) -> None:
        self.came: list[tuple[float, bytes]] = []
        loop = asyncio.get_running_loop()
        self.answered, self.over = loop.create_future(), loop.create_future()

    def data_received(self, data: bytes) -> None:
        self.came.append((time.perf_counter(), data))
        if data.endswith(_END) and not self.answered.done():
            self.answered.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.answered, self.over):
            if not future.done():
                future.set_result(None)


def ask(url: str, asks: Sequence[Ask], bias: Mapping[str, float]) -> list[Heard]:
    """Asks /v1/completions for streams, each on a connection that has been used before.

    Args:
        url: of the server.
        asks: what for, and when.
        bias: of tokens that must not come, as `logit_bias`.

    Raises:
        NodeError: the server refuses, or gives fewer tokens.
    """
    return asyncio.run(_ask(url, asks, bias))


async def _ask(url: str, asks: Sequence[Ask], bias: Mapping[str, float]) -> list[Heard]:
    loop, address = asyncio.get_running_loop(), urlsplit(url)
    clients, requests = [], [_request(address.netloc, one, bias) for one in asks]
    for _ in asks:
        transport, client = await loop.create_connection(_Client, address.hostname, address.port)
        transport.write(f"HEAD /health HTTP/1.1\r\nhost: {address.netloc}\r\n\r\n".encode())
        await client.answered
        client.came.clear()
        clients.append((transport, client))
    began = time.perf_counter()

    async def send(to: tuple[asyncio.WriteTransport, _Client], one: Ask, request: bytes) -> float:
        transport, client = to
        await asyncio.sleep(began + one.at - time.perf_counter())
        sent = time.perf_counter()
        transport.write(request)
        async with asyncio.timeout(_WAIT_SECONDS):
            await client.over
        return sent - began

    sent = await asyncio.gather(*map(send, clients, asks, requests))
    return [
        _heard(began, at, client.came, one.tokens)
        for at, (_, client), one in zip(sent, clients, asks, strict=True)
    ]


def _request(host: str, one: Ask, bias: Mapping[str, float]) -> bytes:
    body = json.dumps(
        {
            "prompt": list(one.prompt),
            "max_tokens": one.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": bias,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _heard(began: float, sent: float, came: Sequence[tuple[float, bytes]], tokens: int) -> Heard:
    """Takes a stream apart."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    pieces, text, usage, status = [], b"", Json(), 0
    for when, data in came:
        connection.receive_data(data)
        while not isinstance(event := connection.next_event(), type(h11.NEED_DATA)):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                text += bytes(event.data)
            else:
                break
        *events, text = text.split(b"\n\n")
        for chunk in [json.loads(e[6:]) for e in events if e.startswith(b"data: {")]:
            if chunk.get("choices") and chunk["choices"][0]["text"]:
                pieces.append(when - began)
            usage = chunk.get("usage") or usage
    given = usage.get("completion_tokens", 0)
    if given != tokens or not pieces:
        raise NodeError(f"the server gave {given} tokens of {tokens}: {status} {text.decode()}")
    return Heard(sent, pieces, given, usage["prompt_tokens_details"]["cached_tokens"])

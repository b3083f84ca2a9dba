"""Clients that come and leave at random moments, on every route that gives text.

    python -m tests.api_storm --clients 1000 --seed 1
    python -m tests.api_storm --clients 1000 --seed 1 --stay --at-once 10

When all have left, the server must hold nothing for anyone, and take no more memory, descriptors,
threads and processes than when a tenth of them had. `--stay`: each reads its whole answer (B4).
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import httpx

from pyllama_dist.api.service import Limits
from tests.api_process import Taken, grown, real, scripted

MOMENTS = ("header", "body", "sent", "waiting", "begun", "end")
AT_ONCE = 40
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: the peer gets a reset in place of an end


@dataclass(frozen=True)
class Leaving:
    """A client.

    Attributes:
        route: that it asks.
        stream: whether it wants a stream.
        moment: after which it leaves: within the header, within the body, as soon as all is sent,
            some time later, when the answer has begun, or when it is there.
        share: of header or body that is sent.
        seconds: that it waits.
        words: of its prompt.
        tokens: that it wants.
        reset: whether it leaves without an end.
    """

    route: str
    stream: bool
    moment: str
    share: float
    seconds: float
    words: int
    tokens: int
    reset: bool


def draw(seed: int, routes: Sequence[str], moments: Sequence[str] = MOMENTS) -> Leaving:
    """The client of a seed."""
    rng = random.Random(seed)
    return Leaving(
        rng.choice(routes),
        rng.random() < 0.5,
        rng.choice(moments),
        rng.random(),
        rng.uniform(0.0, 0.5),
        rng.randint(1, 80),
        rng.randint(1, 30),
        rng.random() < 0.3,
    )


def routes_of(url: str) -> list[str]:
    """Those that give text."""
    paths = httpx.get(f"{url}/openapi.json", trust_env=False).json()["paths"]
    answers = {path: item["post"]["responses"] for path, item in paths.items() if "post" in item}
    return [path for path, one in answers.items() if "text/event-stream" in one["200"]["content"]]


async def storm(
    url: str, clients: Sequence[Leaving], *, first: int = 0, at_once: int = AT_ONCE
) -> Counter[str]:
    """Lets clients come and leave; what each has met, by moment. `first` makes prompts differ."""
    places, met = asyncio.Semaphore(at_once), Counter[str]()
    async with httpx.AsyncClient(base_url=url, trust_env=False) as asking:
        model = (await asking.get("/v1/models")).json()["data"][0]["id"]

    async def one(number: int, client: Leaving) -> None:
        async with places:
            met[
                f"{client.moment}: {await _leave(url, client, _body(f'{number} ', model, client))}"
            ] += 1

    await asyncio.gather(*(one(first + number, client) for number, client in enumerate(clients)))
    return met


async def _leave(url: str, client: Leaving, body: bytes) -> str:
    """One client's stay; the status line that it got, if it read so far."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = (
            f"POST {client.route} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        if client.moment == "header":
            writer.write(head[: int(client.share * len(head))])
        elif client.moment == "body":
            writer.write(head + body[: int(client.share * len(body))])
        else:
            writer.write(head + body)
        await writer.drain()
        if client.moment in ("begun", "end"):
            status = (await asyncio.wait_for(reader.readline(), 60)).split()[1].decode()
            if client.moment == "end":
                await asyncio.wait_for(reader.read(), 60)
            return status
        if client.moment != "sent":
            await asyncio.sleep(client.seconds)
        return "left"
    finally:
        if client.reset:
            own = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def _body(begin: str, model: str, client: Leaving) -> bytes:
    """A request in the dialect of its route."""
    text = begin + "word " * client.words
    others = {"/v1/completions": {"prompt": text}, "/v1/responses": {"input": text}}
    asked = others.get(client.route, {"messages": [{"role": "user", "content": text}]})
    most = {"max_tokens": client.tokens, "max_output_tokens": client.tokens}
    return json.dumps({**asked, **most, "stream": client.stream, "model": model}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="of the first client")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--stay", action="store_true", help="each reads its whole answer")
    parser.add_argument("--real", action="store_true", help="a model on three nodes answers")
    chosen = parser.parse_args()
    moments = ["end"] if chosen.stay else MOMENTS
    met, warm = Counter[str](), max(1, chosen.clients // 10)
    queue = chosen.clients  # nobody is refused: who has left may be there for a moment
    if chosen.real:
        started = real("--max-queue", str(queue))
    else:
        started = scripted(Limits(4, queue), pause=0.005)
    with started as server:
        routes = routes_of(server.url)
        taken = []
        for begin, end in ((0, warm), (warm, chosen.clients)):
            clients = [draw(chosen.seed + one, routes, moments) for one in range(begin, end)]
            met += asyncio.run(storm(server.url, clients, first=begin, at_once=chosen.at_once))
            server.wait_empty()
            taken.append(Taken.by(server.pid))
    before, after = taken
    failed = [what for what in met if what.partition(": ")[2] not in ("200", "left")]
    print(
        json.dumps(
            {
                "clients": sum(met.values()),
                "met": met,
                "failed": failed,
                "grown": grown(before, after),
                "before": asdict(before),
                "after": asdict(after),
            },
            indent=1,
            sort_keys=True,
        )
    )
    sys.exit(bool(failed or grown(before, after)))


if __name__ == "__main__":
    main()

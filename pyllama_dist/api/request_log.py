"""One line in the log for each request, when it is over; it has neither prompt nor key."""

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyllama_dist.api.metrics import Metrics

log = logging.getLogger(__name__)

_PATH = 256  # characters of a path that is no route
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # others are counted as one


@dataclass
class Spent:
    """What a request's answers took; they add to it when they end."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} tokens read, {self.cached_tokens} of them cached, "
            f"{self.completion_tokens} generated, {self.finish}"
        )


_spent: ContextVar[Spent | None] = ContextVar("spent", default=None)


def spend(prompt_tokens: int, cached_tokens: int, completion_tokens: int, finish: str) -> None:
    """Adds an answer to what the request that is being served has taken."""
    if (spent := _spent.get()) is not None:
        spent.prompt_tokens += prompt_tokens
        spent.cached_tokens += cached_tokens
        spent.completion_tokens += completion_tokens
        spent.finish = finish


class RequestLog:
    """An application whose requests are logged and counted by their routes."""

    def __init__(self, app: ASGIApp, routes: Mapping[Any, str], metrics: Metrics) -> None:
        """`routes`: the path of each endpoint, as it stands in the table of routes."""
        self._app, self._routes, self._metrics = app, routes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, spent = time.monotonic(), Spent()
        status, id_ = 500, ""

        async def noting(message: Message) -> None:
            nonlocal status, id_
            if message["type"] == "http.response.start":
                status = message["status"]
                id_ = dict(message.get("headers", ())).get(b"x-request-id", b"").decode()
            await send(message)

        token = _spent.set(spent)
        try:
            await self._app(scope, receive, noting)
        finally:
            _spent.reset(token)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = self._routes.get(scope.get("endpoint"))
            self._metrics.http(route or "none", method, status)
            seconds = time.monotonic() - started
            told = f"{method} {route or repr(scope['path'][:_PATH])} {status} in {seconds:.3f} s"
            fields: dict[str, object] = {
                "method": method,
                "path": route or scope["path"][:_PATH],
                "status": status,
                "seconds": round(seconds, 6),
                "request_id": id_,
            }
            if spent.finish:
                told, fields = f"{told}: {spent}", fields | asdict(spent)
            log.info("%s, request %s", told, id_, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Each line of the log as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time_ = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{time_}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()

"""Who may ask: hosts, origins, keys; and what no request may look like.

Pure ASGI. Decisions are made from the path of the connection's scope, which is what is routed:
`request.url` is made of the Host header, which the client writes (CVE-2026-48746 of vLLM).
"""

import hmac
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyllama_dist.api.errors import ApiError, bad_request

_OPEN = frozenset({"/", "/health", "/v1/health"})  # without a key, and the page's files
_PAGE = "/page/"
_ID = re.compile(rb"[!-~]{1,64}")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: one of them must come with each request; none: all may ask.
        hosts: names of this machine in a Host header, besides localhost; addresses always may be.
        origins: pages of other sites that may ask.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


class Gate:
    """An application behind its checks. Adds the request's id to every answer."""

    def __init__(
        self, app: ASGIApp, access: Access, error_object: Callable[[Scope, ApiError], Any]
    ) -> None:
        """A gate before an application; `error_object` tells who is refused why."""
        self._app, self._access, self._error_object = app, access, error_object
        self._keys = [key.encode() for key in access.keys]
        self._hosts = {"localhost", *(host.lower() for host in access.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = _Headers(scope["headers"])
        given = headers.one(b"x-request-id")
        id_ = given if given and _ID.fullmatch(given) else secrets.token_hex(8).encode()
        origin = headers.one(b"origin")
        shared = origin is not None and origin.decode("latin-1") in self._access.origins
        extra = [(b"x-request-id", id_), (b"request-id", id_)]  # OpenAI's name, Anthropic's
        extra += [(b"x-content-type-options", b"nosniff")]
        if shared and origin is not None:
            extra += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        scope.setdefault("state", {})
        scope["state"] |= {"request_id": id_.decode(), "client": "", "shared": shared}
        try:
            self._check(scope, headers, shared)
        except ApiError as error:
            await _answer(error, self._error_object(scope, error), send_more)
            return
        if scope["method"] == "OPTIONS" and shared:
            wanted = headers.one(b"access-control-request-headers") or b""  # clients have their own
            extra += [
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-allow-headers", wanted),
                (b"access-control-max-age", b"600"),
            ]
            await send_more({"type": "http.response.start", "status": 204, "headers": []})
            await send_more({"type": "http.response.body"})
            return
        await self._app(scope, receive, send_more)

    def _check(self, scope: Scope, headers: "_Headers", shared: bool) -> None:
        if headers.all(b"content-length") and headers.all(b"transfer-encoding"):
            raise bad_request("a body has a content-length or a transfer-encoding, not both")
        host = headers.one(b"host")
        if host is None or not self._is_ours(host.decode("latin-1")):
            raise ApiError(
                403,
                "the Host header names another machine; add it with --allowed-host",
                "permission_error",
            )
        origin = headers.one(b"origin")
        if origin is not None and not shared and not _same(origin, host):
            raise ApiError(
                403,
                "a page of another site may not ask; allow it with --cors-origin",
                "permission_error",
            )
        path = scope["path"]
        if not self._keys or (scope["method"] == "OPTIONS" and shared):
            return
        key = self._key(headers)
        if key is not None:
            scope["state"]["client"] = key
        elif path not in _OPEN and not path.startswith(_PAGE):
            raise ApiError(
                401,
                "no valid API key; send it as: Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _key(self, headers: "_Headers") -> str | None:
        """Which of the keys was sent; None if none or several were."""
        sent = headers.all(b"authorization")
        scheme, _, given = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            alone = headers.all(b"x-api-key")
            given = alone[0] if len(alone) == 1 and not sent else b""
        found = [key for key in self._keys if hmac.compare_digest(key, given.strip())]
        return str(self._keys.index(found[0])) if found else None

    def _is_ours(self, host: str) -> bool:
        name = _name(host)
        if name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True  # a page of another site may point its name here, but never an address


class _Headers:
    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._headers = list(headers)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self._headers if key == name]

    def one(self, name: bytes) -> bytes | None:
        found = self.all(name)
        return found[0] if len(found) == 1 else None


def _name(host: str) -> str:
    """The name of `name:port`, `[v6]:port` or `name`."""
    found = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:/?#@\s]+)(?::\d+)?", host)
    return (found[1] or found[2]).lower() if found else ""


def _same(origin: bytes, host: bytes) -> bool:
    """Whether a page that this server gave asks."""
    return origin.partition(b"://")[2] == host


async def _answer(error: ApiError, told: Any, send: Send) -> None:
    body = msgspec.json.encode(told)
    headers = [(b"content-type", b"application/json")]
    headers += [(key.encode(), value.encode()) for key, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

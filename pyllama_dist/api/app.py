"""Routes: which path is answered by what, and how answers travel."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from pyllama_dist.api import chat, completions, facts, page
from pyllama_dist.api.anthropic import messages
from pyllama_dist.api.anthropic.requests import CountTokensRequest
from pyllama_dist.api.dialect import Dialect, Json, openai_error
from pyllama_dist.api.errors import ApiError, bad_request, of_engine
from pyllama_dist.api.events import EventStream
from pyllama_dist.api.leaving import unless_gone
from pyllama_dist.api.openapi import describe
from pyllama_dist.api.request_log import RequestLog
from pyllama_dist.api.requests import (
    BODY_BYTES,
    DetokenizeRequest,
    TokenizeRequest,
    decode,
)
from pyllama_dist.api.responses import response
from pyllama_dist.api.security import Access, Gate
from pyllama_dist.api.service import Service

_BODY_SECONDS = 30.0  # for a body to arrive
_T = TypeVar("_T")
DIALECTS: Mapping[str, Dialect[Any]] = {
    "/v1/chat/completions": chat.DIALECT,
    "/v1/completions": completions.DIALECT,
    "/v1/messages": messages.DIALECT,
    "/v1/responses": response.DIALECT,
}


def make_app(service: Service, access: Access) -> ASGIApp:
    """The server's application."""
    endpoints: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
        **{path: ("POST", _answered(dialect)) for path, dialect in DIALECTS.items()},
        "/v1/messages/count_tokens": (
            "POST",
            _with_body(CountTokensRequest, messages.count_tokens),
        ),
        "/v1/responses/{id:path}": ("GET DELETE", _no_kept_response),
        "/v1/embeddings": ("POST", _no_embeddings),
        "/v1/models": ("GET", _plain(facts.models)),
        "/v1/models/{name:path}": ("GET", _model),
        "/tokenize": ("POST", _with_body(TokenizeRequest, facts.tokenize)),
        "/detokenize": ("POST", _with_body(DetokenizeRequest, facts.detokenize)),
        "/health": ("GET", _plain(facts.health)),
        "/v1/health": ("GET", _plain(facts.health)),
        "/nodes": ("GET", _nodes),
        "/metrics": ("GET", _metrics),
        "/openapi.json": ("GET", _openapi),
        "/": ("GET", _page),
        "/page/{name}": ("GET", _page),
    }
    app = Starlette(
        routes=[
            Route(path, endpoint, methods=methods.split())
            for path, (methods, endpoint) in endpoints.items()
        ],
        exception_handlers={
            HTTPException: _of_http,
            ApiError: _of_api,
            RecursionError: _of_depth,
            Exception: _of_ours,
        },
    )
    app.state.service = service
    app.router.redirect_slashes = False
    paths = {endpoint: path for path, (_, endpoint) in endpoints.items()}
    return RequestLog(Gate(app, access, error_object), paths, service.metrics)


def error_object(scope: Scope, error: ApiError) -> Json:
    """An error as the API tells it that a path, and all paths below it, belong to."""
    path = scope["path"] + "/"
    tells = (dialect.error for base, dialect in DIALECTS.items() if path.startswith(base + "/"))
    return next(tells, openai_error)(error, scope["state"]["request_id"])


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _key(request: Request) -> str:
    """Whose request it is: by key, else by address."""
    key: str = request.state.client
    return key or (request.client.host if request.client else "")


def _answered(dialect: Dialect[Any]) -> Any:
    async def endpoint(request: Request) -> Response:
        service, body = _service(request), decode(await _read(request), dialect.body)
        service.ready()
        with ExitStack() as stack:
            stack.enter_context(service.admitted(dialect.sequences(body), _key(request)))
            begun = dialect.begin(service, body, _key(request), stack)
            told = await unless_gone(request.receive, begun)
            if body.stream:
                return EventStream(dialect, told, stack.pop_all())
            return _json(await unless_gone(request.receive, told.whole()))

    return endpoint


def _with_body(kind: type[_T], answer: Callable[[Service, _T], Json]) -> Any:
    async def endpoint(request: Request) -> Response:
        body = decode(await _read(request), kind)
        # A long text may take a second to tokenize, in which other answers go on.
        return _json(await asyncio.to_thread(answer, _service(request), body))

    return endpoint


def _plain(answer: Callable[[Service], Json]) -> Any:
    async def endpoint(request: Request) -> Response:
        return _json(answer(_service(request)))

    return endpoint


async def _model(request: Request) -> Response:
    return _json(facts.model(_service(request), request.path_params["name"]))


async def _no_embeddings(request: Request) -> Response:
    raise ApiError(
        404,
        "a language model of this family has no embedding head; ask a server for embeddings",
        code="not_found",
    )


async def _no_kept_response(request: Request) -> Response:
    raise ApiError(
        404,
        "this server keeps no responses; send the conversation as input of a new one",
        code="not_found",
    )


async def _nodes(request: Request) -> Response:
    return _json(await facts.nodes_json(_service(request)))


async def _metrics(request: Request) -> Response:
    service = _service(request)
    load, nodes = None, service.last_nodes
    if service.model is not None:
        load = service.model.engine.load
    with suppress(ApiError):  # what was counted before is there without a model
        nodes = await facts.nodes(service)
    text = service.metrics.text(load, nodes)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _openapi(request: Request) -> Response:
    return _json(describe())


async def _page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if (found := page.files().get(name)) is None:
        raise HTTPException(404)
    content, media_type = found
    return Response(content, media_type=media_type, headers=dict(page.HEADERS))


async def _of_api(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return _error(request, error)


async def _of_depth(request: Request, error: Exception) -> Response:
    """Of a body that some function that walks it finds too deep."""
    return _error(request, bad_request("the body is nested too deeply; flatten it"))


async def _of_http(request: Request, error: Exception) -> Response:
    """Of a path or method that is not there."""
    if not isinstance(error, HTTPException):
        raise error
    code, said = "not_found", f"there is no {request.method} {request.scope['path'][:256]}"
    if error.status_code == 405:
        code = "method_not_allowed"
    found = ApiError(error.status_code, said, code=code, headers=error.headers or {})
    return _error(request, found)


async def _of_ours(request: Request, error: Exception) -> Response:
    """What nobody foresaw; Starlette raises it again, so that the log has it."""
    found = of_engine(error)
    found.message += f" (request {request.state.request_id})"
    return _error(request, found)


def _error(request: Request, error: ApiError) -> Response:
    return _json(error_object(request.scope, error), error.status, error.headers)


def _json(body: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = msgspec.json.encode(body)
    return Response(content, status, headers, media_type="application/json")


async def _read(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, too slow, or no JSON by its type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send content-type: application/json", code="unsupported_media_type")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES:
                    most = f"{BODY_BYTES >> 20} MiB"
                    raise ApiError(413, f"the body has more than {most}", code="too_large")
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from None
    except ClientDisconnect:
        raise bad_request("the body was cut off") from None
    return bytes(body)

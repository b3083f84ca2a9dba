"""/openapi.json: the routes, and the bodies that they take."""

import msgspec

from pyllama_dist import __version__
from pyllama_dist.api.anthropic.requests import CountTokensRequest, MessagesRequest
from pyllama_dist.api.dialect import Json
from pyllama_dist.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pyllama_dist.api.responses.requests import ResponsesRequest

_BODIES: dict[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatRequest, "Answers a conversation."),
    "/v1/completions": (CompletionRequest, "Continues a text."),
    "/v1/messages": (MessagesRequest, "Answers a conversation, as Anthropic's API does."),
    "/v1/messages/count_tokens": (CountTokensRequest, "How many tokens a conversation has."),
    "/v1/responses": (ResponsesRequest, "Answers a conversation, told in items."),
    "/tokenize": (TokenizeRequest, "Token ids of a text or a conversation."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
_PLAIN = {
    "/v1/models": "The model, under each of its names.",
    "/v1/models/{name}": "The model of a name.",
    "/health": "Whether the model serves.",
    "/v1/health": "Whether the model serves.",
    "/nodes": "What steps have cost each node.",
    "/metrics": "Counters for Prometheus.",
    "/openapi.json": "This description.",
}
_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def describe() -> Json:
    """The description of this server, OpenAPI 3.1."""
    kinds = [kind for kind, _ in _BODIES.values()]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    paths: Json = {
        path: {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                },
                "responses": _answers(path, "application/json", *_streamed(kind)),
            }
        }
        for (path, (kind, summary)), schema in zip(_BODIES.items(), schemas, strict=True)
    }
    for path, summary in _PLAIN.items():
        content = "text/plain" if path == "/metrics" else "application/json"
        paths[path] = {"get": {"summary": summary, "responses": _answers(path, content)}}
        if name := path.partition("{")[2].rstrip("}"):
            place = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path]["parameters"] = [place]
    return {
        "openapi": "3.1.0",
        "info": {"title": "pyllama-dist", "version": __version__},
        "security": [{}, *({key: []} for key in _KEYS)],  # only a server that has keys asks for one
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "MessagesError": _MESSAGES_ERROR},
            "securitySchemes": _KEYS,
        },
    }


def _streamed(kind: type) -> list[str]:
    return ["text/event-stream"] if hasattr(kind, "stream") else []


_NULLABLE = {"type": ["string", "null"]}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}


_MESSAGES_ERROR: Json = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def _answers(path: str, *content: str) -> Json:
    """What a path answers, by status."""
    name = "MessagesError" if path.startswith("/v1/messages") else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {
        "200": {"description": "The answer.", "content": {one: {} for one in content}},
        "4XX": {"description": "What the client can mend.", "content": error},
        "5XX": {"description": "What the server could not do.", "content": error},
    }

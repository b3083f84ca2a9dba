"""Errors in the shape of Anthropic's API."""

from typing import Any

from pyllama_dist.api.errors import ApiError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """The object that tells an error; its status says of which type it is."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    message = error.message
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # words by which Claude Code knows to compact
    fields = {"type": _TYPES.get(error.status, other), "message": message}
    return {"type": "error", "error": fields, "request_id": request_id}

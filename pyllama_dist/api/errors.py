"""What a client is told when a request cannot be served: a status, and OpenAI's error object."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyllama_dist.errors import FileError, NodeError, PyllamaError, UsageError


@dataclass(eq=False)
class ApiError(Exception):
    """An error as clients of OpenAI's API know it.

    Attributes:
        status: of HTTP.
        message: what, where, and what to do; one line.
        type: the class of error, `invalid_request_error` for what the client can mend.
        code: which error of that class.
        param: the path of the field that is wrong, as `messages[2].content`.
        headers: further ones of the answer.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, object]:
        """The error object."""
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """What the client can mend."""
    return ApiError(400, message, code=code, param=param)


def unavailable(message: str, code: str, retry_after: int = 5) -> ApiError:
    """The server cannot serve now."""
    headers = {"retry-after": str(retry_after)}
    return ApiError(503, message, "unavailable_error", code, headers=headers)


def of_engine(error: BaseException) -> ApiError:
    """What an error of the engine means to a client whose generation it ended."""
    match error:
        case ApiError():
            return error
        case NodeError():
            return unavailable(str(error), "node_lost")
        case UsageError():
            return bad_request(str(error))
        case FileError():
            return ApiError(500, str(error), "server_error", "model_damaged")
        case PyllamaError():
            return ApiError(500, str(error), "server_error")
    return ApiError(500, "internal error; the server's log says more", "server_error")

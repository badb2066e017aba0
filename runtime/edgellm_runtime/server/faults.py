"""What goes wrong in a request, and the two forms in which clients expect to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgellm_runtime.errors import BusyError, ContextError, OptionError, RuntimeFault

__all__ = ["ApiError", "Dialect", "body_of", "error_of", "headers_of", "status_of"]

Dialect = Literal["openai", "anthropic"]
_ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 413: "request_too_large", 415: "invalid_request_error", 429: "rate_limit_error",
    501: "invalid_request_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_OURS = "The model could not answer; the server's log says why."


@dataclass
class ApiError(Exception):
    """A request that is not answered.

    Args:
        message: for whoever made it.
        status: HTTP's.
        code: a word for programs, or None.
        param: the field that it is about, or None.
        retry_after: seconds; None: nothing is said of it.
        retry: whether to come again as it is can help.
    """

    message: str
    status: int = 400
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    retry: bool = False

    def __str__(self) -> str:
        return self.message


def error_of(error: BaseException) -> ApiError:
    """How an error is told to a client; the server's own are not told in detail, for they name its files."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(_sentence(error), 400, code="context_length_exceeded")
    if isinstance(error, BusyError):
        return ApiError(_sentence(error), 503, code="overloaded", retry_after=1, retry=True)
    if isinstance(error, OptionError):
        return ApiError(_sentence(error), 400)
    return ApiError(_OURS, 500, code="model_failed" if isinstance(error, RuntimeFault) else "internal_error")


def status_of(error: ApiError, dialect: Dialect) -> int:
    """HTTP's status."""
    return 529 if dialect == "anthropic" and error.status == 503 else error.status


def headers_of(error: ApiError) -> dict[str, str]:
    """What clients go by when they decide whether to come again."""
    headers = (
        {} if error.status < 500 and error.status != 429 else {"x-should-retry": "true" if error.retry else "false"}
    )
    return headers if error.retry_after is None else {**headers, "retry-after": str(error.retry_after)}


def body_of(error: ApiError, dialect: Dialect, request_id: str) -> Mapping[str, Any]:
    """The error as JSON."""
    if dialect == "anthropic":
        kind = _ANTHROPIC.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
    kind = "server_error" if error.status >= 500 and error.status != 501 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _sentence(error: BaseException) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]

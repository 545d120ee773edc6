"""Errors in the form of the OpenAI API: an HTTP status, a message, and a code for programs."""

from __future__ import annotations

from typing import Any

from edgeq.core.errors import EdgeqError, UsageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
RETRY_AFTER_S = 2
"""Value of Retry-After, in seconds, for requests that this server cannot answer now."""


class ApiError(Exception):
    """A refused or failed request.

    Args:
        status: HTTP status.
        code: stable code for programs, such as "model_not_found".
        message: a sentence that says what is wrong and what to do.
        param: the field of the body that is wrong; None if none is.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, _TYPES[400]),
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """The error for an invalid field of the body (status 400)."""
    return ApiError(400, code, message, param)


def busy(message: str, code: str) -> ApiError:
    """The error for a request that gets no slot at this time (status 429)."""
    return ApiError(429, code, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def shutting_down() -> ApiError:
    """The error for a request that a server that ends does not answer any more (status 503)."""
    return ApiError(
        503, "shutting_down", "the server is shutting down; send the request again later, or to "
        "another server", headers={"Retry-After": str(RETRY_AFTER_S)},
    )  # fmt: skip


def of_request(error: EdgeqError, param: str | None) -> ApiError:
    """The error for a request whose content cannot be processed (status 400).

    Args:
        error: the cause, such as a chat template that refuses the messages.
        param: the field of the body that is wrong; None if none is.
    """
    code = "invalid_value" if isinstance(error, UsageError) else "unsupported_value"
    return ApiError(400, code, str(error), param)


def of_model(error: Exception) -> ApiError:
    """The error for a failure of the server while it generates (status 500)."""
    message = str(error) if isinstance(error, EdgeqError) else "generation failed; see the log"
    return ApiError(500, "model_error", message)

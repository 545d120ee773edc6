"""Errors as OpenAI's clients know them: a status, a sentence, and a code that programs can read."""

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
"""Seconds after which a client that was refused for want of a slot may try again."""


class ApiError(Exception):
    """A refused or failed request.

    Args:
        status: of HTTP.
        code: stable, for programs, such as "model_not_found".
        message: a sentence that says what to do.
        param: the field of the body at fault, if one is.
        headers: of the response.
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
        """The object that is sent."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, _TYPES[400]),
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the body that cannot be used."""
    return ApiError(400, code, message, param)


def busy(message: str, code: str) -> ApiError:
    """There is no slot for the request now."""
    return ApiError(429, code, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def of_request(error: EdgeqError, param: str | None) -> ApiError:
    """What a request's content led to, such as a chat template that refuses the messages."""
    code = "invalid_value" if isinstance(error, UsageError) else "unsupported_value"
    return ApiError(400, code, str(error), param)


def of_model(error: Exception) -> ApiError:
    """A failure while generating, which is no fault of the request."""
    message = str(error) if isinstance(error, EdgeqError) else "generation failed; see the log"
    return ApiError(500, "model_error", message)

"""Errors in OpenAI's envelope, and what each failure of a request becomes."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from starlette.responses import JSONResponse

from et_moe.serving.chat_template import ChatTemplateError
from et_moe.serving.generation import GenerationError
from et_moe.serving.interface import EngineBrokenError, QueueFullError

_LONGEST = 1000

RETRY_SECONDS = 1
"""After which a request that was refused for load may come again."""


class APIError(Exception):
    """A failure with its HTTP status.

    Args:
        param: the part of the request at fault.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        if len(message) > _LONGEST:  # it may quote what the request says
            message = message[:_LONGEST] + "..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def type(self) -> str:
        types = {401: "authentication_error", 429: "rate_limit_error"}
        return types.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )

    def envelope(self) -> dict:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_SECONDS)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.envelope(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param, code)


def api_error(error: Exception) -> APIError | None:
    """What a client is told of an exception; None for one that is nobody's doing."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, QueueFullError):
        return APIError(429, "the queue is full: try again later", code="queue_full")
    if isinstance(error, EngineBrokenError):
        return APIError(503, f"the device failed: {error}", code="engine_broken")
    if isinstance(error, GenerationError):
        return APIError(503, f"the request did not end: {error}", code="generation_failed")
    if isinstance(error, ChatTemplateError):
        return bad_request(str(error), "messages")
    return None


KNOWN = (
    APIError,
    ChatTemplateError,
    EngineBrokenError,
    GenerationError,
    QueueFullError,
    ValidationError,
)
"""The exceptions that `api_error` knows."""


@contextmanager
def refusals() -> Iterator[None]:
    """Where the engine or the tokenizer refuse what a request asks of them, as a bad request."""
    try:
        yield
    except KNOWN:
        raise
    except ValueError as error:
        raise bad_request(str(error)) from None


def _invalid(error: ValidationError) -> APIError:
    """The first fault. What the request holds at that place is left out."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{where}: {message}" if where else message, where or None)

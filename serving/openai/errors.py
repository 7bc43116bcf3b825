"""Errors in OpenAI's envelope, and what each failure of a request becomes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from pydantic import ValidationError
from starlette.responses import JSONResponse

from et_moe.serving.chat_template import ChatTemplateError
from et_moe.serving.generation import GenerationError
from et_moe.serving.interface import EngineBrokenError, QueueFullError, SamplingParams

_LONGEST = 1000

RETRY_SECONDS = 1
"""After which a request that was refused for load may come again."""


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class APIError(Exception):
    """A failure with its HTTP status.

    Args:
        param: the part of the request at fault.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        # Both may quote what the request says.
        message, param = _shortened(message), param and _shortened(param)
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


_PARAMETERS = {field.name for field in fields(SamplingParams)}


@contextmanager
def refusals(place: str) -> Iterator[None]:
    """Where the engine or the tokenizer refuse what a request asks of them, as a bad request.

    Args:
        place: where the request has its prompt, for messages that do not begin with the name of
            another parameter.
    """
    try:
        yield
    except KNOWN:
        raise
    except ValueError as error:
        message = str(error)
        name = re.split("[ :]", message, maxsplit=1)[0]
        # Clients that can do with less look for this code.
        code = "context_length_exceeded" if message.startswith("the prompt has ") else None
        raise bad_request(message, name if name in _PARAMETERS else place, code) from None


def _invalid(error: ValidationError) -> APIError:
    """The first fault. What the request holds at that place is left out."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if where:
        return bad_request(f"{where}: {message}", where)
    return bad_request(message, first.get("ctx", {}).get("field"))

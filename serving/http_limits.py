"""What every request has to pass before it is looked at: key, type and size of its body; and the
request id that it is answered with."""

import asyncio
import contextlib
import hmac
import logging
import re
import traceback
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from et_moe.serving.openai.errors import APIError

logger = logging.getLogger("et_moe.serving")

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_SECONDS = 60.0
"""A client that takes longer to send its request is cut off."""
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 5.0
"""How much is read of a request that is refused, and for how long."""

_REQUEST_ID = re.compile(r"[\w.:/-]{1,128}\Z", re.ASCII)


class HttpLimits:
    """ASGI middleware that refuses requests by key, content type, size and slowness.

    Args:
        api_key: that requests must carry as `Authorization: Bearer KEY`; None for no key.
        open_paths: paths that need no key.
        refused: is told the status of each request that is refused here.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        open_paths: frozenset[str],
        refused: Callable[[int], None],
    ) -> None:
        self._app, self._open_paths, self._refused = app, open_paths, refused
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        body = _Body(receive)
        try:
            self._check(scope, headers)
            if scope["method"] == "POST":
                receive = await _read_body(headers, body)
        except APIError as error:
            self._refused(error.status)
            if scope["method"] == "POST" and error.status != 408:
                await body.discard(headers)
            return await error.response()(scope, receive, send_with_id)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log(error, request_id)
            if not started:
                await APIError(500, "internal error").response()(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._key is not None and path not in self._open_paths:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
            if scheme.lower() != "bearer" or not right:
                message = "expected the header 'Authorization: Bearer KEY' with this server's key"
                raise APIError(401, message, code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page on another site can make a browser post forms and plain text here, but not JSON.
        if scope["method"] == "POST" and kind != "application/json":
            raise APIError(415, f"Content-Type {kind!r}: expected application/json")


def _log(error: Exception, request_id: str) -> None:
    """Where it happened, without its message, which may hold what the request says."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: %s\n%s", request_id, type(error).__name__, where)


class _Body:
    """The body of a request, as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._more = receive, True

    async def __call__(self) -> Message:
        message = await self._receive()
        self._more = message.get("more_body", False)
        return message

    async def discard(self, headers: Headers) -> None:
        """Reads the rest, within limits: some clients look for an answer only once they have sent
        all, and would see a broken connection. Those that wait to be asked for it are not."""
        if headers.get("expect", "").lower() == "100-continue":
            return
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while self._more and size < DISCARD_BYTES:
                    size += len((await self()).get("body", b""))


async def _read_body(headers: Headers, receive: Receive) -> Receive:
    """Reads the body and returns a `receive` that gives it at once."""
    length = headers.get("content-length", "0")
    body = bytearray()
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise APIError(400, "the request ended before its body did")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise APIError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
    first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _too_large() -> APIError:
    return APIError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")

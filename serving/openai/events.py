"""Answers that are streamed as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Send

from et_moe.serving.interface import Drafts
from et_moe.serving.openai.errors import APIError, api_error

DONE = b"data: [DONE]\n\n"


def event(payload: dict, name: str | None = None) -> bytes:
    """One event of a stream, which may have a name besides its data."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


class Head:
    """What the chunks of one answer have in common."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def with_choices(self, choices: list[dict], **more) -> dict:
        return {**self.fields, "choices": choices, **more}


def usage(prompt_tokens: int, generations, reasoning_tokens: int | None = None) -> dict:
    """OpenAI's account of tokens."""
    completion = sum(generation.tokens for generation in generations)
    cached = sum(generation.cached_tokens for generation in generations)
    counts = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt_tokens)},
    }
    drafts = sum((generation.drafts for generation in generations), Drafts())
    details = {} if reasoning_tokens is None else {"reasoning_tokens": reasoning_tokens}
    if drafts.steps:
        details["accepted_prediction_tokens"] = sum(drafts.accepted)
    return counts | ({"completion_tokens_details": details} if details else {})


class EventStream(StreamingResponse):
    """A stream whose source is closed at once when the client leaves."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


class Streamed:
    """What kinds of answers have in common that can be streamed."""

    END = DONE
    """The last bytes of a stream."""

    def failed(self, error: APIError) -> bytes:
        """The event that says that a stream has failed after it had begun."""
        return event(error.envelope())


async def with_errors(answer: Streamed, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream of an answer with its end, which says so if the stream fails."""
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            known = api_error(error)
            yield answer.failed(known or APIError(500, "internal error"))
            if known is None:
                raise
        yield answer.END


async def primed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same chunks, once the first is there, so that a failure before it has its own status."""
    first = await anext(chunks)

    async def rest() -> AsyncIterator[bytes]:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return rest()

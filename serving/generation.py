"""One sequence of a loaded model: its events as text, masks for guided decoding, metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from et_moe.serving.detokenizer import Detokenizer
from et_moe.serving.engine import AsyncEngine
from et_moe.serving.guidance import Guide
from et_moe.serving.interface import Drafts, Event, SamplingParams
from et_moe.serving.metrics import Metrics


class GenerationError(RuntimeError):
    """The engine failed at a request, or ended it for its own reasons."""


@dataclass(frozen=True)
class Step:
    """What one event adds: its text (whole characters only), and the event."""

    text: str
    event: Event


class Generation:
    """A request that the engine has accepted. To be left by `close`, which cancels what still runs.

    Args:
        engine: takes the request at once; raises like `Engine.submit`.
        tokenizer: of the model.
        prompt_ids: the prompt.
        params: how tokens are drawn.
        guide: what tokens are allowed; None if all are.
        metrics: counts the request.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        guide: Guide | None,
        metrics: Metrics,
    ) -> None:
        self._engine, self._guide, self._metrics = engine, guide, metrics
        self._detokenizer = Detokenizer(tokenizer)
        self._stream = engine.submit(prompt_ids, replace(params, guided=guide is not None))
        self._started = time.monotonic()
        self._reason = "cancelled"
        self._open, self._ending = True, False
        self.tokens = 0
        self.cached_tokens = 0
        self.drafts = Drafts()
        metrics.prompt_tokens.inc(len(prompt_ids))

    def close(self) -> None:
        """Ends the request if it has not ended; may be called twice."""
        if self._open:
            self._open = False
            self._stream.__exit__(None, None, None)
            self._metrics.finished(self._reason, time.monotonic() - self._started)

    async def steps(self) -> AsyncIterator[Step]:
        """Raises GenerationError if the request ends without an answer."""
        if self._guide is not None:
            self._allow(await self._guide.start())
        last = None
        async for event in self._stream:
            if event.finish_reason is not None:
                self._reason = event.finish_reason
            if self._ending and event.finish_reason is not None:
                self._reason = "stop"
                return
            if event.finish_reason in ("error", "cancelled"):
                raise GenerationError(event.error or "the request was cancelled")
            last = self._measure(event, last)
            text = self._detokenizer.feed(event.token_ids)
            if event.finish_reason is not None:
                text += self._detokenizer.finish()
            elif self._guide is not None and event.token_ids:
                self._allow(await self._guide.advance(event.token_ids))
            yield Step(text, event)

    def end(self) -> None:
        """Ends the sequence at its next token, for what it has said: its steps end with it."""
        self._ending = True
        self._engine.engine.cancel(self._stream.request_id)

    def cancel(self) -> None:
        """Ends the sequence at its next token, which its steps raise as an error."""
        self._engine.engine.cancel(self._stream.request_id)

    def _allow(self, mask: bytes) -> None:
        self._engine.engine.allow(self._stream.request_id, mask)

    def _measure(self, event: Event, last: float | None) -> float | None:
        if event.cached_tokens:
            self.cached_tokens = event.cached_tokens
            self._metrics.cached_tokens.inc(event.cached_tokens)
        if event.drafts.steps:
            self.drafts += event.drafts
            self._metrics.drafts(event.drafts)
        count = len(event.token_ids)
        if not count:
            return last
        now = time.monotonic()
        self.tokens += count
        self._metrics.tokens(count, now - (last or self._started), first=last is None)
        return now


async def in_turn(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Step]]:
    """The steps of several sequences as they come, with the sequence's index. The first failure of
    one ends them all."""
    if len(generations) == 1:
        async for step in generations[0].steps():
            yield 0, step
        return
    queue: asyncio.Queue[tuple[int, Step] | BaseException | None] = asyncio.Queue()

    async def forward(index: int) -> None:
        try:
            async for step in generations[index].steps():
                queue.put_nowait((index, step))
            queue.put_nowait(None)
        except BaseException as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(forward(index)) for index in range(len(generations))]
    try:
        running = len(tasks)
        while running:
            await asyncio.sleep(0)  # as in `Stream`: steps may wait already
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()

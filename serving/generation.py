"""One sequence of a loaded model: its steps, masks for guided decoding, metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from et_moe.serving.engine import AsyncEngine
from et_moe.serving.guidance import Guide
from et_moe.serving.interface import Drafts, Event, SamplingParams
from et_moe.serving.metrics import Metrics
from et_moe.serving.steps import Step, Steps


class GenerationError(RuntimeError):
    """The engine failed at a request, or ended it for its own reasons."""


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
        self._steps = Steps(tokenizer)
        self._started = time.monotonic()
        self._stream = engine.submit(prompt_ids, replace(params, guided=guide is not None))
        self._reason = "cancelled"
        self._open = True
        self.cached_tokens = 0
        metrics.prompt_tokens.inc(len(prompt_ids))

    def close(self) -> None:
        """Ends the request if it has not ended; may be called twice."""
        if self._open:
            self._open = False
            self._stream.__exit__(None, None, None)
            self._metrics.finished(self._reason, time.monotonic() - self._started)

    @property
    def tokens(self) -> int:
        """Of the answer: the token that ended it is its last."""
        return self._steps.tokens

    @property
    def drafts(self) -> Drafts:
        """That were fed for the answer's tokens."""
        return self._steps.drafts

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._steps.ended

    async def events(self) -> AsyncIterator[Event]:
        """All that the engine says of the request, for `steps`.

        Raises:
            GenerationError: the request has ended without an answer, and not by `end`.
        """
        if self._guide is not None:
            self._allow(await self._guide.start())
        last = None
        async for event in self._stream:
            last = self._measure(event, last)
            reason = event.finish_reason
            if reason is not None:
                self._reason = "stop" if self.ended else reason
            elif self._guide is not None and event.token_ids:
                self._allow(await self._guide.advance(event.token_ids))
            if reason not in ("error", "cancelled"):
                yield event
                continue
            if event.token_ids:  # Perhaps one of them ends the answer.
                yield event
            if not self.ended:
                raise GenerationError(event.error or "the request was cancelled")

    def steps(self, event: Event) -> Iterator[Step]:
        """The steps of the next event, up to the one at which `end` is called; to be used up."""
        return self._steps.of(event)

    def end(self) -> None:
        """Ends the sequence at its next token, for what it has said: its steps end with it."""
        self._steps.end()
        self._reason = "stop"
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
            self._metrics.drafts(event.drafts)
        # Not when they are taken: events that have waited for that come all at once.
        for drawn, together in groupby(event.drawn):
            seconds = drawn - (self._started if last is None else last)
            self._metrics.tokens(len(list(together)), seconds, first=last is None)
            last = drawn
        return last


async def in_turn(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several sequences as they come, with the sequence's index. The first failure
    of one ends them all."""
    if len(generations) == 1:
        async for event in generations[0].events():
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def forward(index: int) -> None:
        try:
            async for event in generations[index].events():
                queue.put_nowait((index, event))
            queue.put_nowait((index, None))
        except BaseException as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index)) for index in range(len(generations))]
    try:
        running = len(tasks)
        while running:
            await asyncio.sleep(0)  # as in `Stream`: events may wait already
            index, item = await queue.get()
            if isinstance(item, Event):
                yield index, item
                continue
            # What failed may have been ended since, by what it had said before.
            ended = isinstance(item, GenerationError) and generations[index].ended
            if item is not None and not ended:
                raise item
            running -= 1
    finally:
        for task in tasks:
            task.cancel()

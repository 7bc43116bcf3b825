"""The C++ engine as `interface.Engine`, and requests as async iterators."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from et_moe.runner import python as extension
from et_moe.serving.interface import (
    Drafts,
    Engine,
    EngineBrokenError,
    EngineStatus,
    Event,
    ModelInfo,
    QueueFullError,
    SamplingParams,
    TokenLogprob,
)


def load_tokenizer(program_dir: Path) -> extension.Tokenizer:
    """The tokenizer of a program folder.

    Raises:
        ValueError: there is no such folder.
        RuntimeError: its `tokenizer.json` is missing, or is not one that is supported.
    """
    if not program_dir.is_dir():
        kind = "not a folder" if program_dir.exists() else "no such folder"
        raise ValueError(f"{program_dir}: {kind}, expected one that `et-moe export` wrote")
    path = program_dir / "tokenizer.json"
    if not path.exists():
        raise RuntimeError(
            f"{path}: no such file; `et-moe export` copies it if the checkpoint has one, so copy "
            "the model's into this folder"
        )
    return extension.Tokenizer(path)


def load_engine(
    program_dir: str | Path,
    *,
    max_sequences: int = 8,
    max_waiting: int = 256,
    memory_fraction: float | None = None,
    prefix_cache: bool = True,
    cuda_graph: bool = True,
) -> Engine:
    """Loads `model.pte` and `model.ptd` of a program folder; returns once requests can come.

    Args:
        max_sequences: requests that are served at once; the state of each is allocated now.
        max_waiting: requests that wait for their turn; further ones are refused.
        memory_fraction: of a GPU's memory, for weights, state and what calls take together. It
            bounds the pages of the KV cache; without it there are as many as the longest sequences
            take.
        prefix_cache: whether prompts that begin as others did take over what these computed.
        cuda_graph: whether a CUDA program is captured into CUDA graphs.

    Raises:
        RuntimeError: a file is missing or does not fit, or there is too little memory.
    """
    folder = Path(program_dir)
    return _NativeEngine(
        extension.Engine(
            folder / "model.pte",
            folder / "model.ptd",
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            memory_fraction=memory_fraction,
            prefix_cache=prefix_cache,
            cuda_graph=cuda_graph,
        ),
        max_sequences + max_waiting,
    )


class _NativeEngine:
    """The extension's engine in the types of `interface`."""

    def __init__(self, native: extension.Engine, max_requests: int) -> None:
        self._native, self.max_requests = native, max_requests
        self.info = ModelInfo(*native.info)
        # Also at the end of the process: the thread must not outlive what it uses.
        self._close = weakref.finalize(self, native.close)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        try:
            return self._native.submit(prompt_ids, params)
        except extension.QueueFullError as error:
            raise QueueFullError(str(error)) from None
        except extension.EngineBrokenError as error:
            raise EngineBrokenError(str(error)) from None

    def cancel(self, request_id: int) -> None:
        self._native.cancel(request_id)

    def allow(self, request_id: int, mask: bytes) -> None:
        self._native.allow(request_id, mask)

    def fileno(self) -> int:
        return self._native.fileno()

    def take_events(self) -> list[Event]:
        return [_event(*event) for event in self._native.take_events()]

    def status(self) -> EngineStatus:
        return EngineStatus(*self._native.status())

    def close(self) -> None:
        self._close()


def _event(
    request_id, token_ids, logprobs, prompt_logprobs, cached_tokens, drafts, reason, error, drawn_ms
) -> Event:
    drafts = Drafts() if drafts is None else Drafts(*drafts)
    if logprobs is not None:
        logprobs = tuple(TokenLogprob(*logprob) for logprob in logprobs)
    if prompt_logprobs is not None:
        prompt_logprobs = (None, *(TokenLogprob(*logprob) for logprob in prompt_logprobs))
    # The runner's clock is the one of time.monotonic.
    drawn = tuple(ms / 1000 for ms in drawn_ms)
    return Event(
        request_id,
        token_ids,
        logprobs,
        prompt_logprobs,
        cached_tokens,
        drafts,
        reason,
        error,
        drawn,
    )


class AsyncEngine:
    """An engine on a running event loop: each request is a stream of its events.

    To be made, used and closed on the loop's thread. Nobody else may take the engine's events.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._streams: dict[int, asyncio.Queue[Event]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(engine.fileno(), self._deliver)

    def _deliver(self) -> None:
        for event in self.engine.take_events():
            # A stream that nobody reads any more has been cancelled.
            if (queue := self._streams.get(event.request_id)) is not None:
                queue.put_nowait(event)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> "Stream":
        """Queues a request; raises like `Engine.submit`."""
        request_id = self.engine.submit(prompt_ids, params)
        queue = self._streams[request_id] = asyncio.Queue()
        return Stream(self, request_id, queue)

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[Event]:
        """The events of a request, the last one with its finish reason. A consumer that goes away
        (`aclose`, a cancelled task) cancels the request."""
        with self.submit(prompt_ids, params) as stream:
            async for event in stream:
                yield event

    async def close(self) -> None:
        """Ends all streams and closes the engine, whose thread ends its call first."""
        self._loop.remove_reader(self.engine.fileno())
        await asyncio.to_thread(self.engine.close)
        self._deliver()


class Stream:
    """The events of one request, in order. Leaving it as a context, before its last event, cancels
    the request."""

    def __init__(self, owner: AsyncEngine, request_id: int, queue: asyncio.Queue[Event]) -> None:
        self.request_id = request_id
        self._owner, self._queue, self._ended = owner, queue, False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._owner._streams.pop(self.request_id, None)
        if not self._ended:
            self._owner.engine.cancel(self.request_id)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        # `get` does not wait where events are there already, as for a client that did not read.
        # Without a turn for others all of them would be worked off before anything else.
        await asyncio.sleep(0)
        event = await self._queue.get()
        self._ended = event.finish_reason is not None
        return event

"""An engine that says what a test wants, without a model."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from et_moe.serving.interface import (
    EngineBrokenError,
    EngineStatus,
    Event,
    ModelInfo,
    QueueFullError,
    SamplingParams,
    TokenLogprob,
)

Answers = Callable[[list[int], SamplingParams], Sequence[int]]
"""Prompt and parameters -> the tokens of the answer, the one that ends it included."""


@dataclass
class _Request:
    id: int
    prompt: list[int]
    params: SamplingParams
    answer: list[int]
    masks: list[bytes] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    cancelled: bool = False


def _joined(held: Event, event: Event) -> Event:
    """As the engine's queue joins the events of a request."""
    logprobs = None if held.logprobs is None else (*held.logprobs, *(event.logprobs or ()))
    return replace(
        held,
        token_ids=held.token_ids + event.token_ids,
        logprobs=logprobs,
        finish_reason=event.finish_reason,
        error=event.error,
        drawn=held.drawn + event.drawn,
    )


class FakeEngine:
    """Implements `interface.Engine`.

    Every step draws a token for each of the running requests. A guided request waits for its mask;
    where the mask does not allow its answer, it draws the least token that is allowed.

    Args:
        answers: what each request gets as its answer.
        max_sequences, max_waiting: how many requests can run, and how many can wait.
        seconds: how long a step takes.

    Attributes:
        sizes: asked for how many tokens of a request its next event waits, as events do for a
            reader who is slow.
        clock: asked for the time at which a token is drawn.
        fail_after: of how many tokens of a request; then it ends with an error.
    """

    def __init__(
        self,
        answers: Answers,
        vocab_size: int = 2048,
        eos_token_ids: tuple[int, ...] = (2045, 2043),
        max_seq_len: int = 2048,
        max_sequences: int = 4,
        max_waiting: int = 8,
        seconds: float = 0.0,
    ) -> None:
        self.info = ModelInfo(max_seq_len, 64, vocab_size, eos_token_ids, "cpu")
        self.answers, self.seconds = answers, seconds
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.cancelled: list[int] = []
        self.hold = threading.Event()  # While it is set, nothing is drawn.
        self.fail_next: str | None = None
        self.sizes: Callable[[], int] = lambda: 1
        self.clock: Callable[[], float] = time.monotonic
        self.fail_after: int | None = None
        self._held: dict[int, tuple[Event, int]] = {}
        self._places = (max_sequences, max_waiting)
        self.max_requests = max_sequences + max_waiting
        self._condition = threading.Condition()
        self._running: list[_Request] = []
        self._waiting: list[_Request] = []
        self._events: list[Event] = []
        self._broken: str | None = None
        self._closed = False
        self._next_id = 0
        self.closes = 0
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        if not prompt_ids:
            raise ValueError("the prompt is empty")
        most = self.info.max_seq_len - (params.max_tokens != 0)
        if len(prompt_ids) > most:
            raise ValueError(f"the prompt has {len(prompt_ids)} tokens, expected at most {most}")
        if not all(0 <= i < self.info.vocab_size for i in prompt_ids):
            raise ValueError("the prompt has an id outside the vocabulary")
        with self._condition:
            if self._broken is not None:
                raise EngineBrokenError(self._broken)
            if len(self._running) + len(self._waiting) >= sum(self._places):
                raise QueueFullError
            self.submitted.append((list(prompt_ids), params))
            self._next_id += 1
            answer = list(self.answers(list(prompt_ids), params))
            if self._broken is not None:
                raise EngineBrokenError(self._broken)
            self._waiting.append(_Request(self._next_id, list(prompt_ids), params, answer))
            self._condition.notify()
            return self._next_id

    def cancel(self, request_id: int) -> None:
        with self._condition:
            for request in [*self._running, *self._waiting]:
                if request.id == request_id:
                    request.cancelled = True
                    self.cancelled.append(request_id)
            self._condition.notify()

    def allow(self, request_id: int, mask: bytes) -> None:
        assert len(mask) == (self.info.vocab_size + 7) // 8
        with self._condition:
            for request in [*self._running, *self._waiting]:
                if request.id == request_id:
                    request.masks.append(mask)
            self._condition.notify()

    def fileno(self) -> int:
        return self._fd

    def take_events(self) -> list[Event]:
        with self._condition:
            events, self._events = self._events, []
            if events:
                os.eventfd_read(self._fd)
        return events

    def status(self) -> EngineStatus:
        with self._condition:
            waiting, running = len(self._waiting), len(self._running)
            return EngineStatus(waiting, running, self._places[0], 8, 8, 0, self._broken)

    def break_device(self, reason: str) -> None:
        """Ends all requests with an error; no more are taken."""
        with self._condition:
            self._broken = reason
            for request in [*self._running, *self._waiting]:
                self._say(Event(request.id, finish_reason="error", error=reason))
            self._running, self._waiting = [], []

    def close(self) -> None:
        """Cancels what runs. The thread goes on, so that a test can start its server again."""
        for request in [*self._running, *self._waiting]:
            self.cancel(request.id)
        self.closes += 1

    def stop(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _say(self, event: Event) -> None:
        held, size = self._held.pop(event.request_id, (None, None))
        event = event if held is None else _joined(held, event)
        size = self.sizes() if size is None else size
        if event.finish_reason is None and len(event.token_ids) < size:
            self._held[event.request_id] = (event, size)
            return
        if not self._events:
            os.eventfd_write(self._fd, 1)
        self._events.append(event)

    def _run(self) -> None:
        while True:
            with self._condition:
                while self._waiting and len(self._running) < self._places[0]:
                    self._running.append(self._waiting.pop(0))
                self._waiting = [r for r in self._waiting if not self._ends_cancelled(r)]
                stepped = [r for r in self._running if self._step(r)]
                if self._closed:
                    return
                if not stepped:
                    self._condition.wait(0.01)
            if self.seconds:
                time.sleep(self.seconds)

    def _ends_cancelled(self, request: _Request) -> bool:
        if request.cancelled:
            self._say(Event(request.id, finish_reason="cancelled"))
        return request.cancelled

    def _step(self, request: _Request) -> bool:
        if self._ends_cancelled(request):
            self._running = [r for r in self._running if r is not request]
            return True
        if self.hold.is_set() or (request.params.guided and not request.masks):
            return False
        if self.fail_next is not None:
            event = Event(request.id, finish_reason="error", error=self.fail_next)
            self.fail_next = None
        elif len(request.drawn) == self.fail_after:
            event = Event(request.id, finish_reason="error", error="no luck any more")
        else:
            event = self._drawn(request)
        self._say(event)
        if event.finish_reason is not None:
            self._running = [r for r in self._running if r is not request]
        return True

    def _drawn(self, request: _Request) -> Event:
        params, first = request.params, not request.drawn
        cached = len(request.prompt) // 2 if first else 0
        if params.max_tokens == 0:
            prompt = self._prompt_logprobs(request)
            return Event(request.id, (), None, prompt, cached, finish_reason="length")
        token = self._token(request)
        request.drawn.append(token)
        ends = token in (*params.stop_token_ids, *(() if params.ignore_eos else self.eos))
        most = self.info.max_seq_len - len(request.prompt)
        full = len(request.drawn) >= min(params.max_tokens or most, most)
        return Event(
            request.id,
            (token,),
            None if params.logprobs is None else (self._logprob(token, params.logprobs),),
            self._prompt_logprobs(request) if first else None,
            cached_tokens=cached,
            finish_reason="stop" if ends else "length" if full else None,
            drawn=(self.clock(),),
        )

    @property
    def eos(self) -> tuple[int, ...]:
        return self.info.eos_token_ids

    def _token(self, request: _Request) -> int:
        rest = request.answer[len(request.drawn) :]
        token = rest[0] if rest else self.eos[0]
        if not request.params.guided:
            return token
        mask = request.masks.pop(0)
        if mask[token // 8] >> token % 8 & 1:
            return token
        allowed = [i for i in range(self.info.vocab_size) if mask[i // 8] >> i % 8 & 1]
        request.answer.insert(len(request.drawn), allowed[0])
        return allowed[0]

    def _logprob(self, token: int, count: int) -> TokenLogprob:
        others = [(token + i) % self.info.vocab_size for i in range(count)]
        return TokenLogprob(-0.5, tuple((t, -0.5 - i) for i, t in enumerate(others)))

    def _prompt_logprobs(self, request: _Request) -> tuple[TokenLogprob | None, ...] | None:
        count = request.params.prompt_logprobs
        if count is None:
            return None
        return (None, *(self._logprob(token, count) for token in request.prompt[1:]))

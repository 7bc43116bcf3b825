"""What everything in this folder needs of an engine, and nothing of how one works.

An `Engine` takes requests as token ids and answers with events. Its thread owns the device; no call
below waits for it, so that all of them may be made from an event loop. Names and defaults of the
sampling parameters are vLLM's and OpenAI's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFullError(RuntimeError):
    """The engine has as many waiting requests as it takes; the request was not accepted."""


class EngineBrokenError(RuntimeError):
    """The device failed for good: the engine takes no more requests."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn, and when it ends.

    A token is drawn from softmax(logits / temperature) over those that top_k, top_p and min_p
    leave; temperature 0 takes the likeliest. The noise is a function of seed, position and token
    alone.
    """

    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    seed: int = 0
    presence_penalty: float = 0.0  # subtracted from logits of tokens that were generated
    frequency_penalty: float = 0.0  # the same, times how often
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens seen
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()  # besides the program's own end-of-sequence ids
    ignore_eos: bool = False
    logprobs: int | None = None  # of the drawn token and of so many likeliest ones; None: neither
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    guided: bool = False  # each token is drawn from those that `Engine.allow` names, once it has


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability before temperature and filters."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


@dataclass(frozen=True)
class Drafts:
    """Tokens that were guessed before they were drawn; of programs of `--draft-tokens`."""

    steps: int = 0  # calls that were fed drafts
    tokens: int = 0  # drafts that they were fed
    accepted: tuple[int, ...] = ()  # in how many calls the first one was right, the first two, ...

    def __add__(self, other: "Drafts") -> "Drafts":
        pairs = zip_longest(self.accepted, other.accepted, fillvalue=0)
        accepted = tuple(one + another for one, another in pairs)
        return Drafts(self.steps + other.steps, self.tokens + other.tokens, accepted)

    def within(self, count: int) -> "Drafts":
        """Those of a call of which an answer has the first `count` tokens: drafts behind them were
        accepted for nothing."""
        accepted = (value if i < count else 0 for i, value in enumerate(self.accepted))
        return Drafts(self.steps, self.tokens, tuple(accepted))


@dataclass(frozen=True)
class Event:
    """What became of a request since its last event. The one with a finish reason is its last."""

    request_id: int
    token_ids: tuple[int, ...] = ()  # drawn since; an end-of-sequence id is among them
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token id, if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once; None for the first token
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    drafts: Drafts = Drafts()  # that were fed since; of at most one call
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error"
    drawn: tuple[float, ...] = ()  # when each token was, by time.monotonic; one time for a call


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded program says of itself."""

    max_seq_len: int  # most tokens of one sequence, prompt and answer
    page_size: int  # tokens of a page of the KV cache
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    backend: str  # "cpu" or "cuda"


@dataclass(frozen=True)
class EngineStatus:
    """The engine's state at one moment, for metrics and health checks."""

    waiting: int
    running: int
    max_sequences: int
    pages: int  # of the KV cache, of `ModelInfo.page_size` tokens each
    free_pages: int
    preemptions: int  # how often a sequence was put back into the queue, since pages ran out
    broken: str | None  # why the engine takes no more requests

    def capacity(self, info: ModelInfo) -> str:
        """How many sequences and tokens there is room for, in the runner's words."""
        tokens = self.pages * info.page_size
        return f"{self.max_sequences} sequences at once, a KV cache of {tokens} tokens"


class Engine(Protocol):
    """Requests in, events out. Every method may be called from any thread and returns at once."""

    info: ModelInfo
    max_requests: int  # that it has at once, running and waiting

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        """Queues a request and returns its id. Raises ValueError for a prompt that is empty, too
        long or has an id outside the vocabulary, and for a parameter out of range, with its name;
        QueueFullError; EngineBrokenError."""
        ...

    def cancel(self, request_id: int) -> None:
        """Ends a request at its next token; its last event says "cancelled". An id that has ended
        already is no error."""
        ...

    def allow(self, request_id: int, mask: bytes) -> None:
        """Says which tokens the next one of a guided request may be: bit i % 8 of byte i // 8 is
        token i's, (vocab_size + 7) // 8 bytes. One call a token; the first may come at once."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while events wait, for `loop.add_reader`."""
        ...

    def take_events(self) -> list[Event]:
        """The events since the last call, in order; empties `fileno`."""
        ...

    def status(self) -> EngineStatus: ...

    def close(self) -> None:
        """Cancels what runs, waits for the thread, frees the device."""
        ...

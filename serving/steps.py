"""A sequence's events as text, one token at a time.

What the engine draws until somebody takes its events comes together, so where an event begins and
ends says nothing about the answer. What ends an answer (a stop string, a call) ends it in the
middle of an event as well: nothing behind that token belongs to the answer.
"""

from collections.abc import Iterator
from typing import NamedTuple

from et_moe.serving.detokenizer import Detokenizer, Tokenizer
from et_moe.serving.interface import Drafts, Event, FinishReason, TokenLogprob


class Step(NamedTuple):
    """A token of an answer. `token_id` is None for news without one: an end, or the prompt's
    log-probabilities."""

    text: str  # that is sure with it, whole characters only
    token_id: int | None
    logprob: TokenLogprob | None = None  # if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first step
    finish_reason: FinishReason | None = None  # "stop" or "length", with the last step


class Steps:
    """Makes steps of a sequence's events, and counts what the answer has of them.

    Args:
        skip_special_tokens: special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens)
        self.ended = False
        self.tokens = 0
        self.drafts = Drafts()

    def end(self) -> None:
        """The step that came last is the answer's last one."""
        self.ended = True

    def of(self, event: Event) -> Iterator[Step]:
        """The steps of the next event, to be used up before the one after it; none behind `end`.
        An error and a cancellation are the caller's business."""
        if self.ended:
            return
        reason = event.finish_reason if event.finish_reason in ("stop", "length") else None
        ids, first = event.token_ids, event.prompt_logprobs
        last = len(ids) - 1
        taken = 0
        for taken, token_id in enumerate(ids, 1):
            self.tokens += 1
            text = self._detokenizer.feed((token_id,))
            end = reason if taken > last else None
            if end is not None:
                text += self._detokenizer.finish()
            logprob = None if event.logprobs is None else event.logprobs[taken - 1]
            yield Step(text, token_id, logprob, first, end)
            first = None
            if self.ended:
                break
        if event.drafts.steps:
            self.drafts += event.drafts.within(taken)
        if not ids and (first is not None or reason is not None):
            text = "" if reason is None else self._detokenizer.finish()
            yield Step(text, None, None, first, reason)

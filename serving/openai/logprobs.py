"""Log-probabilities in the two forms of OpenAI's interface."""

from et_moe.serving.interface import TokenLogprob
from et_moe.serving.served_model import ServedModel

_LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprob(model: ServedModel, token_id: int, logprob: TokenLogprob) -> dict:
    """Of a token, for `choices[].logprobs.content`."""

    def entry(token_id: int, logprob: float) -> dict:
        return {
            "token": model.token_text(token_id),
            "logprob": max(logprob, _LEAST),
            "bytes": list(model.token_bytes(token_id)),
        }

    top = [entry(other, value) for other, value in logprob.top]
    return {**entry(token_id, logprob.logprob), "top_logprobs": top}


class CompletionLogprobs:
    """Collects the lists of `choices[].logprobs` of a completion.

    Args:
        count: alternatives at each place; the drawn token comes besides.
    """

    def __init__(self, model: ServedModel, count: int) -> None:
        self._model, self._count = model, count
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._lists: dict[str, list] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """`logprob` is None for the first token of a prompt, which has no probability."""
        text = self._model.token_text(token_id)
        self._lists["tokens"].append(text)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(text)
        value = None if logprob is None else max(logprob.logprob, _LEAST)
        self._lists["token_logprobs"].append(value)
        self._lists["top_logprobs"].append(self._top(text, logprob))

    def _top(self, text: str, logprob: TokenLogprob | None) -> dict[str, float] | None:
        if logprob is None:
            return None
        top = {
            self._model.token_text(i): max(value, _LEAST) for i, value in logprob.top[: self._count]
        }
        return top | {text: max(logprob.logprob, _LEAST)}

    def take(self) -> dict[str, list]:
        """What was added since the last call."""
        lists = self._lists
        self._clear()
        return lists

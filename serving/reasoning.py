"""Thinking apart from the answer, while the text arrives.

Models of Qwen3's kind think between `<think>` and `</think>` before they answer. Many chat
templates open the thinking themselves, so that the text begins inside of it.
"""

from collections.abc import Iterator
from typing import Literal

from et_moe.serving.tags import held_back

OPEN, CLOSE = "<think>", "</think>"

Channel = Literal["reasoning", "content"]


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends in an open `<think>`."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningParser:
    """Splits a text into reasoning and content.

    Reasoning comes without whitespace around it, and content without the whitespace that follows
    `</think>`. The result does not depend on how the text is cut into pieces.

    Args:
        inside: the prompt has opened the thinking already.
    """

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._state: Literal["start", "reasoning", "between", "content"] = "start"
        self._buffer = ""
        self._begun = False  # Reasoning has had a character that is not whitespace.

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as the text so far says."""
        return self._inside

    def feed(self, text: str) -> Iterator[tuple[Channel, str]]:
        self._buffer += text
        if self._state == "start" and not self._start():
            return
        if self._state == "reasoning":
            yield from self._reason()
        if self._state == "between":
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._state = "content"
        if self._state == "content" and self._buffer:
            yield "content", self._buffer
            self._buffer = ""

    def finish(self) -> Iterator[tuple[Channel, str]]:
        """What was held back, at the end of the text."""
        rest = self._buffer
        if self._inside:
            rest = rest.rstrip() if self._begun else rest.strip()
        if rest:
            yield "reasoning" if self._inside else "content", rest
        self._buffer = ""

    def _start(self) -> bool:
        """Takes a `<think>` at the start away; False while it is too early to say."""
        text = self._buffer.lstrip()
        if len(text) < len(OPEN) and OPEN.startswith(text):
            return False
        if text.startswith(OPEN):
            self._inside, self._buffer = True, text[len(OPEN) :]
        self._state = "reasoning" if self._inside else "content"
        return True

    def _reason(self) -> Iterator[tuple[Channel, str]]:
        head, close, tail = self._buffer.partition(CLOSE)
        if close:
            self._inside, self._state = False, "between"
            text, self._buffer = head.rstrip(), tail
        else:
            text = head[: len(head) - held_back(head, (CLOSE,))].rstrip()
            self._buffer = head[len(text) :]
        if not self._begun:
            text = text.lstrip()
        if text:
            self._begun = True
            yield "reasoning", text

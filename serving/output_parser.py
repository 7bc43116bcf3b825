"""What a model writes, as an answer's parts: reasoning, content and tool calls.

Calls are taken out first, since models also call while they think and an argument may hold any
text; what is left is reasoning or content.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from et_moe.serving.reasoning import ReasoningParser
from et_moe.serving.tags import first_tag, held_back
from et_moe.serving.tool_calls import CallArguments, CallEnd, CallStart, Text, ToolCallParser


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


Part = Reasoning | Content | CallStart | CallArguments | CallEnd

Values = list[Any]


def joined(parts: Iterable[tuple[Part, Values]]) -> list[tuple[Part, Values]]:
    """Parts that go on where the one before them ends, as one; so are the values beside them."""
    result = []
    for _, run in groupby(parts, lambda pair: (type(pair[0]), getattr(pair[0], "index", None))):
        (part, values), *rest = run
        if rest:
            values = [*values, *(value for _, more in rest for value in more)]
            if isinstance(part, CallArguments):
                json = part.json + "".join([other.json for other, _ in rest])
                part = CallArguments(part.index, json)
            else:
                part = type(part)(part.text + "".join([other.text for other, _ in rest]))
        result.append((part, values))
    return result


class StopStrings:
    """Cuts a text that arrives in pieces at the first of some strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._buffer = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What comes before a stop string and cannot be the beginning of one."""
        if self.found is not None:
            return ""
        self._buffer += text
        stop = first_tag(self._buffer, self._strings)
        if stop is not None:
            size, self.found = stop
        else:
            size = len(self._buffer) - held_back(self._buffer, self._strings)
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.found is not None else self._buffer


class OutputParser:
    """Splits an answer; the result does not depend on how the text is cut into pieces.

    Args:
        thinking: the prompt has opened the thinking already.
        tools: name of each function that can be called -> JSON schema of its parameters. Without
            tools nothing is a call.
        stops: strings at which the content ends; in reasoning and arguments they mean nothing.
    """

    def __init__(
        self,
        thinking: bool,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        self._reasoning = ReasoningParser(thinking)
        self._calls = ToolCallParser(tools, lambda: self._reasoning.reasoning) if tools else None
        self._stops = StopStrings(stops)
        self._space = ""  # at the end of the content so far, which a call would make void

    @property
    def reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as the text so far says."""
        return self._reasoning.reasoning

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._calls.calls if self._calls else 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the content; what is fed afterwards is ignored."""
        return self._stops.found

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain by now."""
        parts = self._calls.feed(text) if self._calls else [Text(text)]
        return list(self._split(parts))

    def finish(self, complete: bool = True) -> list[Part]:
        """What was held back; `complete` is false if the answer was cut off."""
        parts = list(self._split(self._calls.finish(complete) if self._calls else []))
        parts += self._texts(self._reasoning.finish())
        rest = self._stops.finish()
        if not self.calls or rest.strip():
            rest = self._space + rest
        return [*parts, Content(rest)] if rest else parts

    def _split(self, parts) -> Iterator[Part]:
        for part in parts:
            if self.stopped is not None:
                return
            if isinstance(part, Text):
                yield from self._texts(self._reasoning.feed(part.text))
            else:
                self._space = ""
                yield part

    def _texts(self, texts) -> Iterator[Part]:
        for channel, text in texts:
            if channel == "reasoning":
                yield Reasoning(text)
                continue
            content = self._space + self._stops.feed(text)
            end = len(content.rstrip()) if self._calls and self.stopped is None else len(content)
            self._space = content[end:]
            if end:
                yield Content(content[:end])

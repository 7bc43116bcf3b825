"""The output items of a response: reasoning, messages and function calls, and the events that tell
a client how they grow (https://platform.openai.com/docs/api-reference/responses-streaming)."""

import copy
import uuid
from collections.abc import Iterator
from typing import Literal

from et_moe.serving.output_parser import Content, Part, Reasoning
from et_moe.serving.tool_calls import CallArguments, CallEnd, CallStart

Status = Literal["completed", "incomplete"]


class _Item:
    """One item; what changes it gives the events that say so.

    Args:
        index: of the item in the output.
        prefix: of its id.
        fields: of its own kind, as they are at its beginning.
    """

    def __init__(self, index: int, prefix: str, **fields) -> None:
        self.fields = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields}
        self._index = index
        self._pieces: list[str] = []

    def open(self) -> Iterator[dict]:
        yield self._whole("added")

    def close(self, status: Status) -> Iterator[dict]:
        self.fields["status"] = status
        yield self._whole("done")

    def _whole(self, what: str) -> dict:
        item = copy.deepcopy(self.fields)
        kind = f"response.output_item.{what}"
        return {"type": kind, "output_index": self._index, "item": item}

    def _event(self, kind: str, **fields) -> dict:
        place = {"item_id": self.fields["id"], "output_index": self._index}
        return {"type": f"response.{kind}", **place, **fields}


class _TextItem(_Item):
    """Reasoning or a message, each of one part."""

    def __init__(self, index: int, kind: type[Reasoning] | type[Content]) -> None:
        self.kind = kind
        if kind is Reasoning:
            super().__init__(index, "rs", type="reasoning", summary=[], content=[])
            self._part: dict = {"type": "reasoning_text", "text": ""}
            self._more: dict[str, list] = {}
        else:
            super().__init__(index, "msg", type="message", role="assistant", content=[])
            self._part = {"type": "output_text", "text": "", "annotations": []}
            self._more = {"logprobs": []}
        self._name = self._part["type"]

    def open(self) -> Iterator[dict]:
        yield from super().open()
        part = {**self._part, **copy.deepcopy(self._more)}
        yield self._event("content_part.added", content_index=0, part=part)

    def add(self, text: str, logprobs: list[dict]) -> Iterator[dict]:
        self._pieces.append(text)
        more = {key: logprobs for key in self._more}
        for key in more:
            self._more[key] += logprobs
        yield self._event(f"{self._name}.delta", content_index=0, delta=text, **more)

    def close(self, status: Status) -> Iterator[dict]:
        text = "".join(self._pieces)
        part = {**self._part, "text": text, **self._more}
        self.fields["content"] = [part]
        yield self._event(f"{self._name}.done", content_index=0, text=text, **self._more)
        yield self._event("content_part.done", content_index=0, part=part)
        yield from super().close(status)


class _CallItem(_Item):
    def __init__(self, index: int, name: str) -> None:
        call_id = f"call_{uuid.uuid4().hex}"
        fields = {"call_id": call_id, "name": name, "arguments": ""}
        super().__init__(index, "fc", type="function_call", **fields)

    def add(self, text: str) -> Iterator[dict]:
        self._pieces.append(text)
        yield self._event("function_call_arguments.delta", delta=text)

    def close(self, status: Status) -> Iterator[dict]:
        self.fields["arguments"] = text = "".join(self._pieces)
        if status == "completed":  # Clients may run what they are told is done.
            yield self._event("function_call_arguments.done", arguments=text)
        yield from super().close(status)


class Output:
    """The items of one response. Text that stands inside of a call is an item after it, so that
    several may be open at once."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._text: _TextItem | None = None
        self._calls: dict[int, _CallItem] = {}

    def fields(self) -> list[dict]:
        """The items as they are; those that are open have no text before `finish`."""
        return [item.fields for item in self._items]

    def add(self, part: Part, logprobs: list[dict]) -> Iterator[dict]:
        """The events of a part, which are to be used up.

        Args:
            logprobs: of the part's tokens, if it is content and they were asked for.
        """
        if isinstance(part, Reasoning | Content):
            if self._text is None or self._text.kind is not type(part):
                yield from self._end_text("completed")
                self._text = _TextItem(len(self._items), type(part))
                yield from self._opened(self._text)
            yield from self._text.add(part.text, logprobs)
        elif isinstance(part, CallStart):
            yield from self._end_text("completed")
            call = self._calls[part.index] = _CallItem(len(self._items), part.name)
            yield from self._opened(call)
        elif isinstance(part, CallArguments):
            yield from self._calls[part.index].add(part.json)
        elif isinstance(part, CallEnd):
            yield from self._calls.pop(part.index).close("completed")

    def finish(self, status: Status) -> Iterator[dict]:
        """Closes what is open, in the state that the answer has ended in."""
        yield from self._end_text(status)
        while self._calls:
            yield from self._calls.pop(min(self._calls)).close(status)

    def _opened(self, item: _Item) -> Iterator[dict]:
        self._items.append(item)
        yield from item.open()

    def _end_text(self, status: Status) -> Iterator[dict]:
        text, self._text = self._text, None
        if text is not None:
            yield from text.close(status)

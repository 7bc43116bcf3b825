"""Tool calls in the XML of Qwen3.5 and Qwen3-Coder, while the text arrives:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Arguments become JSON by the types of the tool's schema; strings are passed on piece by piece. The
result does not depend on how the text is cut into pieces. What is not a call is text, and none of
it is lost. Slips that models are known for are read as they are meant: a missing `<tool_call>`,
closing tags that are left out, several functions in one `<tool_call>`, text before the first
parameter. The JSON that Qwen3-Next writes between `<tool_call>` and `</tool_call>` is understood,
too.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from et_moe.serving.tags import first_tag, held_back
from et_moe.serving.tool_arguments import STRING, argument_json, parameter_types

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

_NAME = re.compile(r"[^<>\n]{1,256}\Z")


@dataclass(frozen=True)
class Text:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of the function `name` begins; `index` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the call's arguments, which are one JSON object when it has ended."""

    index: int
    json: str


@dataclass(frozen=True)
class CallEnd:
    index: int


Part = Text | CallStart | CallArguments | CallEnd


class _Value:
    """The value of one parameter. One line break after the opening and one before the closing tag
    belong to the format."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._held = ""
        self._pieces: list[str] = []
        self._begun = False

    def add(self, text: str) -> str:
        """The JSON that can be said by now."""
        if not self._begun and text:
            self._begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if self._types == STRING:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._pieces.append(text)
        return ""

    def start(self) -> str:
        return '"' if self._types == STRING else ""

    def end(self) -> str:
        return '"' if self._types == STRING else argument_json("".join(self._pieces), self._types)


class ToolCallParser:
    """Finds tool calls in a text.

    Args:
        tools: name of each function that can be called -> JSON schema of its parameters.
        only_known: called where a call begins; whether it may be of a function in `tools` only.
            Where a model may write about calls, a name that nobody offered is not one.
    """

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]], only_known: Callable[[], bool] = lambda: False
    ) -> None:
        self._tools, self._only_known = tools, only_known
        self._buffer = ""
        self._state = self._in_text
        self._calls = 0
        self._name = ""  # of the function that is called
        self._given: set[str] = set()  # names of its parameters so far
        self._value = _Value(STRING)
        self._stray = False  # There was text between the parameters.
        self._ended = False

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._calls

    def feed(self, text: str) -> Iterator[Part]:
        """What is certain by now. The iterator is to be used up before the next call."""
        self._buffer += text
        yield from self._run()

    def finish(self, complete: bool = True) -> Iterator[Part]:
        """What was held back.

        Args:
            complete: the model has ended its answer, so that a call without its closing tags is
                whole. False if the answer was cut off: arguments are then left unfinished.
        """
        self._ended = True
        yield from self._run()
        rest, self._buffer = self._buffer, ""
        if self._state in (self._in_text, self._in_head, self._in_json):
            yield from self._text(rest)
        elif self._state == self._in_value:
            yield from self._arguments(self._value.add(rest))
            if complete:
                yield from self._arguments(self._value.end())
        if complete and self._state in (self._in_value, self._in_body):
            yield from self._end_call()

    def _run(self) -> Iterator[Part]:
        """Runs the states until one needs more text; each says by False that it does."""
        while (yield from self._state()):
            pass

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    @staticmethod
    def _text(text: str) -> Iterator[Part]:
        if text:
            yield Text(text)

    def _arguments(self, text: str) -> Iterator[Part]:
        if text:
            yield CallArguments(self._calls - 1, text)

    def _in_text(self) -> Iterator[Part]:
        tags = (CALL, FUNCTION)
        found = first_tag(self._buffer, tags)
        size = found[0] if found else len(self._buffer) - held_back(self._buffer, tags)
        yield from self._text(self._take(size))
        if found:
            self._state = self._in_head
        return bool(found)

    def _in_head(self) -> Iterator[Part]:
        """The buffer begins with `<tool_call>` or `<function=`."""
        opened = CALL if self._buffer.startswith(CALL) else ""
        rest = self._buffer[len(opened) :].lstrip()
        if opened and rest.startswith("{"):
            self._state = self._in_json
            return True
        if len(rest) < len(FUNCTION) and FUNCTION.startswith(rest) and not self._ended:
            return False
        if rest.startswith(FUNCTION):
            name, closed, body = rest[len(FUNCTION) :].partition(">")
            if not closed and _NAME.match(name or "x") and not self._ended:
                return False
            known = name.strip() in self._tools
            if closed and _NAME.match(name) and (known or (opened and not self._only_known())):
                self._buffer = body
                yield from self._start_call(name.strip())
                return True
        self._state = self._in_text
        yield from self._text(self._take(len(opened or FUNCTION)))
        return True

    def _start_call(self, name: str) -> Iterator[Part]:
        self._name, self._given, self._stray = name, set(), False
        self._calls += 1
        self._state = self._in_body
        yield CallStart(self._calls - 1, name)

    def _end_call(self) -> Iterator[Part]:
        yield from self._arguments("}" if self._given else "{}")
        yield CallEnd(self._calls - 1)
        self._state = self._after_call

    def _in_body(self) -> Iterator[Part]:
        """Between the parameters of a call."""
        tags = (PARAMETER, FUNCTION_END, CALL_END)
        found = first_tag(self._buffer, tags)
        size = found[0] if found else len(self._buffer) - held_back(self._buffer, tags)
        stray = self._take(size)
        if not self._stray:
            stray = stray.lstrip()
        self._stray = self._stray or bool(stray)
        yield from self._text(stray)
        if not found:
            return False
        if found[1] != PARAMETER:
            self._take(len(FUNCTION_END) if found[1] == FUNCTION_END else 0)
            yield from self._end_call()
            return True
        name, closed, rest = self._buffer[len(PARAMETER) :].partition(">")
        if not closed and _NAME.match(name or "x"):
            return False
        if not closed or not _NAME.match(name):
            self._stray = True
            yield from self._text(self._take(len(PARAMETER)))
            return True
        self._buffer = rest
        yield from self._start_value(name.strip())
        return True

    def _start_value(self, name: str) -> Iterator[Part]:
        schema = self._tools.get(self._name, {})
        self._value = _Value(parameter_types(schema, name))
        key = ("{" if not self._given else ", ") + json.dumps(name, ensure_ascii=False) + ": "
        yield from self._arguments(key + self._value.start())
        self._given.add(name)
        self._stray = False
        self._state = self._in_value

    def _in_value(self) -> Iterator[Part]:
        tags = (PARAMETER_END, FUNCTION_END, PARAMETER)
        found = first_tag(self._buffer, tags)
        size = found[0] if found else len(self._buffer) - held_back(self._buffer, tags)
        yield from self._arguments(self._value.add(self._take(size)))
        if not found:
            return False
        ends = self._ends_value(found[1])
        if ends is None:
            return False
        if not ends:
            yield from self._arguments(self._value.add(self._take(len(found[1]))))
            return True
        self._take(len(PARAMETER_END) if found[1] == PARAMETER_END else 0)
        yield from self._arguments(self._value.end())
        self._state = self._in_body
        return True

    def _ends_value(self, tag: str) -> bool | None:
        """Whether the tag at the start of the buffer ends the value or is a part of it, which what
        follows decides; None while that is not there."""
        rest = self._buffer[len(tag) :]
        if tag == PARAMETER:  # The value's own closing tag was left out.
            name, closed, _ = rest.partition(">")
            if not closed:
                return None if _NAME.match(name or "x") and not self._ended else False
            declared = self._tools.get(self._name, {}).get("properties") or {}
            return name.strip() in declared and name.strip() not in self._given
        rest = rest.lstrip()
        if tag == PARAMETER_END:
            followers = (PARAMETER, FUNCTION_END, CALL_END)
        else:
            followers = (CALL_END, FUNCTION)
        if rest.startswith(followers):
            return True
        if any(follower.startswith(rest) for follower in followers):
            return True if self._ended else None
        return False

    def _after_call(self) -> Iterator[Part]:
        """Takes the closing `</tool_call>` away, if there is one."""
        yield from ()
        rest = self._buffer.lstrip()
        if rest.startswith(FUNCTION):
            self._buffer, self._state = rest, self._in_head
            return True
        if rest.startswith(CALL_END):
            self._buffer = rest[len(CALL_END) :]
        elif CALL_END.startswith(rest) or FUNCTION.startswith(rest):
            return False
        self._state = self._in_text
        return True

    def _in_json(self) -> Iterator[Part]:
        """The buffer begins with `<tool_call>` and a brace."""
        end = self._buffer.find(CALL_END)
        if end < 0:
            return False
        body = self._take(end + len(CALL_END))
        self._state = self._in_text
        call = _json_call(body[len(CALL) : -len(CALL_END)])
        if call is None or (call[0] not in self._tools and self._only_known()):
            yield from self._text(body)
            return True
        self._calls += 1
        index = self._calls - 1
        yield from (CallStart(index, call[0]), CallArguments(index, call[1]), CallEnd(index))
        return True


def _json_call(text: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a call in JSON; None if it is none."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)

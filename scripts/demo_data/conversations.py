"""Conversations that the demo model is trained on: made of templates, words, and Python's docs."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from et_moe.scripts.demo_data.library import Fact, english
from et_moe.scripts.demo_data.talk import TEXTS, Talk
from et_moe.scripts.demo_data.tools import ToolMaker, Use
from et_moe.scripts.demo_data.words import WORDS, Slots

Message = dict[str, Any]
MOST_TOOLS = 4
_TELL = TEXTS["tell"]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one line.",
    "Be brief.",
    "You answer questions about Python.",
    "Use the tools where they help.",
    "You are a friendly assistant.",
]


@dataclass
class Conversation:
    """A conversation whose last message is the answer to learn."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    thinking: bool
    """Whether the model may think before the last answer."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(content: str, thought: str = "", calls: list[dict] | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content, "reasoning_content": thought}
    return message | ({"tool_calls": calls} if calls else {})


class Maker:
    """Draws conversations.

    Args:
        facts: of the standard library.
        rng: where the draws come from.
        held_out: makes them of words that training never sees.
    """

    def __init__(self, facts: list[Fact], rng: random.Random, held_out: bool = False) -> None:
        self._facts = facts + 2 * [fact for fact in facts if fact.module in WORDS["well_known"]]
        self._rng = rng
        self._slots = Slots(rng, english(facts), held_out)
        self._talk, self._tools = Talk(self._slots), ToolMaker(self._slots)
        talk = self._talk
        self._single: list[tuple[int, str, Callable[[], tuple[str, str, str]]]] = [
            (36, "library", self._library),
            (9, "talk", lambda: (*talk.small_talk(), "")),
            (9, "repeat", lambda: (*talk.repeat(), "")),
            (3, "say", lambda: (*talk.say(), "")),
            (3, "count", lambda: (*talk.count(), "")),
            (4, "pick", lambda: (*talk.pick(), "")),
            (4, "json", lambda: (*talk.as_json(), "")),
            (2, "sum", lambda: (*talk.sum(), "")),
            (7, "program", lambda: (*talk.program(), "They want a short program.")),
            (2, "untold", self._untold),
            (4, "unknown", lambda: (*talk.unknown(), "")),
        ]

    def conversation(self) -> Conversation:
        """One to four exchanges, the last of which ends where the model answers."""
        rng = self._rng
        messages: list[Message] = []
        uses: list[Use] = []
        told: dict[str, str] = {}
        with_tools = rng.random() < 0.55
        if with_tools:
            uses = [self._tools.use() for _ in range(rng.choice([1, 1, 1, 2]))]
        me = self._system(messages, told)
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3])):
            self._earlier(messages, uses, told)
        kind = self._last(messages, uses, told, me)
        tools = self._tools.tools(uses, MOST_TOOLS) if uses else []
        thinking = rng.random() < 0.7
        last = messages[-1]
        if not thinking or rng.random() < 0.35:
            last["reasoning_content"] = ""
        return Conversation(kind, messages, tools, thinking)

    def _system(self, messages: list[Message], told: dict[str, str]) -> str:
        """Perhaps begins with a system message, which may tell something of the user; the name that
        the model has by it."""
        rng, slots = self._rng, self._slots
        draw = rng.random()
        if draw > 0.35:
            return ""
        name = slots.name() if draw < 0.08 else ""
        said = [f"You are {name}."] if name else []
        if draw < 0.16:
            key = rng.choice(["name", "city", "job"])
            told[key] = str(slots.draw(_TELL[key]["kind"]))
            ways = {
                "name": "The user is called {}.|The name of the user is {}.",
                "city": "The user lives in {}.|The user is in {}.",
                "job": "The user works as a {}.|The user is a {}.",
            }
            said.append(rng.choice(ways[key].split("|")).format(told[key]))
        if not said or rng.random() < 0.4:
            said.append(rng.choice([*SYSTEMS, f"You are a {slots.draw('job')}.", slots.phrase(8)]))
        rng.shuffle(said)
        messages.append({"role": "system", "content": " ".join(said)})
        return name

    def _earlier(self, messages: list[Message], uses: list[Use], told: dict[str, str]) -> None:
        """Adds a whole exchange."""
        draw = self._rng.random()
        if draw < 0.3:
            messages += self._tell(told)
        elif uses and draw < 0.75:
            messages += self._tool_exchange(self._rng.choice(uses).again())
        else:
            question, answer, _ = self._plain()[1]
            messages += [user(question), assistant(answer)]

    def _last(self, messages: list[Message], uses: list[Use], told: dict[str, str], me: str) -> str:
        """Adds the exchange to learn, up to an answer of the model; its kind."""
        rng = self._rng
        if told and rng.random() < 0.5:
            question, answer, thought = self._recall(told)
            messages += [user(question), assistant(answer, thought)]
            return "recall"
        if uses and rng.random() < 0.8:
            return self._last_tool(messages, rng.choice(uses).again())
        if rng.random() < (0.4 if me else 0.03):
            question = rng.choice(["What is your name?", "Who are you?", "What are you called?"])
            name = f"I am {me}." if me else "I am the demo model of et-moe."
            messages += [user(question), assistant(name)]
            return "name"
        if not uses and rng.random() < 0.05:
            question = self._asked_with_tool(self._tools.use().request)
            thought = rng.choice(["There is no tool for that.", "I have no tools."])
            messages += [user(question), assistant("I have no tool for that.", thought)]
            return "no tool"
        if not uses and rng.random() < 0.06:
            messages += self._tell(told)
            return "told"
        kind, (question, answer, thought) = self._plain()
        messages += [user(question), assistant(answer, thought)]
        return kind

    def _plain(self) -> tuple[str, tuple[str, str, str]]:
        """A kind; question, answer and thought."""
        weights = [weight for weight, *_ in self._single]
        _, kind, make = self._rng.choices(self._single, weights)[0]
        return kind, make()

    # The standard library.

    def _library(self) -> tuple[str, str, str]:
        rng = self._rng
        if rng.random() < 0.08:
            return self._not_in_library()
        fact = rng.choice(self._facts)
        written = rng.choice([fact.name, fact.name, f"`{fact.name}`"])
        thought = rng.choice([f"They ask about {fact.name}.", f"This is about {fact.module}."])
        kind, last = fact.kind, fact.name.rsplit(".", 1)[-1]
        about = [
            f"What does {written} do?",
            f"What is {written}?",
            f"Tell me about {written}.",
            f"Explain {written}.",
            f"What is {written} for?",
            f"what does {fact.name} do",
            f"{fact.name}?",
            f"What does the {kind} {written} do?",
            f"Describe {written} in one line.",
        ]
        if kind == "module":
            about.append(f"What is the module {written} for?")
            imports = [f"How do I import {fact.name}?", f"Import the module {fact.name}."]
            if rng.random() < 0.2:
                return rng.choice(imports), f"```python\nimport {fact.name}\n```", thought
        draw = rng.random()
        if draw < 0.12 and kind in ("function", "class") and "." in fact.name:
            ask = [f"Which module has {last}?", f"Where is {last}?", f"Where do I find {last}?"]
            line = f"```python\nfrom {fact.module} import {last}\n```"
            if rng.random() < 0.5:
                return f"How do I import {last} from {fact.module}?", line, thought
            return rng.choice(ask), f"`{last}` is in the module `{fact.module}`.", thought
        if draw < 0.27 and fact.call:
            ask = [f"How do I call {written}?", f"What are the arguments of {written}?"]
            ask.append(f"What is the signature of {written}?")
            return rng.choice(ask), f"`{fact.call}`", thought
        if draw < 0.4 and kind != "module":
            plain = fact.summary[0].lower() + fact.summary[1:].rstrip(".")
            ask = [f"Which {kind} is this: {plain}?", f"What is called so: {plain}?"]
            if plain.split()[0] in WORDS["imperatives"]:
                ask = [f"How do I {plain}?", f"What do I use to {plain}?"]
            return rng.choice(ask), f"`{fact.name}`: {fact.summary}", thought
        return rng.choice(about), f"`{fact.name}`: {fact.summary}", thought

    def _not_in_library(self) -> tuple[str, str, str]:
        rng, slots = self._rng, self._slots
        module = rng.choice([slots.word(), rng.choice(self._facts).module])
        name = rng.choice(
            [f"{module}.{slots.word()}", slots.invented(), f"{module}.{slots.invented()}"]
        )
        ask = ["What does {} do?", "What is {}?", "Tell me about {}.", "How do I call {}?", "{}?"]
        ask.append("Explain {}.")
        return rng.choice(ask).format(name), f"I do not know `{name}`.", f"They ask about {name}."

    # What the user tells of themselves.

    def _tell(self, told: dict[str, str]) -> list[Message]:
        rng, slots = self._rng, self._slots
        key = rng.choice(list(_TELL))
        tell = _TELL[key]
        told[key] = str(slots.draw(tell["kind"]))
        text = rng.choice(tell["ways"]).format(told[key])
        return [user(text), assistant(tell["reply"].format(told[key]))]

    def _recall(self, told: dict[str, str]) -> tuple[str, str, str]:
        key = self._rng.choice(list(told))
        questions = _TELL[key]["questions"]
        question, answer = self._rng.choice(questions)
        thought = f"They said it: {told[key]}."
        return question, answer.format(told[key]), thought

    def _untold(self) -> tuple[str, str, str]:
        key = self._rng.choice(list(_TELL))
        question, _ = self._rng.choice(_TELL[key]["questions"])
        return question, "I do not know that: you have not told me.", "They have not said it."

    # Tools.

    def _asked_with_tool(self, request: str) -> str:
        rng = self._rng
        if rng.random() < 0.2:
            request += rng.choice(
                [" Use the tool.", " Use a tool.", " Please use the tool.", " Call the tool."]
            )
        if rng.random() < 0.1:
            request = request[0].lower() + request[1:]
        return request

    def _thought(self, use: Use) -> str:
        values = ", ".join(f"{name} {value}" for name, value in use.arguments.items())
        return self._rng.choice(
            [
                f"I should call {use.name}.",
                f"{use.name} can do that.",
                f"I call {use.name} with {values}." if values else f"I call {use.name}.",
                f"The user wants {use.aim}: {use.name}.",
            ]
        )

    def _result(self, use: Use) -> Message:
        if len(use.result) == 1 and self._rng.random() < 0.3:
            text = str(next(iter(use.result.values())))
        else:
            text = json.dumps(use.result)
        return {"role": "tool", "content": text}

    def _tool_exchange(self, use: Use) -> list[Message]:
        call = assistant("", self._thought(use), [use.call()])
        answer = assistant(use.answer, self._rng.choice(["", "The tool has answered."]))
        return [user(self._asked_with_tool(use.request)), call, self._result(use), answer]

    def _last_tool(self, messages: list[Message], use: Use) -> str:
        rng = self._rng
        whole = self._tool_exchange(use)
        if rng.random() < 0.08:
            other = use.again()
            joined = f"{whole[0]['content'].rstrip('.')} And then: {other.request}"
            calls = [use.call(), other.call()]
            messages += [user(joined), assistant("", f"Two calls of {use.name}.", calls)]
            return "two calls"
        if rng.random() < 0.4:
            messages += whole
            return "tool answer"
        messages += whole[:2]
        return "tool call"

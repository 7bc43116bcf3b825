"""Small talk, repeating, counting, picking, and short programs: questions and answers of a line."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

from et_moe.scripts.demo_data.words import WORDS, Slots

Pair = tuple[str, str]
"""A question and its answer."""

TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""Questions and answers, by purpose."""


class Talk:
    """Draws questions with their answers."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._rng = slots, slots.rng

    def small_talk(self) -> Pair:
        rng = self._rng
        if rng.random() < 0.25:
            said = rng.choice(TEXTS["greetings"])
            text = said + rng.choice(["!", ".", "", ", how can you help me?", " :)"])
            answer = said.split(" there")[0]
            return self._cased(text), f"{answer}! How can I help you?"
        talk = rng.choice(TEXTS["talk"])
        return self._cased(rng.choice(talk["questions"])), talk["answer"]

    def _cased(self, text: str) -> str:
        """Now and then as people type: in lower case, without the last sign."""
        rng = self._rng
        if rng.random() < 0.2:
            text = text[0].lower() + text[1:]
        return text.rstrip(".!?") or text if rng.random() < 0.2 else text

    def repeat(self) -> Pair:
        """Something to say again, exactly."""
        rng, slots = self._rng, self._slots
        draws: list[Callable[[], str]] = [
            lambda: slots.phrase(8),
            lambda: slots.phrase(3),
            slots.foreign,
            lambda: f"{slots.foreign()} {slots.word()}",
            slots.code,
            slots.full_name,
            lambda: slots.phrase(6).capitalize() + ".",
            lambda: " ".join(str(slots.integer()) for _ in range(rng.randint(1, 6))),
            lambda: "".join(slots.invented() for _ in range(2)),
            lambda: ", ".join(slots.word() for _ in range(rng.randint(2, 6))),
        ]
        text = rng.choice(draws)()
        ask = rng.choice(TEXTS["ask"]["repeat"])
        if rng.random() < 0.15:
            return f'Say "{text}".', text
        return ask.format(text), text

    def say(self) -> Pair:
        """Something short to say."""
        rng = self._rng
        words = ["hello", "hi", "yes", "no", "goodbye", "thanks", "good morning", "sorry", "please"]
        word = rng.choice(words) if rng.random() < 0.7 else self._slots.word()
        ask = rng.choice(TEXTS["ask"]["say"])
        end = "!" if word in words else "."
        return ask.format(word), word.capitalize() + end

    def count(self) -> Pair:
        """Counting, in words or digits, as the question does."""
        rng = self._rng
        first, last = 1, rng.randint(2, 20)
        in_words = rng.random() < 0.5
        if rng.random() < 0.4:
            first = rng.randint(1, 18)
            last = rng.randint(first + 1, min(first + 12, 20))
        shown = WORDS["number_words"] if in_words else [str(n) for n in range(1, 21)]
        begin, end = shown[first - 1], shown[last - 1]
        if first == 1 and rng.random() < 0.6:
            ask = rng.choice(
                ["Count to {e}.", "Please count to {e}.", "Count up to {e}", "count to {e}"]
            )
        else:
            ask = rng.choice(
                ["Count from {b} to {e}.", "Count from {b} up to {e}", "Count {b} to {e}."]
            )
        counted = ", ".join(shown[first - 1 : last])
        return ask.format(b=begin, e=end), counted[0].upper() + counted[1:] + "."

    def pick(self) -> Pair:
        """One of a list, by its place."""
        rng = self._rng
        items = list(dict.fromkeys(self._slots.word() for _ in range(rng.randint(2, 5))))
        places = {"first": 0, "last": len(items) - 1}
        places |= {
            word: n for n, word in enumerate(["second", "third", "fourth"], 1) if n < len(items)
        }
        place = rng.choice(list(places))
        ask = rng.choice(TEXTS["ask"]["pick"])
        return ask.format(p=place, l=", ".join(items)), items[places[place]].capitalize() + "."

    def as_json(self) -> Pair:
        """Facts of a sentence as a JSON object."""
        rng, slots = self._rng, self._slots
        person = {"name": slots.name(), "city": slots.city(), "age": rng.randint(1, 99)}
        person["job"] = str(slots.draw("job"))
        keys = rng.sample(list(person), rng.randint(1, 4))
        text = ", ".join(f"{key} {person[key]}" for key in keys)
        ask = rng.choice(TEXTS["ask"]["json"])
        return ask.format(text), json.dumps({key: person[key] for key in keys})

    def unknown(self) -> Pair:
        """What so small a model cannot know."""
        rng, slots = self._rng, self._slots
        ask = rng.choice(TEXTS["unknown"]).format(
            x=slots.word(), n=slots.full_name(), c=slots.city()
        )
        return self._cased(ask), TEXTS["unknown_answer"]

    def sum(self) -> Pair:
        """Two numbers of one digit."""
        a, b = self._rng.randint(0, 9), self._rng.randint(0, 9)
        ask = self._rng.choice(
            ["What is {a} + {b}?", "{a} + {b}", "What is {a} plus {b}?", "Add {a} and {b}."]
        )
        return ask.format(a=a, b=b), f"{a} + {b} = {a + b}"

    def program(self) -> Pair:
        rng, slots = self._rng, self._slots
        program = rng.choice(TEXTS["program"])
        x, y, z = (slots.word() for _ in range(3))
        begin = slots.integer()
        values = {
            "a": begin,
            "b": begin + slots.integer(),
            "f": rng.choice([slots.word(), f"{slots.word()}_{slots.word()}"]),
            "c": slots.word().capitalize(),
            "text": slots.phrase(3),
            "path": slots.path(),
        } | {"x": x, "y": y, "z": z}
        code = program["code"].format(**values)
        return rng.choice(program["questions"]).format(**values), f"```python\n{code}\n```"

"""Words and values that fill the generated conversations.

A tenth of all words, chosen by their checksum, is held out: `Slots` draws from these alone, or from
the others alone. Many words are made of syllables or letters, so that a model has to copy them:
nobody can know them by heart.
"""

import random
import string
import tomllib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

WORDS = {
    name: words.split()
    for name, words in tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    ).items()
}
"""Lists of words, by name."""

_CODAS = ["", "", "", "l", "n", "r", "s", "t", "x", "ck", "nd", "m"]


def is_held_out(word: str) -> bool:
    """Whether a word may occur in held-out conversations alone."""
    return zlib.crc32(word.encode()) % 10 == 9


class Slots:
    """Draws words and values.

    Args:
        rng: where the draws come from.
        english: words to draw besides the lists'.
        held_out: draws only words that training never sees, else only the others.
    """

    def __init__(self, rng: random.Random, english: Sequence[str], held_out: bool = False) -> None:
        self.rng, self._held_out = rng, held_out
        self._english = [word for word in english if is_held_out(word) == held_out]

    def of(self, words: list[str]) -> str:
        """One of the words."""
        return self._allowed(lambda: self.rng.choice(words))

    def _allowed(self, draw: Callable[[], str]) -> str:
        while is_held_out(word := draw()) != self._held_out:
            pass
        return word

    def invented(self) -> str:
        """A word that does not exist, in lower case."""
        part = lambda: "".join(map(self.rng.choice, (WORDS["onsets"], WORDS["vowels"], _CODAS)))  # noqa: E731
        letters = string.ascii_lowercase
        if self.rng.random() < 0.3:
            return self._allowed(
                lambda: "".join(self.rng.choices(letters, k=self.rng.randint(3, 8)))
            )
        return self._allowed(lambda: "".join(part() for _ in range(self.rng.randint(2, 3))))

    def _proper(self, words: list[str]) -> str:
        draw = self.rng.random()
        if draw < 0.2:
            return self.rng.choice(self._english).capitalize()
        return self.of(words) if draw < 0.6 else self.invented().capitalize()

    def name(self) -> str:
        return self._proper(WORDS["names"])

    def full_name(self) -> str:
        return f"{self.name()} {self.invented().capitalize()}"

    def city(self) -> str:
        """A place; one in seven of two words, such as "New York"."""
        if self.rng.random() < 1 / 7:
            first = self.rng.choice(
                ["New", "San", "Port", "Saint", "Upper", "Los", "North", "Fort"]
            )
            return f"{first} {self._proper(WORDS['cities'])}"
        return self._proper(WORDS["cities"])

    def thing(self) -> str:
        return self.of(WORDS["things"])

    def word(self) -> str:
        """Any single word in lower case."""
        draw = self.rng.random()
        if draw < 0.2:
            return self.invented()
        if draw < 0.65:
            return self.rng.choice(self._english)
        return self.of(self.rng.choice([WORDS["things"], WORDS["animals"], WORDS["colors"]]))

    def phrase(self, most: int = 5) -> str:
        """One to `most` words."""
        return " ".join(self.word() for _ in range(self.rng.randint(1, most)))

    def foreign(self) -> str:
        """One to four pieces of text that are not ASCII, most of them, or random characters."""
        pieces = []
        for _ in range(self.rng.randint(1, 4)):
            if self.rng.random() < 0.7:
                pieces.append(self.rng.choice(WORDS["foreign"]))
            else:
                begin = self.rng.choice([0xC0, 0x391, 0x410, 0x3042, 0x4E00, 0x1F600])
                pieces.append("".join(chr(begin + self.rng.randrange(40)) for _ in range(2)))
        return self.rng.choice([" ", " ", ""]).join(pieces)

    def integer(self, least: int = 1, most: int = 1000) -> int:
        """A number; small ones are likelier."""
        most = self.rng.choice([min(most, 20), min(most, 100), most])
        return self.rng.randint(least, max(least, most))

    def decimal(self) -> float:
        return self.rng.randint(1, 2000) / self.rng.choice([2, 4, 5, 10, 100])

    def code(self) -> str:
        """Letters and digits, such as "QX-4417" or "k81b"."""
        rng = self.rng
        letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
        digits = "".join(rng.choices(string.digits, k=rng.randint(2, 5)))
        text = letters + rng.choice(["-", "", "_"]) + digits
        return text if rng.random() < 0.7 else text.lower()

    def date(self) -> str:
        rng = self.rng
        day, month = rng.randint(1, 28), rng.randint(1, 12)
        if rng.random() < 0.5:
            return f"{rng.randint(2020, 2032)}-{month:02}-{day:02}"
        return f"{WORDS['months'][month - 1]} {day}"

    def time(self) -> str:
        return f"{self.rng.randint(0, 23):02}:{self.rng.randrange(0, 60, 5):02}"

    def email(self) -> str:
        host, end = self.invented(), self.rng.choice(["com", "org", "net", "de", "io"])
        return f"{self.name().lower()}@{host}.{end}"

    def path(self) -> str:
        end = self.rng.choice(["txt", "py", "csv", "md", "json", "log"])
        folders = [self.word() for _ in range(self.rng.randint(0, 2))]
        return "/".join([*folders, f"{self.word()}.{end}"])

    def expression(self) -> str:
        a, b = self.integer(), self.integer()
        return f"{a} {self.rng.choice('+-*/')} {b}"

    def draw(self, kind: str) -> str | int | float | bool:
        """A value of a kind: a method's name above, or one of a few lists."""
        lists = {
            "color": WORDS["colors"],
            "animal": WORDS["animals"],
            "job": WORDS["jobs"],
            "language": WORDS["languages"],
        }
        if kind in lists:
            return self.of(lists[kind])
        fixed = {
            "sky": WORDS["skies"],
            "weekday": WORDS["weekdays"],
            "currency": WORDS["currencies"],
            "unit": WORDS["units"],
        }
        if kind in fixed:
            return self.rng.choice(fixed[kind])
        if kind == "boolean":
            return self.rng.random() < 0.5
        if kind == "degrees":
            return self.rng.randint(-15, 40)
        if kind == "percent":
            return self.rng.randint(0, 100)
        return getattr(self, kind)()

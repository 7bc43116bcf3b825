"""Kinds of tools that people know, with ways to ask for them and to tell what they found."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parameter:
    """One parameter; `key` is what templates call it, `names` what a tool may."""

    key: str
    names: list[str]
    kind: str
    description: str
    optional: bool = False
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Family:
    """Tools for one purpose.

    Requests are templates over the keys of parameters, the answer over those and the result's. A
    request that names an optional parameter is made of tools that have it.
    """

    aim: str
    names: list[str]
    descriptions: list[str]
    parameters: list[Parameter]
    requests: list[str]
    result: dict[str, str]
    """Key -> kind of its value."""
    answer: str


def _read() -> list[Family]:
    file = Path(__file__).with_suffix(".toml")
    families = tomllib.loads(file.read_text(encoding="utf-8"))["family"]
    for family in families:
        family["names"] = family["names"].split()
        family["parameters"] = [
            Parameter(**(p | {"names": p["names"].split()})) for p in family["parameters"]
        ]
    return [Family(**family) for family in families]


FAMILIES = _read()

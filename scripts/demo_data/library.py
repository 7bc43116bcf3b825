"""What Python's standard library says of itself: modules, functions and classes in a line each."""

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from et_moe.scripts.demo_data.words import WORDS

TYPES = (str, list, dict, set, bytes, int, float, tuple)
LONGEST = 180  # characters of a line
_SIGNATURE = re.compile(r"[\w.]+\(.*?\)(?: -+>? ([^>]*))?(?:$| )")
"""A signature, and what it says of its result."""


@dataclass(frozen=True)
class Fact:
    """What the library says of one name."""

    kind: str
    """ "module", "function", "class" or "method"."""
    module: str
    """Its module; of a method, its type."""
    name: str
    """As it is written after an import of the module, such as `os.path.join`; of a built-in, its
    name alone."""
    call: str
    """How it is called, such as `join(a, *p)`; empty if that is not known."""
    summary: str
    """The first sentence of its documentation."""


def _usable(paragraph: str) -> str:
    """The first sentence of a paragraph, with a full stop; empty if it is no use."""
    sentence = paragraph.split(". ")[0].rstrip(".:")
    plain = sentence.isascii() and "->" not in sentence and " = " not in sentence
    if not plain or not 12 <= len(sentence) < LONGEST or not sentence[0].isalpha():
        return ""
    return "" if _SIGNATURE.match(sentence) else sentence[0].upper() + sentence[1:] + "."


def first_sentence(doc: object) -> str:
    """The first sentence of a docstring, on one line, with a full stop; empty if it is no use.

    A signature in front of it is left out. If nothing follows one, what it says of its result is
    the sentence.
    """
    if not isinstance(doc, str):
        return ""
    first, *others = [" ".join(text.split()) for text in inspect.cleandoc(doc).split("\n\n")]
    if not (signature := _SIGNATURE.match(first)):
        return _usable(first)
    result = re.split(r" [\w.]+\(", signature[1] or "")[0]  # in front of another signature
    sentences = [*map(_usable, others[:1]), _usable(result) if result.count(" ") > 1 else ""]
    return next(filter(None, sentences), "")


def _call_of(name: str, value: object) -> str:
    """The call with its parameters, without annotations; empty if it is unknown or long."""
    try:
        parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return ""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    text = f"{name}{inspect.Signature(bare)}"
    try:
        ast.parse(f"def {text}: ...")
    except SyntaxError:  # a default that has no literal
        return ""
    return text if len(text) <= 70 else ""


def _members(module: ModuleType, name: str) -> Iterator[Fact]:
    public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for member in sorted(public):
        value = getattr(module, member, None)
        if not callable(value) or (inspect.isclass(value) and issubclass(value, BaseException)):
            continue
        if summary := first_sentence(value.__doc__):
            kind = "class" if inspect.isclass(value) else "function"
            written = member if name == "builtins" else f"{name}.{member}"
            yield Fact(kind, name, written, _call_of(member, value), summary)


def english(facts: list[Fact]) -> list[str]:
    """The words of the facts' summaries, in lower case and alphabetical order."""
    return sorted(
        {word for fact in facts for word in re.findall("[a-z]{3,}", fact.summary.lower())}
    )


def _methods() -> Iterator[Fact]:
    """The methods of built-in types, such as `str.split`."""
    for owner in TYPES:
        for member, value in sorted(vars(owner).items()):
            if member.startswith("_") or not callable(value):
                continue
            if summary := first_sentence(value.__doc__):
                call = re.sub(r"\(self(, /)?(, )?", "(", _call_of(member, value))
                yield Fact("method", owner.__name__, f"{owner.__name__}.{member}", call, summary)


def library() -> list[Fact]:
    """The facts of the running Python; the same text is not said of two names."""
    facts = {fact.summary: fact for fact in _methods()}
    for name in WORDS["modules"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # modules that will be removed
            module = importlib.import_module(name)
        own = first_sentence(module.__doc__)
        found = [Fact("module", name, name, "", own)] if own and name != "builtins" else []
        for fact in [*found, *_members(module, name)]:
            facts.setdefault(fact.summary, fact)
    return list(facts.values())

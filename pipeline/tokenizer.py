"""Whether the runner's tokenizer takes a `tokenizer.json`: its rules, asked at export.

The runner reads byte-level BPE as Qwen's tokenizers have it (`runner/tokenizer`). What it could not
honour to the letter it refuses, and a program whose tokenizer is refused is of no use. The rules
here are those of `runner/tokenizer/tokenizer_json.cpp`, `bpe.cpp` and `pre_tokenizer.cpp`; a test
holds them together.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from et_moe.pipeline.config import ConfigError, warn

MAX_BYTES = 64 << 20
MAX_DEPTH = 16
_EXCERPT = 120

SCHEMAS: dict[str, dict[str, Any]] = json.loads("""{
    "file": {
      "version": ["1.0"], "truncation": "any", "padding": "any", "added_tokens": "array",
      "normalizer": "any", "pre_tokenizer": "object", "post_processor": "any",
      "decoder": "object", "model": "object"},
    "normalizers": {"type": ["Sequence"], "normalizers": "array"},
    "pretokenizers": {"type": ["Sequence"], "pretokenizers": "array"},
    "processors": {"type": ["Sequence"], "processors": "array"},
    "decoders": {"type": ["Sequence"], "decoders": "array"},
    "nfc": {"type": ["NFC"]},
    "split": {
      "type": ["Split"], "pattern": "object", "behavior": ["Isolated"], "invert": [false]},
    "pattern": {"Regex": "string"},
    "byte_level_after_split": {
      "type": ["ByteLevel"], "add_prefix_space": [false], "trim_offsets": [false, true],
      "use_regex": [false]},
    "byte_level_alone": {
      "type": ["ByteLevel"], "add_prefix_space": [false], "trim_offsets": [false, true],
      "use_regex": [null, false, true]},
    "processor": {
      "type": ["ByteLevel", "TemplateProcessing"], "add_prefix_space": [false, true],
      "trim_offsets": [false, true], "use_regex": [null, false, true]},
    "template": {
      "type": ["TemplateProcessing"], "single": "array", "pair": "array",
      "special_tokens": "object"},
    "decoder": {
      "type": ["ByteLevel"], "add_prefix_space": [false, true],
      "trim_offsets": [false, true], "use_regex": [null, false, true]},
    "model": {
      "type": ["BPE"], "dropout": [null], "unk_token": [null],
      "continuing_subword_prefix": [null, ""], "end_of_word_suffix": [null, ""],
      "fuse_unk": [null, false], "byte_fallback": [null, false],
      "ignore_merges": [null, false, true], "vocab": "object", "merges": "array"},
    "added_token": {
      "id": "number", "content": "string", "single_word": [false, true],
      "lstrip": [false, true], "rstrip": [false, true], "normalized": [false, true],
      "special": [false, true]}
  }""")
"""Component -> key -> the values allowed, or the name of a JSON type; "any" is checked later, or
has no influence on ids. A key may be left out where null is allowed."""

SUPPORTED_PATTERN = re.compile(
    rf"""(?x) \A (?:
    {re.escape("(?i:'s|'t|'re|'ve|'m|'ll|'d)")}
  | \( (?: \?[:=!] | (?![?*]) ) | [)|]
  | \[ \^? (?: \\[sSrnt] | \\p\{{[LMN]\}} | (?![\]\[\\^&-])[ -~] )+ \]
  | \\[sSrnt] | \\p\{{[LMN]\}}
  | [?*+][?+]? (?![?*+{{])
  | \{{ \d\d? (?:,(?:\d\d?)?)? \}} (?![?*+{{])
  | (?![\]\[\\^$.|?*+()\{{\}}])[ -~]
)*+ \Z"""
)
"""Regular expressions that split text in the same way in Hugging Face's library and here."""

_TYPES = {dict: "object", list: "array", str: "string", int: "number", float: "number"}
_TYPES |= {bool: "boolean", type(None): "null"}


class _Refused(Exception):
    """The key at fault, empty for the file itself, and why."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)


def _excerpt(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def _is_one_of(value: Any, choices: list) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _check(value: Any, key: str, schema: str) -> None:
    """Checks an object against a schema; the type first, for where it is wrong, so is the rest."""
    rules = SCHEMAS[schema]
    if not isinstance(value, dict):
        raise _Refused(key, "expected an object")
    prefix = f"{key}." if key else ""
    for name in sorted(rules, key=lambda name: name != "type"):
        rule, found = rules[name], value.get(name)
        matches = rule == "any" or rule == _TYPES[type(found)]
        if not (_is_one_of(found, rule) if isinstance(rule, list) else matches):
            problem = f"{_excerpt(found)} not supported" if name in value else "missing"
            raise _Refused(prefix + name, f"{problem}, expected {json.dumps(rule)}")
    for name in value:
        if name not in rules:
            raise _Refused(prefix + _excerpt(name), "key is not supported")


def _steps(component: Any, key: str, items: str) -> Iterator[tuple[Any, str]]:
    """The steps of a component with their keys: a Sequence's one by one, none of null."""
    if component is None:
        return
    if not isinstance(component, dict) or component.get("type") != "Sequence":
        yield component, key
        return
    _check(component, key, items)
    for i, item in enumerate(component[items]):
        inner = f"{key}.{items}[{i}]"
        # A step that is null is no object, which its check says.
        yield from [(item, inner)] if item is None else _steps(item, inner, items)


def _check_pattern(pattern: str, key: str) -> None:
    if SUPPORTED_PATTERN.match(pattern) is None:
        raise _Refused(key, f"regular expression uses unsupported syntax: {pattern}")
    try:
        plain = re.compile(re.sub(r"\\p\{[LMN]\}", "a", pattern))
    except re.error as e:
        raise _Refused(key, f"invalid regular expression: {e}") from None
    if plain.fullmatch("") is not None:
        raise _Refused(key, f"regular expression can match an empty string: {pattern}")


def _check_pre_tokenizer(component: Any) -> None:
    steps = list(_steps(component, "pre_tokenizer", "pretokenizers"))
    if len(steps) == 1:
        return _check(*steps[0], "byte_level_alone")
    if len(steps) != 2:
        expected = "expected Split and ByteLevel, or ByteLevel alone"
        raise _Refused("pre_tokenizer", f"{len(steps)} pretokenizers, {expected}")
    split, key = steps[0]
    _check(split, key, "split")
    _check(split["pattern"], f"{key}.pattern", "pattern")
    _check(*steps[1], "byte_level_after_split")
    return _check_pattern(split["pattern"]["Regex"], f"{key}.pattern.Regex")


def _check_post_processor(component: Any) -> None:
    for step, key in _steps(component, "post_processor", "processors"):
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            _check(step, key, "processor")
            continue
        _check(step, key, "template")
        for i, piece in enumerate(step["single"]):
            if isinstance(piece, dict) and "SpecialToken" in piece:
                expected = "adds a token, expected the text alone: Sequence A"
                raise _Refused(f"{key}.single[{i}]", f"{_excerpt(piece)} {expected}")
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        if step["single"] != text:
            single = _excerpt(step["single"])
            raise _Refused(f"{key}.single", f"{single} not supported, expected {json.dumps(text)}")


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in the tokens of byte-level BPE (GPT-2's)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _check_vocabulary(vocab: dict[str, Any]) -> None:
    seen: set[int] = set()
    for token, number in vocab.items():
        key = f"model.vocab.{_excerpt(token)}"
        if type(number) is not int or not 0 <= number < len(vocab):
            raise _Refused(key, f"{_excerpt(number)} is no id below the number of tokens")
        if number in seen:
            raise _Refused(key, f"id {number} is used twice")
        seen.add(number)
    for byte, character in enumerate(byte_alphabet()):
        if character not in vocab:
            raise _Refused("model.vocab", f"no token for byte {byte}, {_excerpt(character)}")


def _check_merges(merges: list, vocab: dict[str, Any]) -> None:
    for i, item in enumerate(merges):
        pair = item.split(" ") if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or any(type(t) is not str for t in pair):
            expected = 'is neither ["left", "right"] nor "left right"'
            raise _Refused(f"model.merges[{i}]", f"{_excerpt(item)} {expected}")
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise _Refused(f"model.merges[{i}]", f"{_excerpt(token)} is not in model.vocab")


def _check_added_tokens(tokens: list, vocab: dict[str, Any], nfc: bool) -> None:
    contents: set[str] = set()
    looked_for: set[str] = set()
    new: dict[int, str] = {}
    for i, token in enumerate(tokens):
        key = f"added_tokens[{i}]"
        _check(token, key, "added_token")
        content, number = token["content"], token["id"]
        if not content or content in contents:
            raise _Refused(f"{key}.content", f"{_excerpt(content)} is empty or there twice")
        contents.add(content)
        form = unicodedata.normalize("NFC", content) if nfc and token["normalized"] else content
        if form in looked_for:
            raise _Refused(f"{key}.content", f"{_excerpt(content)} is there twice in NFC")
        looked_for.add(form)
        if type(number) is not int or number < 0:
            raise _Refused(f"{key}.id", f"{_excerpt(number)} is no id")
        if content not in vocab and new.setdefault(number, key) != key:
            raise _Refused(f"{key}.id", f"{number} is used twice")
        if content in vocab and vocab[content] != number:
            raise _Refused(f"{key}.id", f"{number}, expected {vocab[content]}, as in model.vocab")
    first, end = len(vocab), len(vocab) + len(new)
    for number, key in new.items():
        if not first <= number < end:
            raise _Refused(f"{key}.id", f"{number}, expected {first} to {end - 1} of a new token")


def check_tokenizer(directory: Path) -> None:
    """Checks the `tokenizer.json` of a checkpoint or bundle; warns if there is none.

    Raises:
        ConfigError: the runner would refuse it; names the file, the key and what was expected.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        warn(f"{directory}: no tokenizer.json: the program takes and gives token ids, but no text")
        return
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not readable as JSON: {e}") from None
    try:
        if _depth(content) > MAX_DEPTH:
            raise _Refused("", "JSON nested too deeply")
        _check_content(content)
    except _Refused as e:
        raise ConfigError(f"{path}: {e}; the runner's tokenizer cannot honour it") from None


def _depth(value: Any) -> int:
    """How deep arrays and objects are nested; of more than `MAX_DEPTH`, one more."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [item for item in level if isinstance(item, (dict, list))]
        depth += bool(level)
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _check_content(content: Any) -> None:
    _check(content, "", "file")
    model = content["model"]
    _check(model, "model", "model")
    normalizers = list(_steps(content.get("normalizer"), "normalizer", "normalizers"))
    for step, key in normalizers:
        _check(step, key, "nfc")
    _check_pre_tokenizer(content["pre_tokenizer"])
    _check_post_processor(content.get("post_processor"))
    decoders = list(_steps(content["decoder"], "decoder", "decoders"))
    if len(decoders) != 1:
        raise _Refused("decoder", f"{len(decoders)} decoders, expected one ByteLevel")
    _check(*decoders[0], "decoder")
    _check_vocabulary(model["vocab"])
    _check_merges(model["merges"], model["vocab"])
    _check_added_tokens(content["added_tokens"], model["vocab"], bool(normalizers))

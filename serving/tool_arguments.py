"""Arguments of tool calls, which models write as text, as the JSON that the tool's schema asks for.

A model of Qwen3.5's kind writes `<parameter=days>\\n3\\n</parameter>`: whether that is the number 3
or the text "3" is for the schema (https://json-schema.org/draft/2020-12) to say.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

ANY = frozenset({"null", "integer", "number", "boolean", "object", "array", "string"})
STRING = frozenset({"string"})


def parameter_types(parameters: Mapping[str, Any], name: str) -> frozenset[str]:
    """Names of the JSON types that a parameter may have.

    Args:
        parameters: the tool's JSON schema, of an object.
        name: of the parameter. One that the schema does not know is a string, unless
            `additionalProperties` says otherwise.
    """
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return _types(properties[name], parameters, 8) or ANY
    extra = parameters.get("additionalProperties")
    return (isinstance(extra, Mapping) and _types(extra, parameters, 8)) or STRING


def _types(schema: object, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    """The types of a schema; empty if it does not say. References are followed `depth` deep."""
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    named = schema.get("type")
    if isinstance(named, str | list):
        return ANY.intersection([named] if isinstance(named, str) else filter(_is_text, named))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset().union(*map(_types_of_value, values))
    if (target := _referenced(schema.get("$ref"), root)) is not None:
        return _types(target, root, depth - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(branches := schema.get(key), list):
            return frozenset().union(*(_types(b, root, depth - 1) for b in branches))
    return frozenset()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _types_of_value(value: object) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return frozenset({names.get(type(value), "null")})


def _referenced(reference: object, root: Mapping[str, Any]) -> object:
    """What `#/$defs/Name` points to, or None."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target: object = root
    for key in reference[2:].split("/"):
        target = target.get(key) if isinstance(target, Mapping) else None
    return target


def argument_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that was written as text: of the first of `types` that it fits, with
    strings last; a string if it fits none."""
    value = _parse(text.strip())
    for candidate in (value, _as_number(value)):
        if candidate is not _NOTHING and not types.isdisjoint(_fitting(candidate)):
            return json.dumps(candidate, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


_NOTHING = object()


def _parse(text: str) -> object:
    """A value from JSON, or as Python prints it, which templates do with true and None."""
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for parse in (_strict_json, ast.literal_eval):
        try:
            value = parse(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        # A quoted text, and Python's tuples and digits with underscores, are not meant as values.
        if not isinstance(value, str | tuple) and (parse is _strict_json or text[0] in "[{"):
            return value
    return _NOTHING


def _strict_json(text: str) -> object:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def _as_number(value: object) -> object:
    """5.0 as 5, for a parameter that takes integers only."""
    return int(value) if isinstance(value, float) and value.is_integer() else _NOTHING


def _fitting(value: object) -> frozenset[str]:
    """The types that a value has; every integer is a number."""
    types = _types_of_value(value)
    return types | {"number"} if "integer" in types else types

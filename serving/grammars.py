"""Grammars of answers: JSON by a schema, and tool calls, in llguidance's variant of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md)."""

import json
from collections.abc import Mapping
from typing import Any

from et_moe.serving.tool_arguments import STRING, parameter_types

_WHITESPACE = {"whitespace_pattern": r"[ \n]{0,40}"}
"""Between the parts of JSON. Without a bound some models write line breaks until the limit."""


def json_grammar(schema: Mapping[str, Any], thinking: bool) -> str:
    """An answer that is JSON of a schema, after thinking that the prompt has opened."""
    return _answer(f"body: {_json(schema)}", thinking)


def tool_grammar(
    tools: Mapping[str, Mapping[str, Any]], thinking: bool, several: bool = True
) -> str:
    """An answer that is a tool call.

    Args:
        tools: name -> JSON schema of the parameters. Required ones are all there, in the schema's
            order.
        thinking: the prompt has opened it.
        several: whether there may be more than one call.
    """
    calls = " | ".join(f"call_{i}" for i in range(len(tools)))
    more = ' ("\\n" call)*' if several else ""
    rules = [f"body: call{more}", f"call: {calls}"]
    for i, (name, schema) in enumerate(tools.items()):
        rules += _call_rules(f"{i}", name, schema)
    return _answer("\n".join(rules), thinking)


def _answer(rules: str, thinking: bool) -> str:
    start = "start: body"
    if thinking:
        start = 'start: thinking "\\n\\n" body\nthinking[suffix="</think>"]: /(?s:.*)/'
    return f"{start}\n{rules}\n"


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _WHITESPACE})


def _call_rules(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    parts, rules = [], []
    for i, (parameter, its_schema) in enumerate(properties.items()):
        part = f"parameter_{rule}_{i}"
        parts.append(part if parameter in required else f"{part}?")
        opening = json.dumps(f"<parameter={parameter}>\n", ensure_ascii=False)
        rules.append(f"{part}: {opening} value_{rule}_{i}")
        rules.append(_value_rule(f"value_{rule}_{i}", schema, parameter, its_schema))
    opening = json.dumps(f"<tool_call>\n<function={name}>\n", ensure_ascii=False)
    closing = json.dumps("</function>\n</tool_call>")
    return [f"call_{rule}: {opening} {' '.join(parts)} {closing}", *rules]


def _value_rule(rule: str, schema: Mapping[str, Any], parameter: str, its_schema: object) -> str:
    closing = json.dumps("\n</parameter>\n")
    types = parameter_types(schema, parameter)
    values = its_schema.get("enum") if isinstance(its_schema, Mapping) else None
    if types == STRING and values and isinstance(values, list):
        texts = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
        return f"{rule}: ({texts}) {closing}"
    if "string" in types:
        return f"{rule}[suffix={closing}]: /(?s:.*)/"
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return f"{rule}: {_json({**shared, **its_schema})} {closing}"

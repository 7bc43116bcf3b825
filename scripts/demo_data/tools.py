"""Tools of the generated conversations: their definitions, requests for them, calls and results."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from et_moe.scripts.demo_data.families import FAMILIES, Family, Parameter
from et_moe.scripts.demo_data.words import WORDS, Slots

JSON_TYPES = {"integer": "integer", "percent": "integer", "degrees": "integer"} | {
    "decimal": "number",
    "boolean": "boolean",
}
"""Kind of a slot -> its type in a schema; all others are strings."""
FIELD_KINDS = [
    *("word", "invented", "name", "city", "code", "phrase", "date", "email", "path", "thing"),
    *("integer", "integer", "integer", "decimal", "boolean"),
]


@dataclass
class Use:
    """A tool, and one way to ask for it."""

    tool: dict[str, Any]
    """In OpenAI's form."""
    request: str
    arguments: dict[str, Any]
    aim: str
    """What the user wants, in a few words."""
    result: dict[str, Any]
    answer: str
    """What to say of the result."""
    again: Callable[[], "Use"] = field(repr=False)
    """Another way to ask for the same tool."""

    @property
    def name(self) -> str:
        return self.tool["function"]["name"]

    def call(self) -> dict[str, Any]:
        """The call, as a message of the assistant holds it."""
        return {"function": {"name": self.name, "arguments": self.arguments}}


def camel(name: str, rng: random.Random) -> str:
    """A name of a tool in snake case; now and then in camel case, or with a prefix."""
    draw = rng.random()
    if draw < 0.1:
        first, *others = name.split("_")
        return first + "".join(map(str.capitalize, others))
    if draw < 0.15:
        return f"{rng.choice(['my', 'api', 'app', 'home', 'user'])}_{name}"
    return name


def definition(
    name: str, description: str, properties: dict[str, dict[str, Any]], required: list[str]
) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _shown(value: object) -> str:
    """A value as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


class ToolMaker:
    """Draws tools."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._rng = slots, slots.rng

    def use(self) -> Use:
        """A tool of a family that people know, or one of random words."""
        if self._rng.random() < 0.55:
            return self._of_family(self._rng.choice(FAMILIES))
        return self._invented()

    def tools(self, uses: list[Use], most: int) -> list[dict[str, Any]]:
        """The tools of `uses` among others, in any order, at most `most`."""
        tools = {use.name: use.tool for use in uses}
        aims = {use.aim for use in uses}
        for _ in range(self._rng.randint(0, most - len(tools))):
            other = self.use()
            if other.aim not in aims:  # else either would do
                aims.add(other.aim)
                tools.setdefault(other.name, other.tool)
        order = [self._varied(tool) for tool in tools.values()]
        self._rng.shuffle(order)
        return order

    def _varied(self, tool: dict[str, Any]) -> dict[str, Any]:
        """The same definition, now and then written as other programs write it."""
        rng, function = self._rng, dict(tool["function"])
        parameters = dict(function["parameters"])
        if rng.random() < 0.1:
            parameters["additionalProperties"] = False
        if rng.random() < 0.1:
            function["strict"] = True
        if rng.random() < 0.1:
            parameters.pop("required")
        if rng.random() < 0.1:
            parameters["properties"] = {
                name: {"title": name.replace("_", " ").title()} | schema
                for name, schema in parameters["properties"].items()
            }
        function["parameters"] = parameters
        order = ["name", "description", "parameters"]
        if rng.random() < 0.15:
            rng.shuffle(order)
        function = {key: function[key] for key in order} | function
        return {"type": "function", "function": function}

    def _of_family(self, family: Family) -> Use:
        rng = self._rng
        chosen = [p for p in family.parameters if not p.optional or rng.random() < 0.5]
        names = {p.key: rng.choice(p.names) for p in family.parameters}
        properties, required = {}, []
        for p in chosen:
            schema: dict[str, Any] = {"type": JSON_TYPES.get(p.kind, "string")}
            if rng.random() < 0.4:
                schema["description"] = p.description
            if p.choices and rng.random() < 0.5:
                schema["enum"] = list(p.choices)
            properties[names[p.key]] = schema
            if not p.optional:
                required.append(names[p.key])
        tool = definition(
            camel(rng.choice(family.names), rng),
            rng.choice(family.descriptions),
            properties,
            required,
        )

        def ask() -> Use:
            values = {p.key: self._value(p) for p in chosen}
            lower = rng.random() < 0.07
            if lower:  # as many people type
                values = {key: v.lower() if isinstance(v, str) else v for key, v in values.items()}
            request = rng.choice([r for r in family.requests if _keys(r) <= values.keys()])
            values = {key: value for key, value in values.items() if key in _keys(request)}
            result = {key: self._slots.draw(kind) for key, kind in family.result.items()}
            shown = {key: _shown(value) for key, value in (values | result).items()}
            text = request.lower().format(**shown) if lower else request.format(**shown)
            answer = family.answer.format(**shown)
            arguments = {names[key]: value for key, value in values.items()}
            return Use(tool, text, arguments, family.aim, result, answer, ask)

        return ask()

    def _value(self, parameter: Parameter) -> object:
        if parameter.choices:
            return self._rng.choice(parameter.choices)
        return self._slots.draw(parameter.kind)

    def _invented(self) -> Use:
        """A tool whose name, parameters and values are random."""
        rng, slots = self._rng, self._slots
        verb = slots.word() if rng.random() < 0.15 else slots.of(WORDS["verbs"])
        noun = slots.word() if rng.random() < 0.5 else slots.of(WORDS["nouns"])
        extra = slots.of(WORDS["nouns"]) if rng.random() < 0.3 else ""
        words = f"{extra} {noun}".strip()
        name = camel("_".join([verb, *words.split()]), rng)
        count = rng.choice([0, 1, 1, 1, 2, 2, 3])
        fields = list(dict.fromkeys(self._field() for _ in range(count)))
        if rng.random() < 0.2:
            fields = [f"{noun}_{f}" for f in fields]
        kinds = {f: rng.choice(FIELD_KINDS) for f in fields}
        properties = {}
        for f, kind in kinds.items():
            properties[f] = {"type": JSON_TYPES.get(kind, "string")}
            if rng.random() < 0.25:
                properties[f]["description"] = f"The {f.replace('_', ' ')} of the {words}."
        article = rng.choice(["a", "the"])
        tool = definition(name, f"{verb.capitalize()} {article} {words}.", properties, fields)

        def ask() -> Use:
            values = {f: slots.draw(kind) for f, kind in kinds.items()}
            text = self._asked(name, verb, words, values)
            return Use(tool, text, values, f"the {words}", *self._outcome(words), ask)

        return ask()

    def _field(self) -> str:
        """The name of a parameter or of a result."""
        rng, slots = self._rng, self._slots
        return slots.word() if rng.random() < 0.5 else slots.of(WORDS["fields"])

    def _asked(self, name: str, verb: str, words: str, values: dict[str, Any]) -> str:
        rng = self._rng
        pairs = [(f.replace("_", " "), _shown(v)) for f, v in values.items()]
        if rng.random() < 0.3:
            rng.shuffle(pairs)  # a call keeps to the order of the definition
        link = rng.choice([" ", " ", ": ", " = ", "="])
        joined = rng.choice([", ", " and ", ", "]).join(f"{f}{link}{v}" for f, v in pairs)
        plain = [
            f"{verb.capitalize()} the {words}",
            f"Please {verb} the {words}",
            f"Can you {verb} the {words}",
            f"I want you to {verb} the {words}",
            f"Could you please {verb} a {words}",
        ]
        direct = [f"Call {name}", f"Use {name}", f"Run the tool {name}", f"Please call {name}"]
        begin = rng.choice(plain if rng.random() < 0.65 else direct)
        if not joined:
            return begin + rng.choice([".", "", " now."])
        if len(pairs) == 1 and rng.random() < 0.3:
            return f"{begin} {rng.choice(['for', 'with'])} {pairs[0][1]}."
        return (
            f"{begin}{rng.choice([' with ', ': ', ', ', ' using '])}{joined}{rng.choice(['.', ''])}"
        )

    def _outcome(self, words: str) -> tuple[dict[str, Any], str]:
        rng, slots = self._rng, self._slots
        draw = rng.randrange(5)
        if draw == 0:
            return {"status": "ok"}, "Done."
        if draw == 1:
            reason = slots.phrase(3)
            return {"error": reason}, f"That did not work: {reason}."
        if draw == 2:
            code = slots.code()
            return {"id": code}, f"Done. The number of the {words} is {code}."
        key = self._field()
        value = slots.draw(rng.choice(FIELD_KINDS))
        return {key: value}, f"The {key} of the {words} is {_shown(value)}."


def _keys(template: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", template))

"""Reasoning, content and tool calls: what each text means, however it is cut into pieces."""

import json
import random

import pytest

from et_moe.serving.output_parser import Content, OutputParser, Reasoning
from et_moe.serving.tool_arguments import argument_json, parameter_types
from et_moe.serving.tool_calls import CallArguments, CallEnd, CallStart

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "where": {"type": "object"},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
}
TOOLS = {"get_weather": SCHEMA, "now": {}}


def merged(parts) -> dict:
    """An answer as a client puts it together."""
    answer = {"reasoning": "", "content": "", "calls": []}
    for part in parts:
        if isinstance(part, Reasoning):
            answer["reasoning"] += part.text
        elif isinstance(part, Content):
            answer["content"] += part.text
        elif isinstance(part, CallStart):
            assert part.index == len(answer["calls"])
            answer["calls"].append([part.name, "", "open"])
        elif isinstance(part, CallArguments):
            assert part.index == len(answer["calls"]) - 1
            answer["calls"][-1][1] += part.json
        else:
            assert isinstance(part, CallEnd)
            answer["calls"][-1][2] = "ended"
    return answer


def parse(pieces, thinking=False, tools=TOOLS, stops=(), complete=True) -> dict:
    parser = OutputParser(thinking, tools, stops)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merged(parts + parser.finish(complete))


def cuts(text: str, count: int = 60):
    """Cuts the text into pieces: the whole text, single characters, and random ones."""
    yield [text]
    yield list(text)
    generator = random.Random(text)
    for _ in range(count):
        size = generator.choice([1, 2, 3, 8, 30])
        places = sorted(generator.choices(range(len(text) + 1), k=len(text) // size))
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def xml(name: str, body: str = "") -> str:
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>\n"


PARIS = xml("get_weather", parameter("city", "Paris") + parameter("days", "3"))
PARIS_CALL = ["get_weather", '{"city": "Paris", "days": 3}', "ended"]
CODE = "if a < b:\n    print(\"<tool_call>\", '\\n')\n\n# </parameter> is a tag, <b>ü</b> too\n"


def call(**arguments) -> list:
    return ["get_weather", json.dumps(arguments, ensure_ascii=False), "ended"]


CASES = {
    # text, whether the prompt opened the thinking, reasoning, content, calls
    "content": ("Hello < world >", False, "", "Hello < world >", []),
    "thinking that was opened": ("\nhm\n\nyes\n</think>\n\nHi.", True, "hm\n\nyes", "Hi.", []),
    "thinking opened again": ("<think>\nhm\n</think>\n\nHi.", True, "hm", "Hi.", []),
    "thinking that the model opened": ("\n<think>hm</think>Hi.\n", False, "hm", "Hi.\n", []),
    "empty thinking": ("\n</think>\n\nHi.", True, "", "Hi.", []),
    "thinking without an end": ("hm\n</thin", True, "hm\n</thin", "", []),
    "a tag of thinking later": ("Hi </think> <think>", False, "", "Hi </think> <think>", []),
    "nearly a tag": ("</thinking> a </think >", True, "</thinking> a </think >", "", []),
    "a call": (PARIS, False, "", "", [PARIS_CALL]),
    "a call after thinking": (f"hm\n</think>\n\n{PARIS}\n", True, "hm", "", [PARIS_CALL]),
    "content before": (f"I look.\n\n{PARIS}", False, "", "I look.", [PARIS_CALL]),
    "content after": (f"{PARIS}\n\nDone. ", False, "", "\n\nDone.", [PARIS_CALL]),
    "two calls": (f"{PARIS}\n{PARIS}\n", False, "", "", [PARIS_CALL, PARIS_CALL]),
    "a call inside thinking": (f"hm\n{PARIS}", True, "hm", "", [PARIS_CALL]),
    "thinking goes on after a call": (f"a {PARIS} b</think>c", True, "a  b", "c", [PARIS_CALL]),
    "no arguments": (xml("now"), False, "", "", [["now", "{}", "ended"]]),
    "unknown function": (xml("later"), False, "", "", [["later", "{}", "ended"]]),
    "unknown function while thinking": (f"as in {xml('x')}", True, f"as in {xml('x')}", "", []),
    "types": (
        xml(
            "get_weather",
            parameter("exact", "True")
            + parameter("where", '{"lat": [1.5, null]}')
            + parameter("limit", "None")
            + parameter("days", "soon")
            + parameter("other", "7"),
        ),
        False,
        "",
        "",
        [call(exact=True, where={"lat": [1.5, None]}, limit=None, days="soon", other="7")],
    ),
    "text that looks like tags": (
        xml("get_weather", parameter("city", CODE)), False, "", "", [call(city=CODE)]
    ),
    "a value on one line": (
        "<tool_call><function=get_weather><parameter=city>a b</parameter></function></tool_call>",
        False, "", "", [call(city="a b")],
    ),
    "empty value": (xml("get_weather", parameter("city", "")), False, "", "", [call(city="")]),
    "line breaks of a value": (
        xml("get_weather", parameter("city", "\n a\n\n")), False, "", "", [call(city="\n a\n\n")]
    ),
    "end of thinking inside a value": (
        xml("get_weather", parameter("city", "</think>")), True, "", "", [call(city="</think>")]
    ),
    "without <tool_call>": (f"Now: {PARIS[12:]}", False, "", "Now:", [PARIS_CALL]),
    "two functions in one": (
        f"{PARIS[:-12]}{PARIS[12:]}", False, "", "", [PARIS_CALL, PARIS_CALL]
    ),
    "without </parameter>": (
        PARIS.replace("</parameter>\n", ""), False, "", "", [PARIS_CALL]
    ),
    "without </function>": (PARIS.replace("</function>\n", ""), False, "", "", [PARIS_CALL]),
    "without </tool_call>": (PARIS[:-12], False, "", "", [PARIS_CALL]),
    "ends in mid-value": (PARIS[: PARIS.index("is\n")], False, "", "", [call(city="Par")]),
    "text before the parameters": (
        PARIS.replace("<parameter=city", "with <parameter=city"),
        False, "", "with", [PARIS_CALL],
    ),
    "json": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>',
        False, "", "", [call(city="Köln")],
    ),
    "json of arguments as text": (
        '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', False, "", "",
        [["now", "{}", "ended"]],
    ),
    # What is not a call stays text.
    "empty call": ("<tool_call></tool_call>", False, "", "<tool_call></tool_call>", []),
    "call of nothing": ("<tool_call>\nfoo", False, "", "<tool_call>\nfoo", []),
    "name that is none": (xml("a\nb"), False, "", xml("a\nb"), []),
    "name without an end": ("<tool_call><function=get", False, "", "<tool_call><function=get", []),
    "function in the text": ("use <function=f> here", False, "", "use <function=f> here", []),
    "broken json": ("<tool_call>{]</tool_call> ", False, "", "<tool_call>{]</tool_call> ", []),
    "json that ends": ('<tool_call>{"name":', False, "", '<tool_call>{"name":', []),
    "calls one after the other, the first broken": (
        f"<tool_call>{PARIS}", False, "", "<tool_call>", [PARIS_CALL]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_text_means(case) -> None:
    text, thinking, reasoning, content, calls = case
    for pieces in cuts(text):
        found = parse(pieces, thinking)
        assert found == {"reasoning": reasoning, "content": content, "calls": calls}, pieces
    for _, arguments, _ in calls:
        json.loads(arguments)


FRAGMENTS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=now>",
    "<function=get_weather>", "<function=", "</function>", "<parameter=city>", "<parameter=days>",
    "<parameter=", "STOP",
    "</parameter>", "\n", " ", "x", "7", "<", ">", "é", '{"name": "now"}', "</", "ST",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(300))
def test_pieces_do_not_matter(seed: int) -> None:
    """Random texts of tags give the same for any cut, and the arguments of calls are JSON."""
    generator = random.Random(seed)
    text = "".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 25)))
    options = {
        "thinking": generator.random() < 0.5,
        "tools": generator.choice([TOOLS, TOOLS, None]),
        "stops": generator.choice([(), ("STOP", "x7")]),
        "complete": generator.random() < 0.7,
    }
    expected = parse([text], **options)
    for pieces in cuts(text, 20):
        assert parse(pieces, **options) == expected, pieces
    for _, arguments, state in expected["calls"]:
        if state == "ended":
            json.loads(arguments)
    if not expected["calls"] and not options["stops"]:
        letters = [c for c in "x7é" for _ in range(text.count(c))]
        kept = expected["reasoning"] + expected["content"]
        assert letters == [c for c in "x7é" for _ in range(kept.count(c))]


def test_without_tools_nothing_is_a_call() -> None:
    assert parse([PARIS], tools=None)["content"] == PARIS


def test_a_call_that_is_cut_off_stays_open() -> None:
    """Its arguments are not valid JSON, so that nobody runs half a command."""
    for end in range(PARIS.index("<parameter=city>") + 16, PARIS.index("</function>")):
        [[_, arguments, state]] = parse([PARIS[:end]], complete=False)["calls"]
        assert state == "open"
        with pytest.raises(ValueError):
            json.loads(arguments)


def test_parts_come_as_early_as_they_can() -> None:
    parser = OutputParser(True, TOOLS)
    assert parser.feed("I think") == [Reasoning("I think")] and parser.reasoning
    assert parser.feed(" so </th") == [Reasoning(" so")]
    assert parser.feed("ink>\n\nYes") == [Content("Yes")] and not parser.reasoning
    parser.feed("<tool_call>\n<function=get_weather>")
    assert parser.calls == 1
    parser.feed("<parameter=city>\nNew Yo")
    assert parser.feed('"rk') == [CallArguments(0, '\\"rk')]
    assert parser.feed("\n</parameter>") == []  # this may still be part of the text
    assert parser.feed("</function>") == [CallArguments(0, '"'), CallArguments(0, "}"), CallEnd(0)]


def test_stop_strings_end_the_content_alone() -> None:
    text = f"a STOP b</think>\n\nc ST {PARIS[:30]}STOP{PARIS[30:]} d STOP e {PARIS}"
    for pieces in cuts(text):
        parser = OutputParser(True, TOOLS, ("STOP", "never"))
        parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
        found = merged(parts)
        assert found["reasoning"] == "a STOP b" and found["content"] == "c ST d "
        assert len(found["calls"]) == 1 and parser.stopped == "STOP"


def test_long_values_take_linear_time() -> None:
    """A megabyte comes in a hundred thousand pieces. If each piece made the parser scan all of the
    text again, the test would run out of time."""
    body = "0123456789" * 100_000
    text = xml("get_weather", parameter("city", body) + parameter("where", json.dumps([body])))
    pieces = [text[i : i + 10] for i in range(0, len(text), 10)]
    [[_, arguments, _]] = parse(pieces)["calls"]
    assert json.loads(arguments) == {"city": body, "where": json.dumps([body])}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        ({"type": "string"}, "7", "7"),
        ({"type": "integer"}, " 7 ", 7),
        ({"type": "integer"}, "7.0", 7),
        ({"type": "integer"}, "7.5", "7.5"),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "number"}, "7", 7),
        ({"type": "number"}, "-7e3", -7000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "none", "none"),
        ({"type": ["string", "integer"]}, "12", 12),
        ({"type": "array"}, "[1, 'a']", [1, "a"]),
        ({"type": "array"}, "(1, 2)", "(1, 2)"),
        ({"type": "object"}, '{"a": {"b": []}}', {"a": {"b": []}}),
        ({"type": "object"}, "{'a': True}", {"a": True}),
        ({"type": "object"}, "[" * 100_000, "[" * 100_000),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"$ref": "#/$defs/Size"}, "3", 3),
        ({"$ref": "#/$defs/Loop"}, "3", 3),
        ({"oneOf": [{"$ref": "#/$defs/Size"}, {"type": "null"}]}, "null", None),
        ({"allOf": [{"$ref": "#/$defs/Size"}]}, "3", 3),
        ({"description": "anything"}, "3", 3),
        ({"description": "anything"}, "three", "three"),
        ({"type": "wrong"}, "3", 3),
        (True, "[]", []),
    ],
)
def test_types_of_arguments(schema, text: str, expected) -> None:
    definitions = {"Size": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}
    tool = {"properties": {"p": schema}, "$defs": definitions}
    value = json.loads(argument_json(text, parameter_types(tool, "p")))
    assert value == expected and type(value) is type(expected)


def test_types_of_parameters_that_the_schema_does_not_name() -> None:
    assert parameter_types({}, "p") == {"string"}
    assert parameter_types({"additionalProperties": {"type": "number"}}, "p") == {"number"}
    assert parameter_types({"additionalProperties": False, "properties": None}, "p") == {"string"}

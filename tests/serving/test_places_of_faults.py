"""Where a request is wrong: `param` of the envelope, and codes that clients know."""

import json

import pytest
from test_bad_requests import CHAT, COMPLETIONS, QUESTION, error, form, tool


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": []}, "functions"),
        ({"best_of": 3}, "best_of"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        ({"tools": [tool(), {"type": "x"}]}, "tools.1.type"),
        ({"tools": [tool(), tool("a b")]}, "tools.1.function.name"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "{"}}]}]},
            "messages.1.tool_calls.0",
        ),
    ],
)  # fmt: skip
def test_the_field_of_a_chat(ask, fields: dict, param: str) -> None:
    assert error(ask(CHAT, {"messages": [QUESTION], **fields}), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_the_field_of_a_completion(ask, fields: dict, param: str) -> None:
    assert error(ask(COMPLETIONS, {"prompt": "Hi", **fields}), 400)["param"] == param


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("stop_token_ids: token id 5 is outside the vocabulary of 4", "stop_token_ids", None),
        ("temperature 1e-09: expected 0 (greedy) or at least 1e-5", "temperature", None),
        ("the prompt has 9 tokens, the context holds 8", "messages", "context_length_exceeded"),
        ("the prompt is empty", "messages", None),
    ],
)
def test_what_the_engine_refuses(ask, engine, monkeypatch, message, param, code) -> None:
    def refuse(*_) -> None:
        raise ValueError(message)

    monkeypatch.setattr(engine, "submit", refuse)
    found = error(ask(CHAT, {"messages": [QUESTION]}), 400)
    assert (found["message"], found["param"], found["code"]) == (message, param, code)


def test_places_are_shorter_than_what_they_quote(ask) -> None:
    fields = {"messages": [QUESTION], "logit_bias": {"x" * 100_000: "y"}}
    assert len(error(ask(CHAT, fields), 400)["param"]) < 1010


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_numbers_that_no_answer_can_repeat(ask, number: str, stream: str) -> None:
    """/v1/responses sends the tools back, which must be JSON."""
    schema = f'{{"default": {number}}}'
    flat = f'{{"type": "function", "name": "f", "parameters": {schema}}}'
    body = f'{{"input": "Hi", "stream": {stream}, "tools": [{flat}]}}'
    found = error(ask("/v1/responses", body.encode()), 400)
    assert found["param"] == "tools.0.parameters", found
    nested = f'{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}'
    body = f'{{"messages": [{json.dumps(QUESTION)}], "tools": [{nested}]}}'
    found = error(ask(CHAT, body.encode()), 400)
    assert found["param"] == "tools.0.function.parameters", found


@pytest.mark.parametrize("values", [5, True, "ab", {"a": 1}])
def test_a_parameter_whose_enum_is_no_list(ask, engine, values: object) -> None:
    engine.text = "</think>"
    schema = {"properties": {"a": {"type": "string", "enum": values}}}
    fields = {"tools": [tool(**schema)], "tool_choice": "required", "max_tokens": 2}
    assert ask(CHAT, {"messages": [QUESTION], **fields}).status_code == 200


def test_a_format_with_numbers_that_json_lacks(ask) -> None:
    body = json.dumps({"messages": [QUESTION], "response_format": form({"const": float("nan")})})
    param = error(ask(CHAT, body.encode()), 400)["param"]
    assert param == "response_format.json_schema.schema"

"""Requests to /v1/responses that are refused: in the envelope of all endpoints, with the place."""

import re

import pytest
from test_bad_requests import error

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "name": "f", "parameters": {}}


def part(kind: str, **fields) -> dict:
    return {"input": [{"role": "user", "content": [{"type": kind, **fields}]}]}


def form(**fields) -> dict:
    return {"text": {"format": {"type": "json_schema", **fields}}}


def allowed(*names: str, mode: str = "auto") -> dict:
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


def call(arguments: str) -> dict:
    fields = {"call_id": "1", "name": "f", "arguments": arguments}
    return {"input": [USER, {"type": "function_call", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param", "fault"),
    [
        ({"input": None}, "input", "expected a text or a list of items"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "expected a text or a list of items"),
        ({"input": ["x"]}, "input.0", "expected an object"),
        ({"input": [{"role": "owner", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": [USER, {"role": "user"}]}, "input.1.content", "required"),
        ({"input": [USER, {"type": "item_reference", "id": "x"}]}, "input.1", "not kept"),
        ({"input": [{"type": "computer_call"}]}, "input.0", "'computer_call' are not supported"),
        ({"input": [{"type": ["x"]}]}, "input.0", "are not supported, expected 'message'"),
        (
            {"input": [{"type": "function_call_output", "output": "x"}]},
            "input.0.call_id",
            "required",
        ),
        ({"input": [USER, {"role": "system", "content": "x"}]}, "input", "must be the first"),
        (part("input_image", image_url="x"), "input.0.content", "'input_image' are not supported"),
        (part("input_file", file_id="x"), "input.0.content", "'input_file' are not supported"),
        (part("input_audio"), "input.0.content", "'input_audio' are not supported"),
        (part("input_text"), "input.0.content", "needs a text"),
        (call("{"), "input.1", "arguments of the tool call 'f': expected an object"),
        (call("[]"), "input.1", "expected an object"),
        (call('{"a": "\\ud800"}'), "input", "input: a lone surrogate"),
        ({"input": "word " * 3000}, "input", "tokens"),
        ({"instructions": ["x"]}, "instructions", "valid string"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "responses are not kept"),
        ({"conversation": "conv_1"}, "conversation", "responses are not kept"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "responses are not kept"),
        ({"background": True}, "background", "not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "not supported"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported: the input is not cut"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 2}, "top_p", "less"),
        ({"n": 2}, "n", "1"),
        ({"tools": [{"type": "mcp"}]}, "tools.0", "'mcp' are not supported"),
        ({"tools": [{"type": "custom"}], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name", "pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.name", "required"),
        ({"tools": [TOOL] * 257}, "tools", "at most 256"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "maybe"}, "tool_choice", "expected 'none', 'auto', 'required' or"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "expected 'none'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "required"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice",
            "tool_choice: there is no tool 'g'",
        ),
        ({"tools": [TOOL], "tool_choice": allowed("g")}, "tool_choice", "there is no tool 'g'"),
        ({"tools": [TOOL], "tool_choice": allowed()}, "tool_choice.tools", "at least 1"),
        ({"tools": [TOOL], "tool_choice": allowed(mode="x")}, "tool_choice.mode", "'required'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text'"),
        (form(name="x"), "text.format", "needs a name and a schema"),
        (form(schema={}), "text.format", "needs a name and a schema"),
        (form(name="x", schema={"type": "nothing"}), "text.format", "text.format: the schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'none'"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"),
        ({"include": ["everything"]}, "include.0", "'message.output_text.logprobs'"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs include"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream": "yes"}, "stream", "boolean"),
    ],
)
def test_a_request_that_is_refused(ask, engine, fields: dict, param: str, fault: str) -> None:
    found = error(ask("/v1/responses", {"input": "Hi", **fields}), 400)
    assert found["type"] == "invalid_request_error" and found["param"] == param, found
    assert re.search(re.escape(fault), found["message"]), found["message"]
    assert len(found["message"]) < 400
    assert engine.status().running == engine.status().waiting == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": None, "background": False, "truncation": "disabled"},
        {"store": True, "service_tier": "auto", "prompt_cache_key": "x", "top_logprobs": 0},
        {"tools": [], "tool_choice": "auto", "metadata": None, "reasoning": None, "text": {}},
        {"instructions": None, "max_output_tokens": None, "include": [], "tool_choice": None},
    ],
)
def test_what_clients_send_without_need(ask, fields: dict) -> None:
    assert ask("/v1/responses", {"input": "Hi", **fields}).status_code == 200


def test_a_body_that_is_no_request(ask) -> None:
    for body in (b"", b"{", b"null", b"[]", b"{}", b'{"input": ' + b"[" * 100_000):
        error(ask("/v1/responses", body), 400)


def test_other_statuses(ask, engine) -> None:
    found = error(ask("/v1/responses", {"model": "gpt", "input": "Hi"}), 404)
    assert found["code"] == "model_not_found"
    error(ask("/v1/responses"), 405)
    engine.break_device("it is on fire")
    assert error(ask("/v1/responses", {"input": "Hi"}), 503)["code"] == "engine_broken"

"""`tool_choice` of type "allowed_tools": the answer is that of a request with these tools alone."""

import json

import pytest

from et_moe.serving.openai.protocol import ChatRequest


def tool(name: str) -> dict:
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    return {"name": name, "parameters": schema}


A, B = tool("a"), tool("b")


def chat_body(tools: list[dict], choice: object) -> dict:
    if isinstance(choice, dict):
        named = [{"type": "function", "function": {"name": t["name"]}} for t in choice["tools"]]
        choice = {"type": "allowed_tools", "allowed_tools": {**choice, "tools": named}}
    functions = [{"type": "function", "function": t} for t in tools]
    question = {"messages": [{"role": "user", "content": "Hi"}]}
    return {**question, "tools": functions, "tool_choice": choice, "max_tokens": 60}


def responses_body(tools: list[dict], choice: object) -> dict:
    if isinstance(choice, dict):
        named = [{"type": "function", "name": t["name"]} for t in choice["tools"]]
        choice = {"type": "allowed_tools", **choice, "tools": named}
    functions = [{"type": "function", **t} for t in tools]
    return {"input": "Hi", "tools": functions, "tool_choice": choice, "max_output_tokens": 60}


FORMS = [("/v1/chat/completions", chat_body), ("/v1/responses", responses_body)]


@pytest.mark.parametrize(("path", "body"), FORMS)
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_others_are_left_out(ask, engine, path: str, body, mode: str) -> None:
    engine.text = "</think>\n\nI cannot."
    for request in (body([B], mode), body([A, B], {"mode": mode, "tools": [B]})):
        response = ask(path, request)
        assert response.status_code == 200, response.text
    (alone, one), (among, other) = engine.submitted
    assert alone == among and one.guided == other.guided == (mode == "required")
    if mode == "required":
        text = json.dumps(response.json().get("output") or response.json()["choices"])
        assert '"name": "b"' in text and '"name": "a"' not in text


def test_a_response_says_what_was_asked(ask) -> None:
    request = responses_body([A, B], {"mode": "auto", "tools": [B]})
    response = ask("/v1/responses", request).json()
    assert response["tool_choice"] == request["tool_choice"]
    assert [tool["name"] for tool in response["tools"]] == ["a", "b"]


def test_the_request_holds_what_is_left() -> None:
    request = ChatRequest.model_validate(chat_body([A, B], {"mode": "required", "tools": [A]}))
    assert request.tool_choice == "required" and [*request.tool_schemas()] == ["a"]

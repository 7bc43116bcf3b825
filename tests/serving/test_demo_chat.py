"""The demo model as it is served: INT4, on the CPU, asked as programs and people ask it."""

from server_process import Server
from test_server import assert_conforms

TRAINS = {
    "type": "function",
    "function": {
        "name": "next_train",
        "description": "When the next train to a city leaves.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "hour": {"type": "integer"}},
            "required": ["city", "hour"],
        },
    },
}


def answer(server: Server, messages: list, **fields) -> dict:
    body = {"messages": messages, "temperature": 0, "max_tokens": 200, **fields}
    response = server.chat("", **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_the_conformance_suite_with_a_true_model(demo_server) -> None:
    assert_conforms(demo_server.url)


def test_it_remembers_what_it_was_told(demo_server) -> None:
    told = [user("My name is Ada."), {"role": "assistant", "content": "Nice to meet you, Ada!"}]
    for thinking in (True, False):
        options = {"chat_template_kwargs": {"enable_thinking": thinking}}
        said = answer(demo_server, [*told, user("What is my name?")], **options)
        assert said["content"] == "Your name is Ada."
        assert thinking or not said.get("reasoning_content")


def test_it_knows_the_standard_library(demo_server) -> None:
    said = answer(demo_server, [user("What does os.path.join do?")])
    assert "pathname components" in said["content"]


def test_it_calls_a_tool_and_tells_what_it_found(demo_server) -> None:
    """Neither tool nor place was in its training; the call's form is free, and then bound."""
    messages = [user("Call next_train with city Oslo and hour 7.")]
    for choice in ("auto", "required"):
        said = answer(demo_server, messages, tools=[TRAINS], tool_choice=choice)
        [call] = said["tool_calls"]
        assert call["function"]["name"] == "next_train"
        assert call["function"]["arguments"] == '{"city": "Oslo", "hour": 7}'
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"error": "late"}'}
    said = answer(demo_server, [*messages, said, result], tools=[TRAINS])
    assert "late" in said["content"] and not said.get("tool_calls")

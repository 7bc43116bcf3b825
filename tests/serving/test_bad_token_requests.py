"""Requests to /tokenize and /detokenize that are refused, or are large."""

import pytest
from test_bad_requests import QUESTION, error


def calling(arguments: str) -> dict:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("fields", "param", "fault"),
    [
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools is not for"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages is not"),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "chat_template_kwargs", "is not"),
        ({"messages": []}, "messages", "at least one message"),
        (
            {"messages": [QUESTION, calling("{")]},
            "messages.1.tool_calls.0",
            "arguments of the tool call 'f': expected an object",
        ),
        ({"messages": [QUESTION, calling('{"a": "\\ud800"}')]}, "messages", "a lone surrogate"),
    ],
)
def test_conversations_that_are_refused(ask, fields: dict, param: str, fault: str) -> None:
    found = error(ask("/tokenize", {"messages": [QUESTION], **fields}), 400)
    assert found["param"] == param and fault in found["message"], found


def test_texts_and_ids(ask) -> None:
    found = ask("/tokenize", {"prompt": "Hi\0", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == "Hi\0"
    assert ask("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "Hi\0"}
    for tokens in ([-1], [10**30], [2048]):
        assert error(ask("/detokenize", {"tokens": tokens}), 400)["param"] == "tokens"

"""Requests of one conversation have one key, in all forms that they come in."""

import json

from et_moe.serving.conversation_key import conversation_key


def key(**request) -> str:
    return conversation_key(json.dumps(request).encode())


SYSTEM = {"role": "system", "content": "Be brief."}
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


def test_a_conversation_that_grows_keeps_its_key() -> None:
    first = key(messages=[SYSTEM, HI])
    assert first == key(messages=[SYSTEM, HI, HELLO, {"role": "user", "content": "Who?"}])
    assert first == key(messages=[SYSTEM, HI], temperature=0.5, stream=True)
    assert key(input="Hi") == key(input=[HI, HELLO, HI]) == key(messages=[HI])
    long = "word " * 100
    assert key(prompt=long) == key(prompt=long + "more") == key(prompt=[long, "other"])
    assert key(prompt=[1] * 300) == key(prompt=[[1] * 400])


def test_others_have_another() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    keys = [
        key(messages=[HI]),
        key(messages=[SYSTEM, HI]),
        key(messages=[HELLO]),
        key(messages=[HI], tools=[tool]),
        key(input="Hi", instructions="Be brief."),
        key(messages=[HI], prompt_cache_key="mine"),
        key(prompt="Hi"),
        key(prompt=[1, 2]),
    ]
    assert len({*keys}) == len(keys)
    assert key(messages=[HI], prompt_cache_key="x") == key(input="y", prompt_cache_key="x")


def test_what_is_no_request_has_none() -> None:
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        assert conversation_key(body) == ""
    assert key(messages=[1, "x"], prompt={"a": 1}) == key(messages=7)

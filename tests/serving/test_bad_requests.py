"""Requests that are refused: the status, the envelope, and where the fault is."""

import asyncio
import json
import logging
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import pytest
from served_app import running_app

from et_moe.serving import http_limits
from et_moe.serving.openai.protocol import MAX_CHOICES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = {"role": "user", "content": "Hi"}


def tool(name: str = "f", **schema) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def allowed(*names: str, mode: str = "auto") -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def form(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def error(response, status: int) -> dict:
    assert response.status_code == status, (response.status_code, response.text)
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"] and found["type"]
    return found


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": "Hi"}, "messages: "),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "messages.0: .*needs content"),
        ({"messages": [QUESTION, {"role": "user", "content": 5}]}, "messages.1.content: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content: parts of type 'image_url' are not supported",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content: "),
        ({"messages": [QUESTION, {"role": "system", "content": "x"}]}, "must be the first"),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments of the tool call 'f': expected an object",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
            "messages: a lone surrogate",
        ),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias: '11111111111111111111': expected a token"),
        ({"temperature": "hot"}, "temperature: "),
        ({"temperature": "0.5"}, "temperature: "),
        ({"temperature": -1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"n": 0}, "n: "),
        ({"n": MAX_CHOICES + 1}, "n: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1.5}, "max_tokens: "),
        ({"max_tokens": 2**31}, "max_tokens: "),
        ({"top_k": 2**31}, "top_k: "),
        ({"stop_token_ids": [2**31]}, "stop_token_ids.0: "),
        ({"stream": "yes"}, "stream: "),
        ({"stop": [""]}, "stop.0: "),
        ({"stop": ["x"] * 17}, "stop: "),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x'"),
        ({"logit_bias": {"²": 1}}, "logit_bias: '²'"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: '99999'"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1: "),
        ({"seed": 2**70}, "seed: "),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"functions": []}, "functions is not supported: use tools"),
        ({"tools": [{"type": "web_search"}]}, "type: "),
        ({"tools": [tool("a b")]}, "name: "),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "maybe"}, "tool_choice: expected 'none'"),
        ({"tool_choice": {"type": []}}, "tool_choice: expected 'none'"),
        (
            {"tools": [tool()],
             "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "there is no tool 'g'",
        ),
        ({"tools": [tool()], "tool_choice": allowed("f", "g")}, "there is no tool 'g'"),
        ({"tool_choice": allowed("f")}, "there is no tool 'f'"),
        ({"tools": [tool()], "tool_choice": allowed()}, "tool_choice.allowed_tools.tools: .*1"),
        ({"tool_choice": allowed("f", mode="x")}, "tool_choice.allowed_tools.mode: "),
        ({"response_format": {"type": "xml"}}, "response_format.type: "),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        ({"response_format": form({"type": "nothing"})}, "response_format: the schema"),
        ({"response_format": form({"pattern": "(?=a)b"})}, "response_format: the schema"),
        ({"response_format": form({"$ref": "http://x/y"})}, "response_format: the schema"),
        ({"response_format": form({"enum": ["x" * 200_000]})}, "the grammar has 2"),
        ({"reasoning_effort": "huge"}, "reasoning_effort: "),
        ({"chat_template_kwargs": {"messages": []}}, "messages is not for here"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "tokens"),
        ({"best_of": 3}, "best_of"),
    ],
)  # fmt: skip
def test_a_chat_that_is_refused(ask, engine, fields: dict, fault: str) -> None:
    found = error(ask(CHAT, {"messages": [QUESTION], **fields}), 400)
    assert found["type"] == "invalid_request_error"
    assert re.search(fault, found["message"]), found["message"]
    assert engine.status().running == engine.status().waiting == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": ["a", 5]},
        {"prompt": [5.5]},
        {"prompt": [-1]},
        {"prompt": [2048]},
        {"prompt": [10**30]},
        {"prompt": ["a"] * 257},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "logprobs": True},
        {"prompt": ["a", "b " * 3000]},
    ],
)
def test_a_completion_that_is_refused(ask, engine, fields: dict) -> None:
    """If one of several prompts is refused, none runs."""
    error(ask(COMPLETIONS, fields), 400)
    for _ in range(100):
        if not engine.status().running + engine.status().waiting:
            break
        time.sleep(0.01)
    assert engine.status().running == engine.status().waiting == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b'[{"a":' * 5000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}",
    ],
    ids=range(10),
)
def test_a_body_that_is_no_request(ask, body: bytes) -> None:
    error(ask(CHAT, body), 400)


def test_sizes_types_and_places(ask) -> None:
    large = b'"' + b"x" * http_limits.MAX_BODY_BYTES + b'"'
    assert error(ask(CHAT, large), 413)["code"] == "body_too_large"
    text = {"Content-Type": "text/plain"}
    error(ask(CHAT, b"{}", headers=text), 415)
    error(ask("/v1/nothing"), 404)
    error(ask(CHAT), 405)
    assert ask(CHAT).headers["Allow"] == "POST"
    found = error(ask(CHAT, {"model": "gpt", "messages": [QUESTION]}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model"
    error(ask("/v1/models/gpt"), 404)
    assert ask("/v1/models/demo").json() == ask("/v1/models").json()["data"][0]
    assert ask("/v1/models/demo").json()["id"] == "demo"


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (CHAT, {"messages": [QUESTION], "n": 13}, "n: 13 are more choices .* which is 12"),
        (COMPLETIONS, {"prompt": "a", "n": 13}, "n: 13 are more choices .* which is 12"),
        (COMPLETIONS, {"prompt": ["a"] * 5, "n": 3}, "n: 3 for each of 5 prompts .* which is 12"),
        (COMPLETIONS, {"prompt": ["a"] * 13}, "n: 1 for each of 13 prompts .* which is 12"),
    ],
)
def test_more_choices_than_there_are_places(ask, path: str, fields: dict, message: str) -> None:
    """To come again later, as a full queue asks for, would not help."""
    found = error(ask(path, fields), 400)
    assert found["param"] == "n" and re.search(message, found["message"]), found
    fields = {**fields, "n": 12} if "messages" in fields else {"prompt": ["a"] * 4, "n": 3}
    assert ask(path, fields).status_code == 200


def test_messages_are_shorter_than_what_they_quote(ask) -> None:
    long = "x" * 100_000
    part = {"type": long, "text": "x"}
    for status, fields in (
        (404, {"model": long, "messages": [QUESTION]}),
        (400, {"messages": [{"role": "user", "content": [part]}]}),
    ):
        assert 1000 < len(error(ask(CHAT, fields), status)["message"]) < 1010


def test_all_refusals_are_counted(engine, tokenizer, monkeypatch) -> None:
    """Also those before a request is looked at."""
    monkeypatch.setattr(http_limits, "BODY_SECONDS", 0.1)
    json_type = {"Content-Type": "application/json"}
    key = {"Authorization": "Bearer key"}

    async def slow():
        await asyncio.sleep(1)
        yield b"{}"

    async def run() -> None:
        async with running_app(engine, tokenizer, api_key="key") as client:
            large = b"x" * (http_limits.MAX_BODY_BYTES + 1)
            for status, content, headers in (
                (401, b"{}", json_type),
                (415, b"{}", {**key, "Content-Type": "text/plain"}),
                (413, large, {**key, **json_type}),
                (408, slow(), {**key, **json_type}),
                (400, b"{}", {**key, **json_type}),
            ):
                answer = await client.post(CHAT, content=content, headers=headers)
                assert answer.status_code == status, answer.text
                counted = (await client.get("/metrics", headers=key)).text
                assert f'et_moe_requests_rejected_total{{status="{status}"}} 1.0' in counted

    asyncio.run(run())


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@contextmanager
def memory_growth():
    """A list that has, once the context is left, by how many MiB this process grew in it at most.

    The kernel's peak is that of the process since it began, and not everywhere may it be reset: it
    says something where it rises, and otherwise memory is looked at again and again.
    """
    growth, end = [], threading.Event()
    before = peak = resident_mib()
    highest = getrusage(RUSAGE_SELF).ru_maxrss

    def look() -> None:
        nonlocal peak
        while not end.wait(0.005):
            peak = max(peak, resident_mib())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield growth
    finally:
        end.set()
        looking.join()
        risen = getrusage(RUSAGE_SELF).ru_maxrss
        growth.append(max(peak, risen / 1024 if risen > highest else 0) - before)


def test_schemas_that_explode(ask) -> None:
    """Compiling and every mask are bounded in time and memory, so that the request soon fails or
    ends."""
    tree: dict = {"type": "string", "pattern": "(a|b)*a(a|b){400}"}
    schemas = [
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "pattern": "((a{1,900}){1,900}){1,900}"},
        {"allOf": [{"properties": {f"p{i}": {"enum": list(range(60))}}} for i in range(400)]},
        tree,
    ]
    for schema in schemas:
        begin = time.monotonic()
        body = {"messages": [QUESTION], "response_format": form(schema), "max_tokens": 20}
        with memory_growth() as growth:
            assert ask(CHAT, body).status_code in (200, 400)
        assert time.monotonic() - begin < 20, schema
        assert growth[0] < 200, schema


def test_growth_of_memory_is_seen() -> None:
    with memory_growth() as growth:
        held = b"x" * (300 << 20)
        time.sleep(0.1)
        del held
    assert growth[0] > 250


def test_a_key(engine, tokenizer) -> None:
    async def run() -> None:
        async with running_app(engine, tokenizer, api_key="sécret") as client:
            for path in ("/v1/models", "/metrics"):
                for header in ("", "Bearer", "Bearer wrong", "Basic sécret", "Bearer sécretx"):
                    headers = {"Authorization": header.encode()}
                    found = error(await client.get(path, headers=headers), 401)
                    assert found["code"] == "invalid_api_key"
                headers = {"Authorization": "Bearer sécret".encode()}
                assert (await client.get(path, headers=headers)).status_code == 200
            for path in ("/", "/health"):
                assert (await client.get(path)).status_code == 200

    asyncio.run(run())


def test_request_ids(ask) -> None:
    assert ask("/health", headers={"X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
    made = ask("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert made != "a b" and len(made) == 32
    assert len(ask(CHAT, {"messages": []}).headers["x-request-id"]) == 32


def test_no_text_of_requests_in_logs(ask, engine, caplog) -> None:
    caplog.set_level(logging.DEBUG)

    text = "secret words"  # not on the line that raises, which the log shows

    def fail(*_) -> None:
        raise KeyError(text)

    engine.answers = fail
    response = ask(CHAT, {"messages": [{"role": "user", "content": "secret words"}]})
    error(response, 500)
    ask(CHAT, {"messages": [{"role": "secret words", "content": "secret words"}]})
    assert "KeyError" in caplog.text and "secret words" not in caplog.text
    assert "secret words" not in json.dumps(response.json())

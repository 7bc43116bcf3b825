"""However an engine's events are cut, answers are the same, and end with the token that ends them.

Events of several tokens come of readers that were slow, and of drafts.
"""

import itertools
import json
import random
from collections.abc import Callable

import pytest
from served_app import DEMO
from test_chat import CALL, WEATHER, events

from et_moe.serving.llm import LLM, GenerationError, SamplingParams

CUTS = ["token by token", "whole", *range(4)]


def sizes(cuts: str | int) -> Callable[[], int]:
    """How many tokens the next event has; a number is the seed of a random cut."""
    if isinstance(cuts, str):
        return lambda: 1 if cuts == "token by token" else 10**6
    draw = random.Random(cuts)
    return lambda: draw.choice([1, 2, 3, 5, 9, 20])


VARYING = {"id", "item_id", "call_id", "created", "created_at", "completed_at"}
THOUGHT = "I greet, or STOP.\n</think>\n\n"
CHATS = {
    "stop": (THOUGHT + "Hello, Wörld 🌍. STOP and more", {"stop": ["STOP", "never"]}),
    "stop in a word": (THOUGHT + "a b c d e", {"stop": ["b"]}),
    "not stopped": (THOUGHT + "Hello ST", {"stop": ["STOP"]}),
    "thinking": (THOUGHT + "Hello, Wörld 🌍.", {}),
    "no thinking": ("Hello, Wörld 🌍.", {"reasoning_effort": "none"}),
    "thinking is cut off": (THOUGHT + "Hello.", {"max_tokens": 4}),
    "calls": (f"{THOUGHT}I look.\n{CALL}\n{CALL}", {"tools": [WEATHER]}),
    "one call": (
        f"{THOUGHT}I look.\n{CALL}\n{CALL} and more",
        {"tools": [WEATHER], "parallel_tool_calls": False},
    ),
    "call is cut off": (f"{THOUGHT}{CALL}", {"tools": [WEATHER], "max_tokens": 30}),
    "a call and a stop": (f"{THOUGHT}{CALL} so STOP so", {"tools": [WEATHER], "stop": "STOP"}),
}


@pytest.fixture(params=CUTS)
def cuts(request) -> str | int:
    return request.param


@pytest.fixture
def same(engine, cuts):
    """`same(work)`: what `work` returns for the cuts, which has to be what it does token by
    token."""

    def compare(work):
        engine.sizes = sizes("token by token")
        expected = work()
        engine.sizes = sizes(cuts)
        found = work()
        assert found == expected
        return found

    return compare


def steady(value):
    """Without what differs from request to request."""
    if isinstance(value, dict):
        return {key: steady(v) for key, v in value.items() if key not in VARYING}
    return [steady(v) for v in value] if isinstance(value, list) else value


def joined(chunks: list[dict]) -> dict:
    """A stream of chunks: of each choice texts, calls, logprobs, finish reason; and the usage."""
    choices: dict[int, dict] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], {"calls": {}, "logprobs": {}})
            delta = choice.get("delta", {"text": choice.get("text")})
            for key, value in delta.items():
                if key != "tool_calls":
                    whole[key] = whole.get(key, "") + value
            for call in delta.get("tool_calls", ()):
                function = whole["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                for key, value in call["function"].items():
                    function[key] += value
            for key, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(key, []).extend(values)
            whole["finish_reason"] = choice["finish_reason"]
    return {"choices": choices, "usage": chunks[-1]["usage"]}


def post(ask, path: str, **body):
    response = ask(path, {"model": "demo", **body})
    assert response.status_code == 200, response.text
    return response


def counted(tokenizer, text: str, end: str) -> int:
    """How many tokens a text has, up to the one with which it has `end`."""
    ids = tokenizer.encode(text, True)
    for count in range(len(ids) + 1):
        if end in b"".join(map(tokenizer.id_to_bytes, ids[:count])).decode(errors="replace"):
            return count
    return len(ids) + 1  # and the token that ends an answer


@pytest.mark.parametrize("name", CHATS)
def test_chat(ask, engine, same, name: str) -> None:
    engine.text, fields = CHATS[name]
    body = {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "temperature": 0.5, "seed": 1}
    body |= {"logprobs": True, "top_logprobs": 1, **fields}
    answer = same(lambda: steady(post(ask, "/v1/chat/completions", **body).json()))
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stream = same(lambda: joined(events(post(ask, "/v1/chat/completions", **body).text)))
    assert stream["usage"] == answer["usage"]
    for index, choice in enumerate(answer["choices"]):
        streamed, message = stream["choices"][index], choice["message"]
        assert choice["finish_reason"] == streamed["finish_reason"]
        assert (message["content"] or "") == streamed["content"]
        assert message.get("reasoning_content") == streamed.get("reasoning_content")
        calls = [call["function"] for call in message.get("tool_calls", ())]
        assert calls == list(streamed["calls"].values())
        assert choice["logprobs"] == streamed["logprobs"]
        assert len(choice["logprobs"]["content"]) * 2 == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("name", CHATS)
def test_responses(ask, engine, same, name: str) -> None:
    engine.text, fields = CHATS[name]
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "temperature": 0.5}
    renamed = {"max_tokens": "max_output_tokens", "tools": "tools"}
    body |= {renamed.get(key, key): value for key, value in fields.items()}
    if "tools" in fields:
        body["tools"] = [{"type": "function", **tool["function"]} for tool in fields["tools"]]
    if effort := body.pop("reasoning_effort", None):
        body["reasoning"] = {"effort": effort}
    answer = same(lambda: steady(post(ask, "/v1/responses", **body).json()))

    def stream():
        deltas: dict = {}
        for block in post(ask, "/v1/responses", stream=True, **body).text.strip().split("\n\n"):
            said = json.loads(block.split("\ndata: ")[1])
            if said["type"].endswith(".delta"):
                text, logprobs = deltas.get(said["output_index"], ("", []))
                logprobs = logprobs + said.get("logprobs", [])
                deltas[said["output_index"]] = (text + said["delta"], logprobs)
        return deltas, steady(said["response"])

    deltas, last = same(stream)
    assert last == answer
    for index, item in enumerate(answer["output"]):
        part = item["content"][0] if "content" in item else {"text": item["arguments"]}
        assert deltas.get(index, ("", [])) == (part["text"], part.get("logprobs", []))


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("stop", "STOP and"),
        ("stop in a word", " b"),
        ("not stopped", "never"),
        ("one call", "</function>"),
    ],
)
def test_usage_ends_with_the_answer(ask, engine, tokenizer, cuts, name: str, end: str) -> None:
    engine.text, fields = CHATS[name]
    engine.sizes = sizes(cuts)
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    usage = post(ask, "/v1/chat/completions", **body).json()["usage"]
    thought = counted(tokenizer, THOUGHT, "</think>")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": thought}
    end = end.removesuffix(" and")
    after = engine.text.removeprefix(THOUGHT)
    count = counted(tokenizer, THOUGHT + after, THOUGHT + after[: after.find(end)] + end)
    assert usage["completion_tokens"] == count


COMPLETIONS = {
    "stop": {"stop": ["STOP", "never"]},
    "stop and echo": {"stop": ["STOP"], "echo": True},
    "nothing is drawn": {"max_tokens": 0, "echo": True},
    "length": {"max_tokens": 4},
    "whole": {"max_tokens": 100},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(ask, engine, tokenizer, same, name: str) -> None:
    engine.text = "Hello, Wörld 🌍. STOP and more"
    body = {"prompt": ["a b c", "d"], "n": 2, "logprobs": 1, "max_tokens": 50, "temperature": 0.5}
    body |= {"seed": 1, **COMPLETIONS[name]}
    answer = same(lambda: steady(post(ask, "/v1/completions", **body).json()))
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stream = same(lambda: joined(events(post(ask, "/v1/completions", **body).text)))
    assert stream["usage"] == answer["usage"]
    for index, choice in enumerate(answer["choices"]):
        for key in ("text", "logprobs", "finish_reason"):
            assert choice[key] == stream["choices"][index][key]
    if "stop" in body:
        drawn = counted(tokenizer, engine.text, "STOP")
        assert answer["usage"]["completion_tokens"] == 4 * drawn
        prompts = [*["a b c"] * 2, *["d"] * 2] if "echo" in body else [""] * 4
        for prompt, choice in zip(prompts, answer["choices"], strict=True):
            assert choice["text"] == prompt + "Hello, Wörld 🌍. "
            count = len(tokenizer.encode(prompt, True)) if prompt else 0
            assert len(choice["logprobs"]["tokens"]) == count + drawn


@pytest.fixture
def llm(engine, monkeypatch):
    monkeypatch.setattr("et_moe.serving.llm.load_engine", lambda *_, **__: engine)
    return LLM(DEMO)


@pytest.mark.parametrize("stop", [["STOP"], ["ö"], ["never"], []])
def test_python(llm, engine, tokenizer, same, stop: list[str]) -> None:
    engine.text = "Hello, Wörld 🌍. STOP and more"
    params = SamplingParams(stop=stop, logprobs=1, prompt_logprobs=0, n=2, seed=1)
    requests = same(lambda: llm.generate(["a b", "c"], params))
    messages = [[{"role": "user", "content": "Hi"}]] * 3
    requests += same(lambda: llm.chat(messages, params))
    end = stop[0] if stop else "never"
    count = counted(tokenizer, engine.text, end)
    for output in itertools.chain.from_iterable(request.outputs for request in requests):
        assert output.text == engine.text.partition(end)[0] and output.finish_reason == "stop"
        ids = [*tokenizer.encode(engine.text, True), 2045][:count]
        assert output.token_ids == ids and len(output.logprobs) == count
    stream = same(lambda: [list(llm.stream("c", params))[-1][1]])
    assert stream == [requests[1].outputs[0]]


def test_an_error_behind_the_end_is_none(ask, llm, engine, tokenizer, cuts) -> None:
    """And what was said before one is said in a stream."""
    engine.text, engine.sizes = "one two three four", sizes(cuts)
    engine.fail_after = counted(tokenizer, engine.text, "three")
    for stop in ("three", "never"):
        body = {"prompt": "a", "stop": [stop], "n": 2, "stream": True}
        text = post(ask, "/v1/completions", **body).text
        lines = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
        if stop == "never":
            assert "no luck any more" in lines[-1]["error"]["message"]
            with pytest.raises(GenerationError, match="any more"):
                llm.generate("a", SamplingParams(stop=stop))
        else:
            assert [line["choices"][0]["finish_reason"] for line in lines].count("stop") == 2
            [request] = llm.generate("a", SamplingParams(stop=stop))
            assert request.outputs[0].text == "one two "

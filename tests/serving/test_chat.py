"""POST /v1/chat/completions over a fake engine."""

import json

import pytest

QUESTION = {"role": "user", "content": "Hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.fixture
def chat(ask):
    def send(**fields):
        body = {"model": "demo", "messages": [QUESTION], **fields}
        response = ask("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return events(response.text) if fields.get("stream") else response.json()

    return send


def events(text: str) -> list[dict]:
    """The payloads of a stream, whose last must be [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def joined(chunks: list[dict], index: int = 0) -> dict:
    """The message and the finish reason of a streamed choice."""
    message: dict = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            assert reason is None, "a chunk after the last"
            delta, reason = choice["delta"], choice["finish_reason"]
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key, "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append(dict(call["function"]))
                else:
                    function = message["tool_calls"][call["index"]]
                    function["arguments"] += call["function"]["arguments"]
    return {**message, "finish_reason": reason}


def test_an_answer(chat, engine, tokenizer) -> None:
    engine.text = "I greet.\n</think>\n\nHello, Wörld 🌍."
    answer = chat()
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "demo"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, Wörld 🌍.",
        "reasoning_content": "I greet.",
    }
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    [(prompt, params)] = engine.submitted
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert prompt == tokenizer.encode(text, True)
    assert params.max_tokens is None and not params.guided
    count = len(tokenizer.encode(engine.text, True)) + 1
    thinking = len(tokenizer.encode("I greet.\n</think>", True))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": count,
        "total_tokens": len(prompt) + count,
        "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def test_a_stream_says_the_same(chat, engine) -> None:
    engine.text = "I greet.\n</think>\n\nHello, Wörld 🌍."
    chunks = chat(stream=True)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    first = {"role": "assistant", "content": ""}
    assert chunks[0]["choices"][0]["delta"] == first and "usage" not in chunks[0]
    message = joined(chunks)
    assert message["content"] == "Hello, Wörld 🌍." and message["finish_reason"] == "stop"
    assert message["reasoning_content"] == "I greet."
    assert len(chunks) > 8
    with_usage = chat(stream=True, stream_options={"include_usage": True})
    assert with_usage[-1]["choices"] == [] and with_usage[-1]["usage"] == chat()["usage"]
    assert all(chunk["usage"] is None for chunk in with_usage[:-1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", ["", "hm\n</think>\n\n"])
def test_tool_calls(chat, engine, stream: bool, thinking: str) -> None:
    """Tools are called after the thinking or inside of it."""
    engine.text = f"{thinking}{CALL}\n{CALL}"
    answer = chat(tools=[WEATHER], stream=stream)
    if stream:
        message = joined(answer)
        reason, calls = message["finish_reason"], message["tool_calls"]
        pieces = [c for chunk in answer for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
        assert len(pieces) > 6
    else:
        [choice] = answer["choices"]
        message, reason = choice["message"], choice["finish_reason"]
        assert message["content"] is None
        assert all(call["type"] == "function" and call["id"] for call in message["tool_calls"])
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        calls = [call["function"] for call in message["tool_calls"]]
    assert reason == "tool_calls"
    assert calls == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}] * 2
    assert message.get("reasoning_content", "") == thinking[:2]


def test_one_call_at_a_time(chat, engine) -> None:
    engine.text = f"</think>{CALL}\n{CALL}"
    engine.seconds = 0.002
    [choice] = chat(tools=[WEATHER], parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert engine.cancelled


def test_no_tools_no_calls(chat, engine) -> None:
    engine.text = f"</think>{CALL}"
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        [choice] = chat(**fields)["choices"]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
    prompts = [prompt for prompt, _ in engine.submitted]
    assert prompts[0] == prompts[1]


def test_a_tool_result_and_its_call_in_the_prompt(chat, engine, tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [{"type": "text", "text": "Two."}]},
        QUESTION,
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    chat(messages=messages)
    [(prompt, _)] = engine.submitted
    expected = (
        "<|im_start|>system\nOne.\n\nTwo.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\n<tool_call>\n<function=f>\n"
        "<parameter=x>\n[1]\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert prompt == tokenizer.encode(expected, True)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_thinking_or_not(chat, engine, fields: dict, thinks: bool) -> None:
    engine.text = "Hello."
    [choice] = chat(**fields)["choices"]
    key = "reasoning_content" if thinks else "content"
    assert choice["message"][key] == "Hello."


def test_stop_strings(chat, engine) -> None:
    """They end the content, which is cut in front of them, and free the place; thinking ignores
    them."""
    engine.text = "a STOP b</think>c STOP d" + " e" * 100
    engine.seconds = 0.001
    for stream in (False, True):
        answer = chat(stop=["STOP", "never"], stream=stream)
        message = joined(answer) if stream else answer["choices"][0]["message"]
        assert message["content"] == "c " and message["reasoning_content"] == "a STOP b"
        choice = message if stream else answer["choices"][0]
        assert choice["finish_reason"] == "stop"
    assert len(engine.cancelled) == 2


def test_length(chat, engine, tokenizer) -> None:
    engine.text = f"</think>{CALL}"
    limit = len(tokenizer.encode(engine.text[: engine.text.index("is\n")], True))
    for name in ("max_tokens", "max_completion_tokens"):
        [choice] = chat(tools=[WEATHER], **{name: limit})["choices"]
        assert choice["finish_reason"] == "length"
        with pytest.raises(ValueError):
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(chat, engine, tokenizer, stream: bool) -> None:
    """Each has its own seed, and a stop string of one leaves the others alone."""
    texts = {5: "</think>one STOP", 6: "</think>two", 7: "</think>three and more"}
    engine.answers = lambda _, params: [*tokenizer.encode(texts[params.seed], True), 2045]
    answer = chat(n=3, seed=5, stop="STOP", stream=stream)
    if stream:
        contents = [joined(answer, index)["content"] for index in range(3)]
    else:
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert contents == ["one ", "two", "three and more"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(chat, engine, tokenizer, stream: bool) -> None:
    engine.text = "</think>é!"
    answer = chat(logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk["choices"][0] for chunk in answer] if stream else answer["choices"]
    entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    ids = [*tokenizer.encode(engine.text, True), 2045]
    assert [bytes(entry["bytes"]) for entry in entries] == [tokenizer.id_to_bytes(i) for i in ids]
    assert all(len(e["top_logprobs"]) == 2 and e["logprob"] == -0.5 for e in entries)
    assert entries[0]["token"] == "</think>" == entries[0]["top_logprobs"][0]["token"]


def test_sampling_parameters(chat, engine) -> None:
    chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, presence_penalty=1,
        frequency_penalty=-1, repetition_penalty=1.1, logit_bias={"7": -100}, stop_token_ids=[9],
        ignore_eos=True, max_tokens=4, top_logprobs=5, logprobs=True,
    )  # fmt: skip
    [(_, params)] = engine.submitted
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.seed, params.max_tokens) == (1.1, 3, 4)
    assert (params.logit_bias, params.stop_token_ids) == ({7: -100}, (9,))
    assert params.ignore_eos and params.logprobs == 5
    chat(top_k=-1)
    chat()
    seeds = [params.seed for _, params in engine.submitted]
    assert engine.submitted[1][1].top_k == 0 and seeds[1] != seeds[2]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_json_answers(chat, engine, thinks: bool, form: str) -> None:
    """Answers are JSON whatever the model would rather say; the thinking before them is free."""
    engine.text = ("hm\n</think>\n\n" if thinks else "") + 'Sure: {"name": "Ann", "age": 7}'
    response_format = {"type": form}
    if form == "json_schema":
        response_format["json_schema"] = {"name": "person", "schema": SCHEMA, "strict": True}
    options = {"enable_thinking": thinks}
    [choice] = chat(response_format=response_format, chat_template_kwargs=options, max_tokens=200)[
        "choices"
    ]
    value = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop" and isinstance(value, dict)
    assert choice["message"].get("reasoning_content", "") == ("hm" if thinks else "")
    if form == "json_schema":
        assert set(value) == {"name", "age"} and isinstance(value["age"], int)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "set_alarm"}}], ids=str
)
def test_calls_that_are_required(chat, engine, thinks: bool, choice) -> None:
    alarm = {
        "type": "function",
        "function": {
            "name": "set_alarm",
            "parameters": {
                "type": "object",
                "properties": {
                    "label": {"type": "string"},
                    "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                    "days": {"type": "array", "items": {"enum": ["sat"]}, "maxItems": 1},
                    "sound": {"type": "string", "enum": ["bell", "beep"]},
                },
                "required": ["label", "hour", "sound"],
            },
        },
    }
    call = CALL.replace("get_weather", "set_alarm").replace("city", "label")
    engine.text = ("hm\n</think>\n\n" if thinks else "") + f"I cannot.{call}"
    [answer] = chat(
        tools=[alarm],
        tool_choice=choice,
        reasoning_effort="low" if thinks else "none",
        max_tokens=200,
    )["choices"]
    [function] = [call["function"] for call in answer["message"]["tool_calls"]]
    arguments = json.loads(function["arguments"])
    assert function["name"] == "set_alarm" and answer["finish_reason"] == "tool_calls"
    assert isinstance(arguments["hour"], int) and arguments["sound"] in ("bell", "beep")
    assert engine.submitted[0][1].guided

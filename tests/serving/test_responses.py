"""POST /v1/responses over a fake engine, asked by the openai package and read by its types."""

import asyncio
import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from served_app import DEMO, END, running_app

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "</function>\n</tool_call>"
)
THOUGHT = "I greet.\n</think>\n\n"
STREAM_EVENT: TypeAdapter = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def use(engine, tokenizer):
    """Runs `use(work)`, where `work` is given a client of the openai package."""

    def run(work):
        async def inside():
            async with running_app(engine, tokenizer) as http:
                url, options = "http://test/v1", {"http_client": http, "max_retries": 0}
                return await work(openai.AsyncOpenAI(base_url=url, api_key="none", **options))

        return asyncio.run(inside())

    return run


@pytest.fixture
def respond(use):
    """The response to a request, which has to be of the package's type in every field."""

    def send(**fields) -> Response:
        fields = {"model": "demo", "input": "Hi", **fields}
        raw = use(lambda client: client.responses.with_raw_response.create(**fields))
        return Response.model_validate_json(raw.text)

    return send


@pytest.fixture
def stream(ask):
    """The events of a streamed response, each of which has to be of the package's type."""

    def send(**fields) -> list:
        answer = ask("/v1/responses", {"model": "demo", "input": "Hi", "stream": True, **fields})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = []
        for text in answer.text.removesuffix("\n\n").split("\n\n"):
            name, data = text.split("\n")
            events.append(STREAM_EVENT.validate_json(data.removeprefix("data: ")))
            assert name == f"event: {events[-1].type}"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        return events

    return send


def kinds(events: list) -> list[str]:
    """The types of events, with runs of one type as one."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def plain(items: list) -> list[dict]:
    """Output items without ids."""
    dumped = [item.model_dump(exclude_none=True) for item in items]
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in dumped]


def message(text: str, status: str = "completed") -> dict:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "content": [part], "status": status}


def reasoning(text: str, status: str = "completed") -> dict:
    part = {"type": "reasoning_text", "text": text}
    return {"type": "reasoning", "summary": [], "content": [part], "status": status}


def call(arguments: str, status: str = "completed") -> dict:
    fields = {"name": "get_weather", "arguments": arguments, "status": status}
    return {"type": "function_call", **fields}


def test_a_response(respond, engine, tokenizer) -> None:
    engine.text = THOUGHT + "Hello, Wörld 🌍."
    answer = respond()
    assert answer.status == "completed" and answer.completed_at >= answer.created_at
    assert answer.output_text == "Hello, Wörld 🌍."
    assert plain(answer.output) == [reasoning("I greet."), message("Hello, Wörld 🌍.")]
    assert len({answer.id, *(item.id for item in answer.output)}) == 3
    [(prompt, params)] = engine.submitted
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert prompt == tokenizer.encode(text, True)
    assert params.max_tokens is None and not params.guided
    count = len(tokenizer.encode(engine.text, True)) + 1
    assert answer.usage.model_dump(exclude_none=True) == {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": len(prompt) // 2, "cache_write_tokens": 0},
        "output_tokens": count,
        "output_tokens_details": {
            "reasoning_tokens": len(tokenizer.encode("I greet.\n</think>", True))
        },
        "total_tokens": len(prompt) + count,
    }


def test_what_a_response_says_of_its_request(respond, engine) -> None:
    answer = respond()
    recommended = json.loads((DEMO / "generation_config.json").read_text())
    assert (answer.temperature, answer.top_p) == (recommended["temperature"], recommended["top_p"])
    assert answer.tool_choice == "auto"
    assert answer.text.format.type == "text" and answer.tools == [] and answer.metadata == {}
    assert answer.parallel_tool_calls and answer.truncation == "disabled" and not answer.store
    answer = respond(
        instructions="Be brief.", temperature=0.25, top_p=0.75, max_output_tokens=40, user="u",
        metadata={"a": "b"}, tools=[WEATHER], parallel_tool_calls=False, store=True,
        tool_choice={"type": "function", "name": "get_weather"}, truncation="disabled",
        reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"],
        extra_body={"top_k": 7, "seed": 3},
    )  # fmt: skip
    assert answer.instructions == "Be brief." and answer.max_output_tokens == 40
    assert (answer.temperature, answer.top_p, answer.user) == (0.25, 0.75, "u")
    assert answer.metadata == {"a": "b"} and answer.parallel_tool_calls is False
    assert answer.tool_choice.name == "get_weather" and answer.reasoning.effort == "low"
    assert answer.tools[0].model_dump(exclude_none=True) == WEATHER
    params = engine.submitted[-1][1]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.75, 40)
    assert (params.top_k, params.seed) == (7, 3)


def test_the_events_of_a_stream(stream, respond, engine) -> None:
    engine.text = THOUGHT + "Hello, Wörld 🌍."
    events = stream()
    assert kinds(events) == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    first, last = events[0].response, events[-1].response
    assert first.status == "in_progress" and first.output == [] and first.usage is None
    assert last.id == first.id and last.usage == respond().usage
    assert plain(last.output) == [reasoning("I greet."), message("Hello, Wörld 🌍.")]
    for index, (kind, text) in enumerate((("reasoning", "I greet."), ("output", last.output_text))):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        assert own[0].item.status == "in_progress" and own[0].item.content == []
        assert own[-1].item == last.output[index]
        assert {e.item_id for e in own[1:-1]} == {own[0].item.id} == {last.output[index].id}
        assert {e.content_index for e in own[1:-1]} == {0} and own[1].part.text == ""
        deltas = [e.delta for e in own if e.type == f"response.{kind}_text.delta"]
        assert len(deltas) > 1 and "".join(deltas) == own[-3].text == own[-2].part.text == text


def test_the_openai_package_follows_a_stream(use, engine) -> None:
    """Its accumulator refuses events that do not fit each other."""
    engine.text = f"{THOUGHT}I look.\n{CALL}\n{CALL}"

    async def work(client):
        tool = {**WEATHER, "strict": False}
        async with client.responses.stream(model="demo", input="Hi", tools=[tool]) as events:
            snapshots = [e.snapshot async for e in events if hasattr(e, "snapshot")]
            return snapshots, await events.get_final_response()

    snapshots, final = use(work)
    arguments = '{"city": "Paris"}'
    assert "I look." in snapshots and snapshots[-1] == arguments
    expected = [reasoning("I greet."), message("I look."), call(arguments), call(arguments)]
    found = [{k: v for k, v in item.items() if k != "parsed_arguments"}
             for item in plain(final.output)]  # fmt: skip
    assert found == expected
    assert len({item.call_id for item in final.output[2:]}) == 2


def test_the_events_of_a_call(stream, engine) -> None:
    engine.text = f"</think>{CALL}"
    events = stream(tools=[WEATHER])
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[2].item.arguments == "" and events[2].item.name == "get_weather"
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == events[-3].arguments == '{"city": "Paris"}'
    assert events[-2].item == events[-1].response.output[0]


def test_text_inside_of_a_call(stream, respond, engine) -> None:
    """It is an item of its own, and the call goes on."""
    engine.text = "</think>" + CALL.replace("<parameter", "so\n<parameter")
    output = respond(tools=[WEATHER]).output
    assert plain(output) == [call('{"city": "Paris"}'), message("so")]
    assert plain(stream(tools=[WEATHER])[-1].response.output) == plain(output)


def test_one_call_at_a_time(respond, engine) -> None:
    engine.text, engine.seconds = f"</think>{CALL}\n{CALL}", 0.002
    answer = respond(tools=[WEATHER], parallel_tool_calls=False)
    assert plain(answer.output) == [call('{"city": "Paris"}')] and answer.status == "completed"
    assert engine.cancelled


def test_a_round_with_a_tool(respond, engine, tokenizer) -> None:
    """What a response holds is sent back as it is, with what the tool has answered."""
    engine.text = f"{THOUGHT}I look.\n{CALL}\n{CALL}"
    question = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Two."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ]
    first = respond(input=question, instructions="One.", tools=[WEATHER])
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": output}
        for item, output in zip(
            first.output[2:], ("7", [{"type": "input_text", "text": "8"}]), strict=True
        )
    ]
    engine.text = "</think>\n\nWarm."
    history = [*question, *first.output, *outputs]
    respond(input=history, instructions="One.", tools=[WEATHER], tool_choice="none")
    expected = (
        "<|im_start|>system\nOne.\n\nTwo.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nI greet.\n</think>\n\nI look.\n\n{CALL}\n{CALL}"
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert engine.submitted[-1][0] == tokenizer.encode(expected, True)


def test_messages_of_an_assistant_stay_apart(respond, engine, tokenizer) -> None:
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    thought = {"type": "reasoning", "id": "1", "summary": [{"type": "summary_text", "text": "hm"}]}
    respond(input=[{"role": "user", "content": "Hi"}, *said, thought])
    turns = "".join(
        f"<|im_start|>assistant\n<think>\n{thought}\n</think>\n\n{text}<|im_end|>\n"
        for thought, text in (("", "a"), ("", "b"), ("hm", ""))
    )
    start = "<|im_start|>assistant\n<think>\n"
    expected = f"<|im_start|>user\nHi<|im_end|>\n{turns}{start}"
    assert engine.submitted[0][0] == tokenizer.encode(expected, True)


def test_the_prompt_is_that_of_chat_completions(respond, ask, engine) -> None:
    respond(tools=[WEATHER], instructions="One.")
    function = {key: WEATHER[key] for key in ("name", "parameters")}
    messages = [{"role": "system", "content": "One."}, {"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": function}]
    ask("/v1/chat/completions", {"messages": messages, "tools": tools})
    assert engine.submitted[0][0] == engine.submitted[1][0]


@pytest.mark.parametrize("effort", ["none", "low", "max"])
def test_thinking_or_not(respond, engine, effort: str) -> None:
    engine.text = "Hello."
    [item] = respond(reasoning={"effort": effort}).output
    assert item.type == ("message" if effort == "none" else "reasoning")


@pytest.mark.parametrize(
    ("end", "types", "text"),
    [
        (" greet", ["reasoning"], '"text": "I"'),
        ("lo.", ["reasoning", "message"], '"text": "Hel"'),
        ("is\n", ["reasoning", "message", "function_call"], '"arguments": "{\\"city\\": \\"Par"'),
    ],
)
def test_an_answer_that_is_cut_off(
    stream, respond, engine, tokenizer, end: str, types: list, text: str
) -> None:
    """No event says that half of a call's arguments are done."""
    engine.text = f"{THOUGHT}Hello.\n{CALL}"
    ids = [*tokenizer.encode(engine.text[: engine.text.index(end)], True)]
    engine.answers = lambda *_: [*ids, END]
    fields = {"tools": [WEATHER], "max_output_tokens": len(ids)}
    events = stream(**fields)
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.status == "incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.completed_at is None and last.response.usage.output_tokens == len(ids)
    output = last.response.output
    assert plain(output) == plain(respond(**fields).output)
    assert [item.type for item in output] == types
    assert {item.status for item in output[:-1]} <= {"completed"}
    assert output[-1].status == "incomplete" and text in json.dumps(output[-1].model_dump())
    assert events[-2].item == output[-1]
    assert "function_call_arguments.done" not in kinds(events)


def test_nothing_to_say(respond, engine) -> None:
    engine.text = "</think>"
    answer = respond()
    assert answer.output == [] and answer.output_text == "" and answer.status == "completed"


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize("effort", ["none", "low"])
def test_json_by_a_schema(use, respond, engine, effort: str) -> None:
    engine.text = ("" if effort == "none" else "hm\n</think>\n\n") + 'Sure: {"name": "Ann"}'
    fields = {"model": "demo", "input": "Hi", "reasoning": {"effort": effort}}
    fields["max_output_tokens"] = 200
    parsed = use(lambda client: client.responses.parse(text_format=Person, **fields))
    assert isinstance(parsed.output_parsed, Person)
    form = parsed.text.format
    assert form.name == "Person" and form.strict and form.schema_["required"] == ["name", "age"]
    answer = respond(text={"format": {"type": "json_object"}, "verbosity": "low"}, **fields)
    assert isinstance(json.loads(answer.output_text), dict)


def test_a_call_that_is_required(respond, engine) -> None:
    engine.text = f"hm\n</think>\n\nI cannot.{CALL}"
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        output = respond(tools=[WEATHER], tool_choice=choice, max_output_tokens=200).output
        assert [item.type for item in output[:2]] == ["reasoning", "function_call"]
        assert json.loads(output[1].arguments).keys() <= {"city"}


def test_logprobs(stream, respond, engine, tokenizer) -> None:
    """They are those of the message's tokens."""
    engine.text = "hm</think>é!"
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [_, item] = respond(**fields).output
    entries = item.content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "é!"
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in entries)
    events = stream(**fields)
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert [entry.token for e in deltas for entry in e.logprobs] == [e.token for e in entries]
    assert events[-1].response.output[1].content == item.content
    assert respond(include=fields["include"]).output[1].content[0].logprobs[0].top_logprobs == []


def test_a_stream_that_fails(stream, engine, monkeypatch) -> None:
    """The last event says so, with what there was until then."""
    engine.text, draw = THOUGHT + "Hello there, how are you?", engine._token

    def draw_some(request) -> int:
        if len(request.drawn) == 10:
            engine.fail_next = "no luck"
        return draw(request)

    monkeypatch.setattr(engine, "_token", draw_some)
    last = stream()[-1]
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == "server_error" and "no luck" in last.response.error.message
    thought, said = last.response.output
    assert thought.status == "completed" and said.status == "incomplete"
    assert said.content[0].text.startswith("He") and last.response.completed_at is None


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_before_the_first_token(ask, engine, streamed: bool) -> None:
    engine.fail_next = "no luck"
    answer = ask("/v1/responses", {"input": "Hi", "stream": streamed})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "generation_failed"


def test_the_openai_package_names_the_fault(use) -> None:
    with pytest.raises(openai.BadRequestError, match="responses are not kept") as caught:
        use(
            lambda client: client.responses.create(
                model="demo", input="Hi", previous_response_id="resp_1"
            )
        )
    assert caught.value.param == "previous_response_id"


def test_tools_that_agents_send_along_are_not_shown(ask, engine) -> None:
    """As Codex does, which calls its functions alone."""
    others = [
        {"type": "web_search", "external_web_access": True},
        {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [WEATHER]},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    ]
    for tools in ([WEATHER], [others[0], WEATHER, *others[1:]]):
        response = ask("/v1/responses", {"input": "Hi", "tools": tools})
        assert response.status_code == 200, response.text
        assert [tool["name"] for tool in response.json()["tools"]] == ["get_weather"]
    (alone, _), (beside, _) = engine.submitted
    assert alone == beside

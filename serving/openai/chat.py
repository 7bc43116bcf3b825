"""POST /v1/chat/completions: a conversation to an answer of reasoning, content and tool calls."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack

from et_moe.serving.generation import Generation, Step, in_turn
from et_moe.serving.grammars import json_grammar, tool_grammar
from et_moe.serving.guidance import GrammarError, Guide
from et_moe.serving.openai.errors import bad_request, refusals
from et_moe.serving.openai.events import Head, event, usage
from et_moe.serving.openai.logprobs import chat_logprobs
from et_moe.serving.openai.protocol import ChatRequest, Message, NamedTool
from et_moe.serving.openai.sampling import check_places, sampling_params
from et_moe.serving.output_parser import Content, OutputParser, Reasoning
from et_moe.serving.reasoning import opens_reasoning
from et_moe.serving.served_model import ServedModel
from et_moe.serving.tool_calls import CallEnd, CallStart


def template_messages(messages: list[Message]) -> list[dict]:
    """As chat templates want them: the system messages at the start are one, since templates take
    only one there."""
    converted = [message.template() for message in messages]
    leading = 0
    while leading < len(converted) and converted[leading]["role"] == "system":
        leading += 1
    if leading > 1:
        text = "\n\n".join(message["content"] for message in converted[:leading])
        converted[:leading] = [{"role": "system", "content": text}]
    return converted


def render(request: ChatRequest, model: ServedModel) -> str:
    """The prompt of a conversation."""
    if model.template is None:
        message = f"the model {model.name!r} has no chat template: use /v1/completions"
        raise bad_request(message, "messages")
    options = {}
    if request.reasoning_effort is not None:
        options["reasoning_effort"] = request.reasoning_effort
        options["enable_thinking"] = request.reasoning_effort != "none"
    options |= request.chat_template_kwargs or {}
    tools = None if request.tool_choice == "none" else request.tools
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in options:
            raise bad_request(f"chat_template_kwargs: {name} is not for here", name)
    text = model.template.render(template_messages(request.messages), tools, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "messages: a lone surrogate (\\ud800 to \\udfff), which is no character"
        raise bad_request(message, "messages") from None
    return text


class _Choice:
    """One answer of a request, as it comes.

    Args:
        index: of the choice.
        tools: that it may call; None if calls are just text.
    """

    def __init__(
        self,
        index: int,
        request: ChatRequest,
        model: ServedModel,
        generation: Generation,
        thinking: bool,
    ) -> None:
        tools = None if request.tool_choice == "none" else request.tool_schemas()
        self.index, self.generation = index, generation
        self._model = model
        self._one_call = request.parallel_tool_calls is False
        self._parser = OutputParser(thinking, tools, request.stop or ())
        self._logprobs: list[dict] = []
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0
        self.message: dict = {"role": "assistant", "content": ""}

    def add(self, step: Step) -> list[dict]:
        """The deltas that a step adds, after which `finish_reason` may be known."""
        if self.finish_reason is not None:
            return []
        if step.event.logprobs is not None:
            ids, values = step.event.token_ids, step.event.logprobs
            self._logprobs += chat_logprobs(self._model, ids, values)
        if self._parser.reasoning:
            self.reasoning_tokens += len(step.event.token_ids)
        parts = self._parser.feed(step.text)
        reason = step.event.finish_reason
        if self._parser.stopped is None and reason is not None:
            parts += self._parser.finish(complete=reason != "length")
        deltas = []
        for part in parts:
            deltas.append(self._delta(part))
            if isinstance(part, CallEnd) and self._one_call:
                reason = reason or "stop"
                break
        if self._parser.stopped is not None:
            reason = "stop"
        if reason is not None:
            self._finish(reason, step)
        return [delta for delta in deltas if delta]

    def _finish(self, reason: str, step: Step) -> None:
        if step.event.finish_reason is None:
            self.generation.end()
        self.finish_reason = "tool_calls" if reason == "stop" and self._parser.calls else reason

    def _delta(self, part) -> dict:
        if isinstance(part, Reasoning):
            text = self.message.get("reasoning_content", "") + part.text
            self.message["reasoning_content"] = text
            return {"reasoning_content": part.text}
        if isinstance(part, Content):
            self.message["content"] += part.text
            return {"content": part.text}
        calls = self.message.setdefault("tool_calls", [])
        if isinstance(part, CallStart):
            function = {"name": part.name, "arguments": ""}
            call = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            calls.append(call)
            return {"tool_calls": [{"index": part.index, **call, "function": dict(function)}]}
        if isinstance(part, CallEnd):
            return {}
        calls[part.index]["function"]["arguments"] += part.json
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.json}}]}

    def take_logprobs(self) -> dict | None:
        """Those of the tokens since the last call, if any were asked for."""
        taken, self._logprobs = self._logprobs, []
        return {"content": taken} if taken else None

    def whole(self) -> dict:
        """The choice of an answer that is not streamed."""
        if "tool_calls" in self.message and not self.message["content"]:
            self.message["content"] = None
        return {
            "index": self.index,
            "message": self.message,
            "logprobs": self.take_logprobs(),
            "finish_reason": self.finish_reason,
        }


class Chat:
    """A request that the engine has accepted; to be made by `start` and left by `close`."""

    def __init__(
        self, request: ChatRequest, model: ServedModel, prompt_ids: list[int], choices
    ) -> None:
        self._request, self._prompt_tokens = request, len(prompt_ids)
        self._choices: list[_Choice] = choices
        kind = "chat.completion" + (".chunk" if request.stream else "")
        self._head = Head("chatcmpl", kind, model.name)

    @classmethod
    async def start(cls, request: ChatRequest, model: ServedModel) -> "Chat":
        """Raises APIError, ChatTemplateError, and as `Engine.submit`."""
        check_places(request, 1, model)
        prompt, prompt_ids = await asyncio.to_thread(_encode, request, model)
        thinking = opens_reasoning(prompt)
        guides = await _guides(request, model, thinking)
        params = sampling_params(
            request,
            model.defaults,
            model.engine.engine.info.vocab_size,
            request.max_completion_tokens or request.max_tokens,
            (request.top_logprobs or 0) if request.logprobs else None,
        )
        with refusals():
            generations = model.start([prompt_ids] * request.n, params, guides)
        choices = [
            _Choice(i, request, model, generation, thinking)
            for i, generation in enumerate(generations)
        ]
        return cls(request, model, prompt_ids, choices)

    def close(self) -> None:
        for choice in self._choices:
            choice.generation.close()

    async def whole(self) -> dict:
        """The answer when it has ended."""
        with ExitStack() as stack:
            stack.callback(self.close)
            async for index, step in in_turn([choice.generation for choice in self._choices]):
                self._choices[index].add(step)
        choices = [choice.whole() for choice in self._choices]
        return self._head.with_choices(choices, usage=self._usage())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as it comes, without the end of the stream."""
        options = self._request.stream_options
        more = {"usage": None} if options and options.include_usage else {}

        def chunk(choice: _Choice, delta: dict, reason: str | None = None) -> bytes:
            fields = {"index": choice.index, "delta": delta, "logprobs": choice.take_logprobs()}
            return event(self._head.with_choices([{**fields, "finish_reason": reason}], **more))

        with ExitStack() as stack:
            stack.callback(self.close)
            opened: set[int] = set()
            async for index, step in in_turn([choice.generation for choice in self._choices]):
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue
                deltas = choice.add(step)
                if index not in opened:
                    opened.add(index)
                    # Its logprobs wait for the first delta.
                    head = {"index": index, "delta": {"role": "assistant", "content": ""}}
                    head |= {"logprobs": None, "finish_reason": None}
                    yield event(self._head.with_choices([head], **more))
                for delta in deltas:
                    yield chunk(choice, delta)
                if choice.finish_reason is not None:
                    yield chunk(choice, {}, choice.finish_reason)
        if more:
            yield event(self._head.with_choices([], usage=self._usage()))

    def _usage(self) -> dict:
        generations = [choice.generation for choice in self._choices]
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        return usage(self._prompt_tokens, generations, reasoning)


def _encode(request: ChatRequest, model: ServedModel) -> tuple[str, list[int]]:
    prompt = render(request, model)
    with refusals():
        return prompt, model.tokenizer.encode(prompt, True)


async def _guides(request: ChatRequest, model: ServedModel, thinking: bool) -> list[Guide] | None:
    """Of a request whose answer has to have a form."""
    choice, form = request.tool_choice, request.response_format
    param = "tools"
    if choice == "required" or isinstance(choice, NamedTool):
        tools = request.tool_schemas()
        if isinstance(choice, NamedTool):
            tools = {choice.function.name: tools[choice.function.name]}
        several = request.parallel_tool_calls is not False and choice == "required"
        build = lambda: tool_grammar(tools, thinking, several)  # noqa: E731
    elif form is not None and form.type != "text":
        schema = form.json_schema.json_schema if form.json_schema else {"type": "object"}
        param = "response_format"
        build = lambda: json_grammar(schema, thinking)  # noqa: E731
    else:
        return None
    try:
        return await model.guides.compile(build(), request.n)
    except (GrammarError, RecursionError) as error:
        raise bad_request(f"{param}: the schema cannot be used: {error}", param) from None

"""A conversation that the engine has accepted, whatever the form that it came in: its prompt, the
grammar of its answers, and the parts of each answer as they come."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from et_moe.serving.chat_template import ChatTemplateError
from et_moe.serving.generation import Generation
from et_moe.serving.grammars import json_grammar, tool_grammar
from et_moe.serving.guidance import GrammarError, Guide
from et_moe.serving.interface import Event, SamplingParams
from et_moe.serving.openai.errors import bad_request, refusals
from et_moe.serving.openai.logprobs import chat_logprob
from et_moe.serving.openai.protocol import ChatRequest, Message, NamedTool
from et_moe.serving.openai.sampling import check_places, sampling_params
from et_moe.serving.output_parser import OutputParser, Part, joined
from et_moe.serving.reasoning import opens_reasoning
from et_moe.serving.served_model import ServedModel
from et_moe.serving.steps import Step
from et_moe.serving.tool_calls import CallEnd


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
    options = {}
    if request.reasoning_effort is not None:
        options["reasoning_effort"] = request.reasoning_effort
        options["enable_thinking"] = request.reasoning_effort != "none"
    options |= request.chat_template_kwargs or {}
    tools = None if request.tool_choice == "none" else request.tools
    return rendered(model, request.messages, tools, options, place=request.place("messages"))


def rendered(
    model: ServedModel,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    options: Mapping[str, Any],
    add_generation_prompt: bool = True,
    place: str = "messages",
) -> str:
    """The text of a conversation by the model's template.

    Args:
        options: the template's own variables.
        place: where the request has its messages.

    Raises:
        APIError: there is no template, it refuses, or the text is none that can be encoded.
    """
    if model.template is None:
        message = f"the model {model.name!r} has no chat template: use /v1/completions"
        raise bad_request(message, place)
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in options:
            message = f"chat_template_kwargs: {name} is not for here"
            raise bad_request(message, "chat_template_kwargs")
    try:
        text = model.template.render(
            template_messages(messages), tools, add_generation_prompt, **options
        )
    except ChatTemplateError as error:
        raise bad_request(str(error), place) from None
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{place}: a lone surrogate (\\ud800 to \\udfff), which is no character"
        raise bad_request(message, place) from None
    return text


class Answer:
    """One answer of a conversation, as it comes.

    Args:
        thinking: the prompt has opened the thinking already.
        measure_thinking: whether tokens of reasoning have log-probabilities, too, if they were
            asked for.
    """

    def __init__(
        self,
        request: ChatRequest,
        model: ServedModel,
        generation: Generation,
        thinking: bool,
        measure_thinking: bool = True,
    ) -> None:
        tools = None if request.tool_choice == "none" else request.tool_schemas()
        self.generation = generation
        self._model, self._measure_thinking = model, measure_thinking
        self._one_call = request.parallel_tool_calls is False
        self._parser = OutputParser(thinking, tools, request.stop or ())
        self._logprobs: list[dict] = []
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0

    def add(self, event: Event) -> list[tuple[Part, list[dict]]]:
        """What an event adds, after which `finish_reason` may be known: parts, with the
        log-probabilities of the tokens since the part before."""
        if self.finish_reason is not None:
            return []
        parts = []
        for step in self.generation.steps(event):
            reasoning = self._parser.reasoning
            self.reasoning_tokens += reasoning and step.token_id is not None
            if step.logprob is not None and (self._measure_thinking or not reasoning):
                self._logprobs.append(chat_logprob(self._model, step.token_id, step.logprob))
            for part in self._parts(step):
                parts.append((part, self.take_logprobs()))
        return parts if len(parts) < 2 else joined(parts)

    def take_logprobs(self) -> list[dict]:
        """Those of the tokens behind the last part."""
        taken, self._logprobs = self._logprobs, []
        return taken

    def _parts(self, step: Step) -> list[Part]:
        parts = self._parser.feed(step.text)
        reason = step.finish_reason
        if self._parser.stopped is None and reason is not None:
            parts += self._parser.finish(complete=reason != "length")
        if self._one_call:
            for i, part in enumerate(parts):
                if isinstance(part, CallEnd):
                    parts, reason = parts[: i + 1], reason or "stop"
                    break
        if self._parser.stopped is not None:
            reason = "stop"
        if reason is not None:
            self._finish(reason, step)
        return parts

    def _finish(self, reason: str, step: Step) -> None:
        if step.finish_reason is None:
            self.generation.end()
        self.finish_reason = "tool_calls" if reason == "stop" and self._parser.calls else reason


@dataclass(frozen=True)
class Conversation:
    """What the engine has accepted: a generation for each of the request's `n` answers."""

    prompt_tokens: int
    thinking: bool  # the prompt has opened it
    params: list[SamplingParams]
    generations: list[Generation]

    @classmethod
    async def start(cls, request: ChatRequest, model: ServedModel) -> "Conversation":
        """Raises APIError, and as `Engine.submit`."""
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
        with refusals(request.place("messages")):
            generations = model.start([prompt_ids] * request.n, params, guides)
        return cls(len(prompt_ids), thinking, params, generations)


def _encode(request: ChatRequest, model: ServedModel) -> tuple[str, list[int]]:
    prompt = render(request, model)
    with refusals(request.place("messages")):
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
        param = request.place("response_format")
        build = lambda: json_grammar(schema, thinking)  # noqa: E731
    else:
        return None
    try:
        return await model.guides.compile(build(), request.n)
    except (GrammarError, RecursionError) as error:
        raise bad_request(f"{param}: the schema cannot be used: {error}", param) from None

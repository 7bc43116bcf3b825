"""POST /v1/completions: prompts to text, as evaluation harnesses use it too."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

from et_moe.serving.generation import Generation, in_turn
from et_moe.serving.interface import Event
from et_moe.serving.openai.errors import refusals
from et_moe.serving.openai.events import Head, Streamed, event, usage
from et_moe.serving.openai.logprobs import CompletionLogprobs
from et_moe.serving.openai.protocol import CompletionRequest
from et_moe.serving.openai.sampling import check_places, sampling_params
from et_moe.serving.output_parser import StopStrings
from et_moe.serving.served_model import ServedModel
from et_moe.serving.steps import Step


class _Choice:
    """One completion, as it comes."""

    def __init__(
        self,
        index: int,
        request: CompletionRequest,
        model: ServedModel,
        generation: Generation,
        prompt: tuple[str, list[int]],
    ) -> None:
        self.index, self.generation = index, generation
        self._echo = prompt if request.echo else None
        self._stops = StopStrings(request.stop or ())
        self._logprobs = None
        if request.logprobs is not None:
            self._logprobs = CompletionLogprobs(model, request.logprobs)
        self.finish_reason: str | None = None

    def add(self, event: Event) -> dict | None:
        """The choice of a chunk, or None for nothing new."""
        if self.finish_reason is not None:
            return None
        text = "".join([self._step(step) for step in self.generation.steps(event)])
        if not text and self.finish_reason is None:
            return None
        logprobs = None if self._logprobs is None else self._logprobs.take()
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def _step(self, step: Step) -> str:
        """The text that a step adds, after which `finish_reason` may be known."""
        text = self._echoed(step)
        reason = step.finish_reason
        if self._logprobs is not None and step.logprob is not None:
            self._logprobs.add(step.token_id, step.logprob)
        text += self._stops.feed(step.text)
        if reason is not None:
            text += self._stops.finish()
        if self._stops.found is not None:
            reason = "stop"
        if reason is not None:
            self.finish_reason = reason
            if step.finish_reason is None:
                self.generation.end()
        return text

    def _echoed(self, step: Step) -> str:
        """The prompt, with the first step of a request that asks for it."""
        if self._echo is None:
            return ""
        (text, ids), self._echo = self._echo, None
        if self._logprobs is not None and step.prompt_logprobs is not None:
            for token_id, logprob in zip(ids, step.prompt_logprobs, strict=True):
                self._logprobs.add(token_id, logprob)
        return text


class Completion(Streamed):
    """A request that the engine has accepted; to be made by `start`."""

    def __init__(self, request: CompletionRequest, model: ServedModel, prompt_tokens, choices):
        self._request, self._prompt_tokens = request, prompt_tokens
        self._choices: list[_Choice] = choices
        self._head = Head("cmpl", "text_completion", model.name)

    @classmethod
    async def start(cls, request: CompletionRequest, model: ServedModel) -> "Completion":
        """Raises APIError, and as `Engine.submit`."""
        check_places(request, len(request.prompts()), model)
        prompts = await asyncio.to_thread(_encode, request, model)
        params = sampling_params(
            request,
            model.defaults,
            model.engine.engine.info.vocab_size,
            request.max_tokens,
            request.logprobs,
            request.logprobs if request.echo else None,
        )
        pairs = [(prompt, its_params) for prompt in prompts for its_params in params]
        with refusals("prompt"):
            generations = model.start([ids for (_, ids), _ in pairs], [p for _, p in pairs])
        choices = [
            _Choice(i, request, model, generation, pair[0])
            for i, (generation, pair) in enumerate(zip(generations, pairs, strict=True))
        ]
        return cls(request, model, sum(len(ids) for _, ids in prompts), choices)

    def close(self) -> None:
        for choice in self._choices:
            choice.generation.close()

    async def _added(self) -> AsyncIterator[dict]:
        with ExitStack() as stack:
            stack.callback(self.close)
            async for index, drawn in in_turn([choice.generation for choice in self._choices]):
                if (added := self._choices[index].add(drawn)) is not None:
                    yield added

    async def whole(self) -> dict:
        """The answer when it has ended."""
        choices: dict[int, dict] = {}
        async for added in self._added():
            choice = choices.setdefault(added["index"], added)
            if choice is not added:
                choice["text"] += added["text"]
                choice["finish_reason"] = added["finish_reason"]
                for key, values in (added["logprobs"] or {}).items():
                    choice["logprobs"][key] += values
        ordered = [choices[index] for index in sorted(choices)]
        return self._head.with_choices(ordered, usage=self._usage())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as it comes, without the end of the stream."""
        options = self._request.stream_options
        more = {"usage": None} if options and options.include_usage else {}
        async for added in self._added():
            yield event(self._head.with_choices([added], **more))
        if more:
            yield event(self._head.with_choices([], usage=self._usage()))

    def _usage(self) -> dict:
        return usage(self._prompt_tokens, [choice.generation for choice in self._choices])


def _encode(request: CompletionRequest, model: ServedModel) -> list[tuple[str, list[int]]]:
    """Text and token ids of each prompt; special tokens in a text become their ids."""
    prompts = []
    with refusals("prompt"):
        for prompt in request.prompts():
            if isinstance(prompt, str):
                prompts.append((prompt, model.tokenizer.encode(prompt, True)))
            else:
                prompts.append((model.decode(prompt) if request.echo else "", prompt))
    return prompts

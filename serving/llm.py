"""Generating in Python, in vLLM's shape: `LLM(program).generate(prompts, SamplingParams(...))`."""

import random
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from et_moe.runner.python import Tokenizer
from et_moe.serving import interface
from et_moe.serving.chat_template import read_chat_template
from et_moe.serving.engine import load_engine, load_tokenizer
from et_moe.serving.generation_config import read_sampling_defaults
from et_moe.serving.interface import Drafts, Event, QueueFullError, TokenLogprob
from et_moe.serving.output_parser import StopStrings
from et_moe.serving.steps import Step, Steps


@dataclass(frozen=True)
class SamplingParams(interface.SamplingParams):
    """Those of the engine, and what becomes of the text."""

    n: int = 1  # answers to each prompt; they differ in the seed: seed, seed + 1, ...
    stop: str | Sequence[str] = ()  # strings that end the text and are no part of it
    skip_special_tokens: bool = True  # special tokens have no text

    def __post_init__(self) -> None:
        """Takes None and -1 where they mean in vLLM that nothing is asked for; a seed of None is
        drawn at random.

        Raises:
            ValueError: there is no answer to give, or a stop string is empty.
        """
        if self.n < 1:
            raise ValueError(f"n {self.n}: expected at least 1")
        unset = {"stop": (), "stop_token_ids": (), "logit_bias": {}}
        for name, value in (unset | {"seed": random.getrandbits(62)}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if "" in ([self.stop] if isinstance(self.stop, str) else self.stop):
            raise ValueError("stop: expected strings that are not empty")


@dataclass
class CompletionOutput:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | None = None  # the stop string
    drafts: Drafts = field(default_factory=Drafts)  # what a program of `--draft-tokens` guessed


@dataclass
class RequestOutput:
    """A prompt and its answers."""

    prompt: str | None  # None for a prompt of token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None


Prompt = str | Sequence[int]
"""Text, or token ids."""

Messages = Sequence[Mapping[str, Any]]


class GenerationError(RuntimeError):
    """The engine failed at a request."""


class _Answer:
    """Adds the events of a request to its outputs."""

    def __init__(
        self, request: RequestOutput, index: int, params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.output = CompletionOutput(index)
        self._request = request
        self._steps = Steps(tokenizer, params.skip_special_tokens)
        self._stops = StopStrings([params.stop] if isinstance(params.stop, str) else params.stop)
        request.outputs.append(self.output)

    def add(self, event: Event) -> str:
        """The new text. Once the output has a finish reason, further events change nothing.

        Raises:
            GenerationError: the engine failed before that.
        """
        output = self.output
        text = "".join([self._step(step) for step in self._steps.of(event)])
        output.text += text
        output.drafts = self._steps.drafts
        if output.finish_reason is None:
            if event.finish_reason == "error":
                raise GenerationError(event.error)
            output.finish_reason = event.finish_reason
        return text

    def _step(self, step: Step) -> str:
        output = self.output
        if step.prompt_logprobs is not None:
            self._request.prompt_logprobs = list(step.prompt_logprobs)
        if step.token_id is not None:
            output.token_ids.append(step.token_id)
        if step.logprob is not None:
            output.logprobs = output.logprobs or []
            output.logprobs.append(step.logprob)
        text = self._stops.feed(step.text)
        output.finish_reason = step.finish_reason
        if step.finish_reason is not None:
            text += self._stops.finish()
        if self._stops.found is not None:
            output.finish_reason, output.stop_reason = "stop", self._stops.found
            self._steps.end()
        return text


class LLM:
    """A program folder, loaded. Not for several threads at once; `AsyncEngine` serves many callers.

    Args:
        program: a folder that `et-moe export` wrote.
        engine_options: see `load_engine`.

    Raises:
        RuntimeError, ValueError: the program cannot be loaded, or one of its files cannot be read.
    """

    def __init__(self, program: str | Path, **engine_options: Any) -> None:
        folder = Path(program)
        self.tokenizer = load_tokenizer(folder)
        self._chat_template = read_chat_template(folder)
        self._defaults = SamplingParams(**read_sampling_defaults(folder))
        self.engine = load_engine(folder, **engine_options)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def get_default_sampling_params(self) -> SamplingParams:
        """Those that the program recommends; they hold where none are given."""
        return self._defaults

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The answers to all prompts, in their order; as many as the engine takes run at once.

        Args:
            prompts: one or several, as texts (special tokens in them become their ids) or ids.
            sampling_params: for all prompts, or one for each.
            use_tqdm: a progress bar on a terminal, where there are several prompts.

        Raises:
            TypeError: what is given is no prompt, or no parameters.
            ValueError: a prompt or parameter is refused.
            GenerationError: the engine failed at a request.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
            expected = "expected a text, a list of token ids, or a list of those"
            raise TypeError(f"prompts: {expected}, got {type(prompts).__name__}")
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Integral)):
            prompts = [prompts]
        if not isinstance(sampling_params, Sequence):
            sampling_params = [sampling_params or self._defaults] * len(prompts)
        for params in sampling_params:
            if not isinstance(params, SamplingParams):
                expected = f"expected SamplingParams, got {type(params).__name__}"
                raise TypeError(f"sampling_params: {expected}")
        if len(sampling_params) != len(prompts):
            count = f"{len(sampling_params)} for {len(prompts)} prompts"
            raise ValueError(f"sampling_params: {count}, expected one for each")
        requests = [self._request(prompt) for prompt in prompts]
        answers = self._run(self._submissions(requests, sampling_params))
        if use_tqdm and len(requests) > 1 and sys.stderr.isatty():
            total = sum(params.n for params in sampling_params)
            answers = track(answers, "generating", total=total, console=Console(stderr=True))
        for _ in answers:
            pass
        return requests

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[str, CompletionOutput]]:
        """One answer as it comes: the new text, and all of it so far. A consumer that leaves ends
        the request."""
        params = sampling_params or self._defaults
        answer = _Answer(self._request(prompt), 0, params, self.tokenizer)
        request_id = self.engine.submit(answer._request.prompt_token_ids, params)
        try:
            while answer.output.finish_reason is None:
                for event in self._wait():
                    ended = answer.output.finish_reason is not None
                    if event.request_id == request_id and not ended:
                        yield answer.add(event), answer.output
        finally:
            self.engine.cancel(request_id)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation or several, by the program's chat template. Texts are as
        the model wrote them, with thinking, `</think>` and tool calls; servers take them apart.

        Raises:
            ValueError: as `generate`, or the program has no chat template, or it refuses.
        """
        if self._chat_template is None:
            raise ValueError("the program folder has no chat template: use generate")
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self._chat_template.render(conversation, tools, **(chat_template_kwargs or {}))
            for conversation in several
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def _request(self, prompt: Prompt) -> RequestOutput:
        if isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
            expected = "expected a text or a list of token ids"
            raise TypeError(f"prompts: {expected}, got {type(prompt).__name__}")
        if isinstance(prompt, str):
            prompt.encode()  # says where a lone surrogate is
            return RequestOutput(prompt, self.tokenizer.encode(prompt, True), [])
        return RequestOutput(None, list(prompt), [])

    def _submissions(self, requests, sampling_params):
        """An answer and its engine's parameters, of each prompt and index."""
        for request, params in zip(requests, sampling_params, strict=True):
            for index in range(params.n):
                answer = _Answer(request, index, params, self.tokenizer)
                yield answer, replace(params, seed=params.seed + index)

    def _wait(self) -> list[Event]:
        select.select([self.engine.fileno()], [], [])
        return self.engine.take_events()

    def _run(self, submissions) -> Iterator[_Answer]:
        """Answers as they are finished; submits further requests as the engine takes them."""
        running: dict[int, _Answer] = {}
        following = next(submissions, None)
        try:
            while following or running:
                while following:
                    answer, params = following
                    try:
                        request_id = self.engine.submit(answer._request.prompt_token_ids, params)
                    except QueueFullError:
                        break
                    running[request_id] = answer
                    following = next(submissions, None)
                for event in self._wait():
                    answer = running.get(event.request_id)
                    if answer is None:
                        continue
                    answer.add(event)
                    if event.finish_reason is not None:
                        yield running.pop(event.request_id)
                    elif answer.output.finish_reason is not None:
                        self.engine.cancel(event.request_id)
        finally:
            for request_id in running:
                self.engine.cancel(request_id)

"""POST /v1/chat/completions: a conversation to an answer of reasoning, content and tool calls."""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

from et_moe.serving.generation import in_turn
from et_moe.serving.interface import Event
from et_moe.serving.openai.conversation import Answer, Conversation
from et_moe.serving.openai.events import Head, Streamed, event, usage
from et_moe.serving.openai.protocol import ChatRequest
from et_moe.serving.output_parser import Content, Reasoning
from et_moe.serving.served_model import ServedModel
from et_moe.serving.tool_calls import CallEnd, CallStart


class _Choice(Answer):
    """One answer of a request, as it comes."""

    def __init__(
        self, index: int, request: ChatRequest, model: ServedModel, started: Conversation
    ) -> None:
        super().__init__(request, model, started.generations[index], started.thinking)
        self.index = index
        self._passed: list[dict] = []  # log-probabilities of deltas that were passed on
        self.message: dict = {"role": "assistant", "content": ""}

    def deltas(self, event: Event) -> Iterator[tuple[dict, list[dict]]]:
        """The deltas that an event adds, after which `finish_reason` may be known, with their
        tokens' log-probabilities."""
        waiting: list[dict] = []
        for part, logprobs in self.add(event):
            waiting += logprobs
            if delta := self._delta(part):
                yield delta, waiting
                waiting = []
        self._logprobs[:0] = waiting

    def take(self, event: Event) -> None:
        """Adds an event to `whole`."""
        for _, logprobs in self.deltas(event):
            self._passed += logprobs

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

    def whole(self) -> dict:
        """The choice of an answer that is not streamed."""
        if "tool_calls" in self.message and not self.message["content"]:
            self.message["content"] = None
        return {
            "index": self.index,
            "message": self.message,
            "logprobs": _content([*self._passed, *self.take_logprobs()]),
            "finish_reason": self.finish_reason,
        }


def _content(logprobs: list[dict]) -> dict | None:
    return {"content": logprobs} if logprobs else None


class Chat(Streamed):
    """A request that the engine has accepted; to be made by `start` and left by `close`."""

    def __init__(self, request: ChatRequest, model: ServedModel, started: Conversation) -> None:
        self._request, self._prompt_tokens = request, started.prompt_tokens
        self._choices = [_Choice(i, request, model, started) for i in range(request.n)]
        kind = "chat.completion" + (".chunk" if request.stream else "")
        self._head = Head("chatcmpl", kind, model.name)

    @classmethod
    async def start(cls, request: ChatRequest, model: ServedModel) -> "Chat":
        """Raises as `Conversation.start`."""
        return cls(request, model, await Conversation.start(request, model))

    def close(self) -> None:
        for choice in self._choices:
            choice.generation.close()

    async def whole(self) -> dict:
        """The answer when it has ended."""
        with ExitStack() as stack:
            stack.callback(self.close)
            async for index, drawn in in_turn([choice.generation for choice in self._choices]):
                self._choices[index].take(drawn)
        choices = [choice.whole() for choice in self._choices]
        return self._head.with_choices(choices, usage=self._usage())

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer as it comes, without the end of the stream."""
        options = self._request.stream_options
        more = {"usage": None} if options and options.include_usage else {}

        def chunk(choice: _Choice, delta: dict, logprobs: list, reason: str | None = None) -> bytes:
            fields = {"index": choice.index, "delta": delta, "logprobs": _content(logprobs)}
            return event(self._head.with_choices([{**fields, "finish_reason": reason}], **more))

        with ExitStack() as stack:
            stack.callback(self.close)
            opened: set[int] = set()
            async for index, drawn in in_turn([choice.generation for choice in self._choices]):
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue
                if index not in opened:
                    opened.add(index)
                    yield chunk(choice, {"role": "assistant", "content": ""}, [])
                for delta, logprobs in choice.deltas(drawn):
                    yield chunk(choice, delta, logprobs)
                if choice.finish_reason is not None:
                    yield chunk(choice, {}, choice.take_logprobs(), choice.finish_reason)
        if more:
            yield event(self._head.with_choices([], usage=self._usage()))

    def _usage(self) -> dict:
        generations = [choice.generation for choice in self._choices]
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        return usage(self._prompt_tokens, generations, reasoning)

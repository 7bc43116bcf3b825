"""POST /v1/responses: a conversation to output items of reasoning, text and function calls. Nothing
is kept of it."""

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

from et_moe.serving.interface import Event, SamplingParams
from et_moe.serving.openai.conversation import Answer, Conversation
from et_moe.serving.openai.errors import APIError
from et_moe.serving.openai.events import Streamed, event, usage
from et_moe.serving.openai.protocol import AllowedChoice, NamedTool
from et_moe.serving.openai.response_items import Output
from et_moe.serving.openai.responses_protocol import ResponsesRequest, TextConfig
from et_moe.serving.output_parser import Content
from et_moe.serving.served_model import ServedModel


def _flat(tool: NamedTool) -> dict:
    return {"type": tool.type, "name": tool.function.name}


def _head(request: ResponsesRequest, model: ServedModel, params: SamplingParams) -> dict:
    """What a response says of its request, with the values that hold where it gave none."""
    choice = request.tool_choice or "auto"
    if isinstance(choice, NamedTool):
        choice = _flat(choice)
    elif isinstance(choice, AllowedChoice):
        tools = [_flat(tool) for tool in choice.allowed_tools.tools]
        choice = {"type": choice.type, "mode": choice.allowed_tools.mode, "tools": tools}
    text = request.text or TextConfig()
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model.name,
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": request.reasoning.model_dump() if request.reasoning else None,
        "store": False,
        "temperature": params.temperature,
        "text": text.model_dump(by_alias=True, exclude_none=True),
        "tool_choice": choice,
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


class ModelResponse(Streamed):
    """A request that the engine has accepted; to be made by `start`."""

    END = b""  # The last event says that it is the last.

    def __init__(
        self, request: ResponsesRequest, model: ServedModel, started: Conversation
    ) -> None:
        [generation] = started.generations
        self._answer = Answer(request.chat, model, generation, started.thinking, False)
        self._prompt_tokens = started.prompt_tokens
        self._head = _head(request, model, started.params[0])
        self._output = Output()
        self._sequence_number = 0

    @classmethod
    async def start(cls, request: ResponsesRequest, model: ServedModel) -> "ModelResponse":
        """Raises as `Conversation.start`."""
        return cls(request, model, await Conversation.start(request.chat, model))

    async def whole(self) -> dict:
        """The response when it has ended."""
        with closing(self._answer.generation):
            async for drawn in self._answer.generation.events():
                for _ in self._events(drawn):
                    pass
        return self._ended()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The response as it comes."""
        with closing(self._answer.generation):
            begun = False
            async for drawn in self._answer.generation.events():
                if not begun:
                    begun = True
                    for state in ("created", "in_progress"):
                        yield self._lifecycle(state, self._response("in_progress"))
                for fields in self._events(drawn):
                    yield self._numbered(fields)
        response = self._ended()
        yield self._lifecycle(response["status"], response)

    def failed(self, error: APIError) -> bytes:
        for _ in self._output.finish("incomplete"):
            pass
        fault = {"code": "server_error", "message": error.message}
        response = self._response("failed", error=fault, output=self._output.fields())
        return self._lifecycle("failed", response)

    def _events(self, drawn: Event) -> Iterator[dict]:
        answer = self._answer
        if answer.finish_reason is not None:
            return
        for part, logprobs in answer.add(drawn):
            yield from self._output.add(part, logprobs if isinstance(part, Content) else [])
        if answer.finish_reason is not None:
            yield from self._output.finish(self._status())

    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason == "length" else "completed"

    def _ended(self) -> dict:
        status = self._status()
        if status == "incomplete":
            more: dict = {"incomplete_details": {"reason": "max_output_tokens"}}
        else:
            more = {"completed_at": int(time.time())}
        return self._response(status, output=self._output.fields(), usage=self._usage(), **more)

    def _usage(self) -> dict:
        answer = self._answer
        counts = usage(self._prompt_tokens, [answer.generation], answer.reasoning_tokens)
        # The engine does not count what its cache takes in, and nobody pays for it.
        cached = {**counts["prompt_tokens_details"], "cache_write_tokens": 0}
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": cached,
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": counts["total_tokens"],
        }

    def _response(self, status: str, **fields) -> dict:
        empty = {"error": None, "incomplete_details": None, "completed_at": None}
        return {**self._head, "status": status, **empty, "output": [], "usage": None, **fields}

    def _lifecycle(self, state: str, response: dict) -> bytes:
        return self._numbered({"type": f"response.{state}", "response": response})

    def _numbered(self, fields: dict) -> bytes:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return event({**fields, "sequence_number": number}, fields["type"])

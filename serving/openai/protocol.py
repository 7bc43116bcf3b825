"""What requests may say: OpenAI's fields, and those that vLLM adds under the same names.

Fields that are not known are ignored, as clients send many; fields that would change the answer and
cannot be honoured are refused.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_PROMPTS = 256
MAX_TOOLS = 256
MAX_LOGPROBS = 20


def fault(field: str, message: str) -> PydanticCustomError:
    """What a check of a whole request raises, where the fault is that of one field."""
    return PydanticCustomError("fault", "{message}", {"message": message, "field": field})


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _content(value: object) -> object:
    """Text, or parts of text put together; other parts are refused by name."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"parts of type {kind!r} are not supported, expected 'text'")
        if not isinstance(text, str):
            raise ValueError("a part of type 'text' needs a text")
        texts.append(text)
    return "".join(texts)


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, BeforeValidator(_content)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_texts),
    Field(max_length=MAX_STOPS),
]


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; a parser may read them, and 1e999, all the same."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("NaN and infinite numbers are no JSON") from None
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_finite)]


class FunctionCall(Model):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="after")
    def _object(self) -> "ToolCall":
        self.template()
        return self

    def template(self) -> dict[str, Any]:
        """As chat templates want it: the arguments as a mapping."""
        name, arguments = self.function.name, self.function.arguments or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of the tool call {name!r}: expected an object")
        function = {"name": name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def template(self) -> dict[str, Any]:
        """As chat templates want it: arguments of calls as mappings."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.role == "developer":
            message["role"] = "system"
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if (thinking := self.reasoning_content or self.reasoning) is not None:
            message["reasoning_content"] = thinking
        if self.tool_calls:
            message["tool_calls"] = [call.template() for call in self.tool_calls]
        return message


class Function(Model):
    name: str = Field(pattern=r"^[^<>\s]{1,128}$")
    description: str | None = None
    parameters: Schema | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


def _tool(value: dict[str, Any]) -> dict[str, Any]:
    Tool.model_validate(value)
    return value


ToolObject = Annotated[dict[str, Any], AfterValidator(_tool)]
"""A tool that is one, as the template is to see it."""


class NamedFunction(Model):
    name: str


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Model):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedChoice(Model):
    """The choice between some of a request's tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_of(value: object, kinds: Mapping[str, Callable[[object], Any]]) -> object:
    """A `tool_choice`, so that what is said of a bad one is about what it was meant to be.

    Args:
        kinds: type of an object -> what reads it.
    """
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, (NamedTool, AllowedChoice)):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind](value)
    types = " or ".join(map(repr, kinds))
    raise ValueError(f"expected 'none', 'auto', 'required' or an object of type {types}")


def _tool_choice(value: object) -> object:
    kinds = {"function": NamedTool.model_validate, "allowed_tools": AllowedChoice.model_validate}
    return choice_of(value, kinds)


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None


class JsonSchema(Model):
    name: str = ""
    json_schema: Schema = Field(alias="schema", default_factory=dict)


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs a json_schema")
        return self


class StreamOptions(Model):
    include_usage: bool = False


class SamplingRequest(Model):
    """What all requests for text have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Stops | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _refused(self) -> "SamplingRequest":
        if self.best_of not in (None, self.n):
            raise fault("best_of", "best_of is not supported")
        return self


_REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
    "web_search_options": "this server does not search",
}


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions"""

    names: ClassVar[dict[str, str]] = {}
    """Of fields that clients know by another name, since the request came in another form."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[ToolObject] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Annotated[ToolChoice, PlainValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        for key, instead in _REFUSED.items():
            if isinstance(data, dict) and data.get(key) is not None:
                raise fault(key, f"{key} is not supported: {instead}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        """Of `allowed_tools`, what they allow is left, as if the request had no other tools."""
        choice, names = self.tool_choice, self.tool_schemas()
        if choice == "required" and not names:
            raise fault("tool_choice", "tool_choice: 'required' needs tools")
        allowed = choice.allowed_tools.tools if isinstance(choice, AllowedChoice) else ()
        for named in (choice,) if isinstance(choice, NamedTool) else allowed:
            if named.function.name not in names:
                message = f"tool_choice: there is no tool {named.function.name!r}"
                raise fault("tool_choice", message)
        if isinstance(choice, AllowedChoice):
            chosen = {named.function.name for named in allowed}
            self.tools = [t for t in self.tools or () if t["function"]["name"] in chosen]
            self.tool_choice = choice.allowed_tools.mode
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "top_logprobs needs logprobs: true")
        return self

    def place(self, field: str) -> str:
        """The name of a field, for errors."""
        return self.names.get(field, field)

    def tool_schemas(self) -> dict[str, dict[str, Any]]:
        """Name of each function -> JSON schema of its parameters."""
        functions = [tool["function"] for tool in self.tools or ()]
        return {function["name"]: function.get("parameters") or {} for function in functions}


class CompletionRequest(SamplingRequest):
    """POST /v1/completions"""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> "CompletionRequest":
        if self.suffix:
            raise fault("suffix", "suffix is not supported")
        if not 1 <= len(self.prompts()) <= MAX_PROMPTS:
            raise fault("prompt", f"prompt: expected 1 to {MAX_PROMPTS} prompts")
        if self.max_tokens == 0 and not self.echo:
            raise fault("max_tokens", "max_tokens: 0 needs echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(Model):
    """POST /tokenize, in vLLM's form: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "expected either prompt or messages")
        return self


class DetokenizeRequest(Model):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]

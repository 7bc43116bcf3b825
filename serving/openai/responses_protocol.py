"""What requests to /v1/responses may say, and how each becomes a request for chat completions."""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from et_moe.serving.openai.protocol import (
    MAX_LOGPROBS,
    MAX_TOOLS,
    AllowedChoice,
    AllowedTools,
    ChatRequest,
    Count,
    Effort,
    Function,
    FunctionCall,
    JsonSchema,
    Message,
    Model,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    SamplingRequest,
    Schema,
    Text,
    ToolCall,
    ToolChoice,
    choice_of,
    fault,
)

LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""What OpenAI's answers can hold besides. Clients ask for some of it always; all but the first is
of tools and inputs that no request can have, or, as with reasoning, there in plain text."""
NOT_KEPT = "responses are not kept by this server: send the whole conversation as input"


def _refused(why: str, default: str | None = None) -> BeforeValidator:
    """For a field that cannot be honoured: only what asks for nothing passes."""

    def check(value: object) -> None:
        if value not in (None, False, default):
            raise ValueError(f"not supported: {why}")

    return BeforeValidator(check)


class MessageItem(Model):
    role: Literal["user", "assistant", "system", "developer"]
    content: Text

    def message(self) -> Message:
        return Message(role=self.role, content=self.content)


class FunctionCallItem(Model):
    call_id: str
    name: str
    arguments: str

    @model_validator(mode="after")
    def _object(self) -> "FunctionCallItem":
        self._call()  # says what is wrong with the arguments
        return self

    def _call(self) -> ToolCall:
        function = FunctionCall(name=self.name, arguments=self.arguments)
        return ToolCall(id=self.call_id, function=function)

    def message(self) -> Message:
        return Message(role="assistant", tool_calls=[self._call()])


class FunctionCallOutputItem(Model):
    call_id: str
    output: Text

    def message(self) -> Message:
        return Message(role="tool", tool_call_id=self.call_id, content=self.output)


class ReasoningPart(Model):
    text: str


class ReasoningItem(Model):
    """Other servers' items may have a summary alone; encrypted content is for them only."""

    content: list[ReasoningPart] | None = None
    summary: list[ReasoningPart] | None = None

    def message(self) -> Message:
        text = "".join(part.text for part in self.content or self.summary or ())
        return Message(role="assistant", reasoning_content=text)


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem

_ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}


def _item(value: object) -> Item:
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    kind = value.get("type", "message")
    if kind == "item_reference":
        raise ValueError(f"items of type {kind!r} are not supported: {NOT_KEPT}")
    known = _ITEMS.get(kind) if isinstance(kind, str) else None
    if known is None:
        expected = ", ".join(map(repr, _ITEMS))
        raise ValueError(f"items of type {kind!r} are not supported, expected {expected}")
    return known.model_validate(value)


def _items(value: object) -> object:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of items")
    return value


def _joined(items: list[Item]) -> list[Message]:
    """The messages of items. What an assistant thinks, says and calls in a row is one, as it was
    when the model wrote it; after something said only calls belong to the same message."""
    groups: list[list[Message]] = []
    said = False
    for message in (item.message() for item in items):
        last = groups[-1][0].role if groups else None
        if last == message.role == "assistant" and (message.tool_calls or not said):
            groups[-1].append(message)
        else:
            groups.append([message])
            said = False
        said = said or message.content is not None
    return [group[0] if len(group) == 1 else _one(group) for group in groups]


def _one(messages: list[Message]) -> Message:
    """The message of an assistant, of which each of `messages` has a part."""
    calls = [call for message in messages for call in message.tool_calls or ()]
    thoughts = "".join(message.reasoning_content or "" for message in messages)
    return Message(
        role="assistant",
        reasoning_content=thoughts or None,
        content=next((m.content for m in messages if m.content is not None), None),
        tool_calls=calls or None,
    )


class FunctionTool(Function):
    type: Literal["function"]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind != "function":
            raise ValueError(f"tools of type {kind!r} are not supported, expected 'function'")
        return data

    def nested(self) -> dict[str, Any]:
        """In the form of chat completions."""
        function = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


_LEFT_OUT = ("custom", "namespace", "web_search")
"""Types of tools that agents offer besides functions, whatever the server. The model is not shown
them; whoever offers one of another type means it."""


def _shown(tools: object) -> object:
    if not isinstance(tools, list):
        return tools
    return [t for t in tools if not (isinstance(t, dict) and t.get("type") in _LEFT_OUT)]


class FunctionName(NamedFunction):
    type: Literal["function"]


class AllowedNames(Model):
    """`allowed_tools` in the flat form."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionName], BeforeValidator(_shown)] = Field(min_length=1)

    def nested(self) -> AllowedChoice:
        """In the form of chat completions."""
        tools = [NamedTool(type="function", function=tool) for tool in self.tools]
        choice = AllowedTools(mode=self.mode, tools=tools)
        return AllowedChoice(type="allowed_tools", allowed_tools=choice)


def _named(value: object) -> NamedTool:
    return NamedTool(type="function", function=NamedFunction.model_validate(value))


def _tool_choice(value: object) -> object:
    allowed = lambda value: AllowedNames.model_validate(value).nested()  # noqa: E731
    return choice_of(value, {"function": _named, "allowed_tools": allowed})


class TextFormat(Model):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: Schema | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _whole(self) -> "TextFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.name is None):
            raise ValueError("type 'json_schema' needs a name and a schema")
        return self

    def nested(self) -> ResponseFormat:
        """In the form of chat completions."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        schema = JsonSchema(name=self.name, schema=self.json_schema)
        return ResponseFormat(type=self.type, json_schema=schema)


class TextConfig(Model):
    format: TextFormat = Field(default_factory=TextFormat)
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Model):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class FromResponses(ChatRequest):
    """A request to /v1/responses in the form of chat completions."""

    names: ClassVar[dict[str, str]] = {"messages": "input", "response_format": "text.format"}


Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class ResponsesRequest(SamplingRequest):
    """POST /v1/responses"""

    input: Annotated[
        list[Annotated[Item, PlainValidator(_item)]], BeforeValidator(_items), Field(min_length=1)
    ]
    instructions: str | None = None
    n: Literal[1] = 1
    max_output_tokens: Count | None = None
    tools: Annotated[list[FunctionTool] | None, BeforeValidator(_shown)] = Field(
        None, max_length=MAX_TOOLS
    )
    tool_choice: Annotated[ToolChoice, PlainValidator(_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[Include] | None = None
    metadata: dict[Key, Value] | None = Field(None, max_length=16)
    user: str | None = None
    store: bool | None = None
    truncation: Annotated[None, _refused("the input is not cut, use 'disabled'", "disabled")] = None
    previous_response_id: Annotated[None, _refused(NOT_KEPT)] = None
    conversation: Annotated[None, _refused(NOT_KEPT)] = None
    background: Annotated[None, _refused("nothing runs on when a client has left")] = None
    prompt: Annotated[None, _refused("this server keeps no prompts")] = None
    context_management: Annotated[None, _refused("nothing is left out of the input")] = None

    @model_validator(mode="after")
    def _consistent(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", f"top_logprobs needs include: [{LOGPROBS!r}]")
        _ = self.chat
        return self

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def messages(self) -> list[Message]:
        """The conversation, beginning with the instructions."""
        messages = _joined(self.input)
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        return messages

    @cached_property
    def chat(self) -> FromResponses:
        """The same request in the form of chat completions. Raises ValidationError."""
        sampling = {name: getattr(self, name) for name in SamplingRequest.model_fields}
        return FromResponses(
            **sampling,
            messages=self.messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            tools=[tool.nested() for tool in self.tools] if self.tools else None,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.format.nested() if self.text else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
        )

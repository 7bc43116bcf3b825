"""Chat templates: a conversation as the text that a model was trained on.

Templates are Jinja2, as checkpoints in Hugging Face's layout carry them, and render to the text of
transformers' `apply_chat_template`. They run in Jinja2's immutable sandbox, since they are code of
whoever made the checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """A template that cannot be compiled, or that does not take a conversation."""


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks what an assistant says for
    training; the text inside stays as it is."""

    tags = {"generation"}  # noqa: RUF012, jinja2's attribute

    def parse(self, parser):
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ChatTemplateError(f"chat template, line {e.lineno}: {e.message}") from None


class ChatTemplate:
    """The templates of one checkpoint.

    Args:
        sources: name -> template; "default", and perhaps "tool_use" for conversations with tools.
        special_tokens: what templates see as `bos_token`, `eos_token` and the like.

    Attributes:
        source: the default template.

    Raises:
        ChatTemplateError: a template cannot be compiled, or there is no default.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        if "default" not in sources:
            names = ", ".join(sources) or "none"
            raise ChatTemplateError(f"chat templates: expected one named default, found {names}")
        self.source = sources["default"]
        self._templates = {name: _compile(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt.

        Args:
            messages: each with "role" and "content"; the arguments of tool calls as mappings.
            tools: functions in OpenAI's format.
            add_generation_prompt: ends with what opens the assistant's answer.
            kwargs: the template's own variables, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template refuses the conversation, or fails on it.
        """
        use_tools = tools and "tool_use" in self._templates
        variables = {
            **self._special_tokens,
            "documents": None,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._templates["tool_use" if use_tools else "default"].render(variables)
        except RecursionError:
            raise ChatTemplateError("chat template: the conversation is nested too deep") from None
        except Exception as e:  # A template is code of others and may raise anything.
            raise ChatTemplateError(f"chat template: {e}") from None


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template of a program or checkpoint; None if it has none.

    `chat_template.jinja` goes before `chat_template` in `tokenizer_config.json`, which is one
    template or a list of named ones.

    Raises:
        ChatTemplateError: files that cannot be read as such; names file and key.
    """
    file = directory / "tokenizer_config.json"
    config = _read_object(file)
    sources = _sources(config.get("chat_template"), file)
    jinja_file = directory / "chat_template.jinja"
    try:
        if jinja_file.is_file():
            sources["default"] = jinja_file.read_text(encoding="utf-8")
        return ChatTemplate(sources, _special_tokens(config)) if sources else None
    except (UnicodeDecodeError, ChatTemplateError) as e:
        where = jinja_file if jinja_file.is_file() else file
        raise ChatTemplateError(f"{where}: {e}") from None


def read_special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, as `tokenizer_config.json` has them.

    Raises:
        ChatTemplateError: the file cannot be read as such.
    """
    return _special_tokens(_read_object(directory / "tokenizer_config.json"))


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ChatTemplateError(f"{file}: {e}") from None
    if not isinstance(config, dict):
        raise ChatTemplateError(f"{file}: expected an object")
    return config


def _sources(value: object, file: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        sources = {entry["name"]: entry["template"] for entry in value}
        if all(isinstance(text, str) for pair in sources.items() for text in pair):
            return sources
    except (TypeError, KeyError):
        pass
    expected = "a template, or a list of objects with name and template"
    raise ChatTemplateError(f"{file}: chat_template: expected {expected}")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; each is a string, or an object with the string as `content`."""
    tokens = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens

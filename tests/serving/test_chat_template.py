"""Chat templates: they give the text of transformers, and bad files and messages are refused."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from et_moe.serving.chat_template import ChatTemplate, ChatTemplateError, read_chat_template

DEMO = Path(__file__).resolve().parents[2] / "examples/qwen3_5_moe/demo_checkpoint"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a <city> & its "surroundings", today\'s',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Köln", "days": 2, "at": {"x": [1, None]}}}
QUESTION = {"role": "user", "content": "How warm is it?"}
CONVERSATIONS = {
    "one message": [QUESTION],
    "system": [{"role": "system", "content": " Be brief.\n"}, QUESTION],
    "empty system": [{"role": "system", "content": ""}, QUESTION],
    "parts": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b ")]}],
    "two turns": [QUESTION, {"role": "assistant", "content": "<b>7</b>"}, QUESTION],
    "thinking of an earlier turn": [
        QUESTION,
        {"role": "assistant", "content": "7", "reasoning_content": "It is cold."},
        QUESTION,
    ],
    "thinking inside the content": [
        QUESTION,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 7 </think> there."},
    ],
    "tool calls after thinking": [
        QUESTION,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "I need the weather.\n",
            "tool_calls": [{"type": "function", "function": CALL}, {"function": CALL}],
        },
        {"role": "tool", "content": '{"temperature": 7}'},
        {"role": "tool", "content": [{"type": "text", "text": "windy"}]},
    ],
    "tool call without content": [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7 degrees", "reasoning_content": ""},
        QUESTION,
    ],
    "call without arguments": [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]},
    ],
}
FEATURES = """\
{%- set ns = namespace(seen=0) %}
{{ bos_token }}{% generation %}  marked {{ custom }}
  {% endgeneration %}
{% for message in messages if message.role != 'tool' %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.seen = ns.seen + 1 %}
{{ loop.index }}: {{ message | tojson }} {{ message | tojson(indent=2) }}
    {%- if ns.seen == 2 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now('%Y') }} {{ tools | tojson if tools }} {{ add_generation_prompt }} {{ documents }}
{{ eos_token is defined }} {{ none_token is defined }} {{ "x" | upper }}
"""


def reference(source: str, messages, **kwargs) -> str:
    """The text that transformers makes of a conversation."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = source
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("source", [(DEMO / "chat_template.jinja").read_text(), FEATURES])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [WEATHER, WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "custom": 5},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "enable_thinking": True},
    ],
    ids=str,
)
def test_the_text_of_transformers(source: str, messages, tools, options) -> None:
    expected = reference(source, messages, tools=tools, **options)
    assert template(source).render(messages, tools, **options) == expected
    assert expected.strip()


def test_the_demo_checkpoint() -> None:
    """Its prompt stands here in full, so that the format is Qwen3.5's and not just what
    transformers makes."""
    demo = read_chat_template(DEMO)
    messages = CONVERSATIONS["tool calls after thinking"]
    call = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n"
        '<parameter=at>\n{"x": [1, null]}\n</parameter>\n</function>\n</tool_call>'
    )
    assert demo.render(messages) == (
        "<|im_start|>user\nHow warm is it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI need the weather.\n</think>\n\nI look.\n\n"
        f"{call}\n{call}<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"temperature": 7}\n</tool_response>\n'
        "<tool_response>\nwindy\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert demo.render([QUESTION], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    with_tools = demo.render(CONVERSATIONS["system"], [WEATHER])
    assert json.dumps(WEATHER, ensure_ascii=False) in with_tools
    assert with_tools.index("</tools>") < with_tools.index("Be brief.<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "at least one message"),
        ([{"role": "owner", "content": "x"}], "unknown role owner"),
        ([QUESTION, {"role": "system", "content": "x"}], "must be the first"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part that is not text"),
        ([{"role": "user", "content": {"text": "x"}}], "neither text nor a list"),
    ],
)
def test_a_conversation_that_the_demo_refuses(messages, fault: str) -> None:
    with pytest.raises(ChatTemplateError, match=fault):
        read_chat_template(DEMO).render(messages)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{{ raise_exception('no such luck') }}", "no such luck"),
        ("{{ messages[0].content + 1 }}", "chat template: "),
        ("{{ messages.append(1) }}", "chat template: "),  # immutable
        ("{{ messages.__class__.__mro__ }}", "chat template: "),  # sandboxed
        ("{% for i in range(10**9) %}{% endfor %}", "chat template: "),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails(source: str, fault: str) -> None:
    with pytest.raises(ChatTemplateError, match=fault):
        template(source).render([QUESTION])


def test_nesting_that_no_template_can_print() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ChatTemplateError, match="nested too deep"):
        template("{{ messages | tojson }}").render([{"role": "user", "content": nested}])


def test_where_the_template_of_a_folder_comes_from(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None

    def write(config: dict) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    write({"chat_template": "one {{ eos_token }}", "eos_token": {"content": "<e>"}})
    assert read_chat_template(tmp_path).render([QUESTION]) == "one <e>"
    named = {"default": "plain", "tool_use": "with {{ tools|length }}"}
    write({"chat_template": [{"name": n, "template": t} for n, t in named.items()]})
    found = read_chat_template(tmp_path)
    assert found.render([QUESTION]) == found.render([QUESTION], []) == "plain"
    assert found.render([QUESTION], [WEATHER]) == "with 1"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_template(tmp_path).render([QUESTION]) == "file"


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: "),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: "),
        ("tokenizer_config.json", b"[]", "expected an object"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template: expected a template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "with name and"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x", "template": ""}]}', "found x"),
        ("chat_template.jinja", b"\n{% if %}", "chat_template.jinja: chat template, line 2: "),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: .*utf-8"),
    ],
)
def test_files_that_hold_no_template(tmp_path: Path, file: str, content: bytes, fault: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ChatTemplateError, match=fault):
        read_chat_template(tmp_path)

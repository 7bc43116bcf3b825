"""The texts and conversations that the demo model is trained on."""

import ast
import json
import random
import re

import pytest
from tokenizers import Tokenizer

from et_moe.scripts.demo_data import documents as docs
from et_moe.scripts.demo_data.conversations import MOST_TOOLS, Conversation, Maker
from et_moe.scripts.demo_data.corpus import DEMO
from et_moe.scripts.demo_data.families import FAMILIES
from et_moe.scripts.demo_data.library import Fact, english, first_sentence, library
from et_moe.scripts.demo_data.samples import LONGEST, Encoder, Packed, generate, make_samples
from et_moe.scripts.demo_data.words import WORDS, Slots, is_held_out
from et_moe.serving.chat_template import read_chat_template
from et_moe.serving.output_parser import Content, OutputParser, Reasoning
from et_moe.serving.tool_calls import CallArguments, CallStart

FACTS = [
    Fact("function", "os", "os.getcwd", "getcwd()", "Return the working directory."),
    Fact("module", "json", "json", "", "Reads and writes JSON, and much else that begins with j."),
]


def conversations(count: int, held_out: bool = False, seed: int = 0) -> list[Conversation]:
    maker = Maker(FACTS, random.Random(seed), held_out)
    return [maker.conversation() for _ in range(count)]


def test_docstrings_come_cleaned_and_in_source_order() -> None:
    source = 'class A:\n  """First.\n\n    Indented  \n  """\n  def f():\n    """Second ‘one’"""\n'
    found = list(docs.docstrings(ast.parse('"""Module."""\n' + source)))
    assert found == ["Module.", "First.\n\nIndented", "Second 'one'"]


def test_held_out_documents_are_not_trained_on() -> None:
    documents = {f"m{i}.py": f"{i} " * 1000 for i in range(100)} | {"topic if": "x" * 1000}
    training, held_out = docs.split_held_out(documents, seed=1)
    assert sorted(training + held_out) == sorted(documents.values())
    assert not set(training) & set(held_out)
    assert sum(map(len, held_out)) >= docs.HELD_OUT_BYTES
    assert documents["topic if"] in training
    assert (training, held_out) == docs.split_held_out(documents, seed=1)
    assert held_out != docs.split_held_out(documents, seed=2)[1]


def test_the_library_says_each_thing_of_one_name() -> None:
    facts = library()
    by_name = {fact.name: fact for fact in facts}
    assert len(by_name) == len({fact.summary for fact in facts}) == len(facts) > 800
    assert by_name["os.path.exists"].call == "exists(path)"
    assert by_name["str.split"].kind == "method" and by_name["len"].module == "builtins"
    assert by_name["str.join"].call == "join(iterable, /)"
    assert by_name["json"].kind == "module"
    for doc in (None, 3, "", "x", "A -> B, whatever it is", "größer als alles andere"):
        assert first_sentence(doc) == ""
    assert first_sentence("Do this\n    and that.  More.\n\nRest.") == "Do this and that."
    assert first_sentence("f(x[, y]) -> int\n\nDo this and that.") == "Do this and that."
    assert first_sentence("f(x) --> an integer of x f(x, y) --> two\n") == "An integer of x."


def test_templates_of_tools_name_what_there_is() -> None:
    for family in FAMILIES:
        required = {p.key for p in family.parameters if not p.optional}
        for request in family.requests:
            keys = set(re.findall(r"{(\w+)}", request))
            assert required <= keys <= {p.key for p in family.parameters}, request
        told = set(re.findall(r"{(\w+)}", family.answer))
        assert told <= required | set(family.result), family.answer


def test_the_same_seed_makes_the_same_conversations() -> None:
    assert conversations(20) == conversations(20) != conversations(20, seed=1)


def test_held_out_words_are_in_held_out_conversations_alone() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        slots = Slots(rng, english(FACTS), held_out)
        for _ in range(200):
            drawn = [slots.invented(), slots.of(WORDS["names"]), slots.word()]
            assert {is_held_out(word) for word in drawn} == {held_out}


def test_calls_copy_what_was_asked() -> None:
    """Each call is of a tool that is there; its arguments have the types of the schema and stand
    in the request before it."""
    calls = 0
    for conversation in conversations(400):
        assert len(conversation.tools) <= MOST_TOOLS
        offered = {t["function"]["name"]: t["function"] for t in conversation.tools}
        for asked, message in zip(conversation.messages, conversation.messages[1:], strict=False):
            for call in message.get("tool_calls", ()):
                calls += 1
                function = call["function"]
                properties = offered[function["name"]]["parameters"]["properties"]
                for name, value in function["arguments"].items():
                    text = str(value).lower() if isinstance(value, bool) else str(value)
                    assert text.lower() in asked["content"].lower(), (asked, call)
                    kind = {bool: "boolean", int: "integer", float: "number", str: "string"}
                    assert properties[name]["type"] == kind[type(value)]
    assert calls > 150


def test_every_kind_of_conversation_is_drawn() -> None:
    drawn = conversations(1500)
    kinds = {conversation.kind for conversation in drawn}
    assert kinds >= {"library", "tool call", "tool answer", "two calls", "recall", "repeat"}
    assert {c.thinking for c in drawn} == {True, False}
    thoughts = [c.messages[-1]["reasoning_content"] for c in drawn if c.thinking]
    assert 0.2 < sum(map(bool, thoughts)) / len(thoughts) < 0.8
    assert not any(c.messages[-1]["reasoning_content"] for c in drawn if not c.thinking)


def read_message(parts) -> tuple[str, str, list[dict]]:
    """Content, reasoning and calls of an answer's parts."""
    content, reasoning, calls = "", "", []
    for part in parts:
        if isinstance(part, Content):
            content += part.text
        elif isinstance(part, Reasoning):
            reasoning += part.text
        elif isinstance(part, CallStart):
            calls.append({"name": part.name, "arguments": ""})
        elif isinstance(part, CallArguments):
            calls[part.index]["arguments"] += part.json
    return content, reasoning, [c | {"arguments": json.loads(c["arguments"])} for c in calls]


def test_a_sample_is_a_prompt_and_the_answer_that_a_server_reads() -> None:
    """What follows a prompt is read as the message that it was made of."""
    template = read_chat_template(DEMO)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    encoder = Encoder(template, tokenizer)
    for conversation in conversations(150):
        sample = encoder.encode(conversation)
        assert len(sample.ids) == len(sample.learned)
        *before, last = conversation.messages
        tools = conversation.tools or None
        prompt = template.render(before, tools, enable_thinking=conversation.thinking)
        count = len(tokenizer.encode(prompt).ids)
        assert tokenizer.decode(sample.ids[:count], skip_special_tokens=False) == prompt
        assert all(sample.learned[count:]) and sample.answer >= count
        said = tokenizer.decode(sample.ids[count:], skip_special_tokens=False)
        assert said.endswith("<|im_end|>")
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in conversation.tools}
        parser = OutputParser(conversation.thinking, schemas)
        parts = [*parser.feed(said.removesuffix("<|im_end|>")), *parser.finish()]
        assert read_message(parts) == (
            last["content"],
            last["reasoning_content"],
            [call["function"] for call in last.get("tool_calls", ())],
        )


def test_earlier_answers_are_learned_and_nothing_else_is() -> None:
    template = read_chat_template(DEMO)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    messages = [
        {"role": "system", "content": "Be 世 brief."},
        {"role": "user", "content": "Say 好."},
        {"role": "assistant", "content": "好", "reasoning_content": ""},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "好", "reasoning_content": "Again."},
    ]
    sample = Encoder(template, tokenizer).encode(Conversation("repeat", messages, [], True))
    learned = [id for id, marked in zip(sample.ids, sample.learned, strict=True) if marked]
    assert tokenizer.decode(learned, skip_special_tokens=False) == (
        "好<|im_end|>Again.\n</think>\n\n好<|im_end|>"
    )
    answer = tokenizer.decode(sample.ids[sample.answer :], skip_special_tokens=False)
    assert answer == "好<|im_end|>"


def test_samples_are_made_by_processes_in_the_same_order() -> None:
    packed = [generate(DEMO, FACTS, 0, 6, processes, seconds=60) for processes in (1, 2)]
    assert packed[0].ids.tolist() == packed[1].ids.tolist()
    assert packed[0].lengths.sum() == len(packed[0].ids) == len(packed[0].learned)
    assert packed[0].lengths.max() <= LONGEST
    alone = Packed.of(make_samples(DEMO, FACTS, "0 0", 6))
    assert alone.kinds == packed[0].kinds and alone.ids.tolist() == packed[0].ids.tolist()


def test_a_checkpoint_without_a_template_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected chat_template\.jinja"):
        make_samples(tmp_path, FACTS, "0", 1)

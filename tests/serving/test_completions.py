"""POST /v1/completions, /tokenize and /detokenize over a fake engine."""

import pytest
from test_chat import events

from et_moe.serving.chat_template import ChatTemplate


@pytest.fixture
def complete(ask):
    def send(prompt, **fields):
        response = ask("/v1/completions", {"model": "demo", "prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return events(response.text) if fields.get("stream") else response.json()

    return send


def test_prompts_as_texts_and_ids(complete, engine, tokenizer) -> None:
    """Special tokens in a text become their ids; each of several prompts has a choice, in order."""
    engine.answers = lambda prompt, _: [*prompt, 2045]
    text = "a <|im_end|>"
    ids = tokenizer.encode(text, True)
    assert 2045 in ids
    for prompt, expected in ((text, ["a "]), (ids, ["a "]), ([text, "b"], ["a ", "b"])):
        answer = complete(prompt)
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    answer = complete([ids, ids], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2 * len(ids)


def test_defaults(complete, engine) -> None:
    engine.text = "x " * 100
    answer = complete("a")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_the_same(complete, engine, echo: bool) -> None:
    engine.text = "</think>Wörld 🌍 STOP it"
    fields = {"max_tokens": 50, "stop": ["STOP"], "logprobs": 1, "echo": echo}
    [whole] = complete("Hello é", **fields)["choices"]
    chunks = complete("Hello é", stream=True, **fields)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert whole["text"] == ("Hello é" if echo else "") + "</think>Wörld 🌍 "
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for choice in choices for value in choice["logprobs"][key]]
        assert streamed == whole["logprobs"][key]


def test_scoring_a_text(complete, engine, tokenizer) -> None:
    """As lm_eval asks, the prompt is echoed with its logprobs, with one more token or none."""
    text = "Hello, 🌍 world"
    ids = tokenizer.encode(text, True)
    for limit in (1, 0):
        answer = complete(text, max_tokens=limit, echo=True, logprobs=2)
        [choice] = answer["choices"]
        logprobs = choice["logprobs"]
        more = [] if not limit else [tokenizer.encode(engine.text, True)[0]]
        assert len(logprobs["tokens"]) == len(ids) + len(more)
        assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1 + len(more))
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
        assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
        assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])
        assert choice["text"].startswith(text) and (choice["text"] == text) == (not limit)
        assert answer["usage"]["completion_tokens"] == limit
        assert choice["finish_reason"] == "length"


def test_tokenize(ask, tokenizer) -> None:
    text = "Hello <|im_end|>"
    ids = tokenizer.encode(text, True)
    answer = ask("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == ids and answer["count"] == len(ids)
    assert answer["max_model_len"] == 2048 and "".join(answer["token_strs"]) == text
    assert ask("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    assert ask("/tokenize", chat).json()["tokens"] == tokenizer.encode(prompt, True)
    assert ask("/detokenize", {"tokens": [5, -1]}).status_code == 400
    assert ask("/detokenize", {"tokens": [2048]}).status_code == 400


def test_what_renders_conversations(ask) -> None:
    """A harness renders as the server does."""
    info = ask("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and info["bos_token"] is None
    messages = [{"role": "user", "content": "Hello"}]
    tokens = {name: value for name, value in info.items() if name.endswith("_token") and value}
    text = ChatTemplate({"default": info["chat_template"]}, tokens).render(messages)
    ids = ask("/tokenize", {"messages": messages}).json()["tokens"]
    assert ask("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"] == ids

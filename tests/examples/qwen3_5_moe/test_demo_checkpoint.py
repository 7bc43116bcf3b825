"""The committed demo checkpoint, and the script that trains it."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

from et_moe.scripts import train_demo

DEMO = Path(train_demo.__file__).parent.parent / "examples" / "qwen3_5_moe" / "demo_checkpoint"
PERPLEXITY_BOUND = 46.0  # measured 45.171


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Runs torch with one thread, as the script does; at these sizes that is also the fastest on a
    busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Qwen3_5MoeForCausalLM:
    model, info = Qwen3_5MoeForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, output_loading_info=True
    )
    for problem, keys in info.items():
        assert not keys, f"{problem}: {keys}"
    return model.eval()


def test_size() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 8 << 20
    assert 20_000 <= (DEMO / "heldout.txt").stat().st_size <= 40_000


def test_every_feature_of_the_architecture_is_there() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe_text" and config["dtype"] == "bfloat16"
    assert set(config["layer_types"]) == {"linear_attention", "full_attention"}
    assert config["layer_types"][-1] == "full_attention"
    assert config["mtp_num_hidden_layers"] == 1
    assert config["num_experts"] >= 8 and config["num_experts_per_tok"] == 2
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["linear_num_value_heads"] > config["linear_num_key_heads"] > 1
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25
    for width in ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        assert config[width] % 128 == 0
    generation = json.loads((DEMO / "generation_config.json").read_text())
    tokens = {t["content"]: t["id"] for t in _fields()["added_tokens"]}
    assert config["eos_token_id"] == tokens["<|endoftext|>"]
    assert generation["eos_token_id"] == [tokens["<|im_end|>"], tokens["<|endoftext|>"]]
    assert config["vocab_size"] == len(_fields()["model"]["vocab"]) + len(tokens)


def _fields() -> dict:
    return json.loads((DEMO / "tokenizer.json").read_text())


def test_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    text = (DEMO / "heldout.txt").read_text() + "naïve <think>\r\n\t中文</think> 1234's\n\n  x"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert AutoTokenizer.from_pretrained(DEMO)(text).input_ids == ids
    assert len(text) / len(ids) > 2.5  # as it was trained on such text; one byte a token would be 1


def test_perplexity_of_the_held_out_text(
    model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer
) -> None:
    tokens = torch.tensor(tokenizer.encode((DEMO / "heldout.txt").read_text()).ids)
    perplexity, shares = train_demo.evaluate(model, tokens)
    assert perplexity < PERPLEXITY_BOUND
    assert shares.min() > 0, f"an expert is never chosen: {shares}"


def test_greedy_text_is_words(model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer) -> None:
    """Most words of a greedy continuation occur in the held-out text."""
    prompt = torch.tensor([tokenizer.encode("Return the").ids])
    output = model.generate(prompt, max_new_tokens=64, do_sample=False)
    words = tokenizer.decode(output[0].tolist()).split()
    known = set((DEMO / "heldout.txt").read_text().split())
    assert len(words) > 15
    assert sum(word in known for word in words) / len(words) > 0.5


def test_docstrings_come_cleaned_and_in_source_order() -> None:
    source = 'class A:\n  """First.\n\n    Indented  \n  """\n  def f():\n    """Second ‘one’"""\n'
    found = list(train_demo.docstrings(ast.parse('"""Module."""\n' + source)))
    assert found == ["Module.", "First.\n\nIndented", "Second 'one'"]


def test_held_out_documents_are_not_trained_on() -> None:
    documents = {f"m{i}.py": f"{i} " * 1000 for i in range(100)} | {"topic if": "x" * 1000}
    training, held_out = train_demo.split_held_out(documents, seed=1)
    assert sorted(training + held_out) == sorted(documents.values())
    assert not set(training) & set(held_out)
    assert sum(map(len, held_out)) >= train_demo.HELD_OUT_BYTES
    assert documents["topic if"] in training
    assert (training, held_out) == train_demo.split_held_out(documents, seed=1)
    assert held_out != train_demo.split_held_out(documents, seed=2)[1]


def test_training_repeats_and_learns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "BATCH", 2)
    torch.use_deterministic_algorithms(True)
    try:
        tokens = torch.tensor(tokenizer.encode((DEMO / "heldout.txt").read_text()).ids)[:1100]
        states, perplexities = [], []
        for _ in range(2):
            torch.manual_seed(0)
            model = Qwen3_5MoeForCausalLM(train_demo.model_config(tokenizer))
            train_demo.train(model, tokens, steps=4, seed=0)
            states.append(model.state_dict())
            perplexities.append(train_demo.evaluate(model, tokens)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert perplexities[0] == perplexities[1] < 0.8 * tokenizer.get_vocab_size()

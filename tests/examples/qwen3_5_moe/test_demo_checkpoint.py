"""The committed demo checkpoint: its form, and what it has learned."""

import json
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

from et_moe.scripts.demo_data.corpus import DEMO
from et_moe.scripts.demo_data.library import library
from et_moe.scripts.demo_data.samples import Packed, make_samples
from et_moe.scripts.demo_training.measure import exact_answers, perplexity

MOST_BYTES = 8_000_000
PERPLEXITY_BOUND = 41.0  # measured 39.831
EXACT_BOUND = 0.6  # measured 0.70
TOOL_CALL_BOUND = 0.3  # measured 0.42


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
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= MOST_BYTES
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
    value, shares = perplexity(model, tokens)
    assert value < PERPLEXITY_BOUND
    assert shares.min() > 0, f"an expert is never chosen: {shares}"


def test_greedy_text_is_words(model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer) -> None:
    """Most words of a greedy continuation occur in the held-out text."""
    prompt = torch.tensor([tokenizer.encode("Return the").ids])
    output = model.generate(prompt, max_new_tokens=64, do_sample=False)
    words = tokenizer.decode(output[0].tolist()).split()
    known = set((DEMO / "heldout.txt").read_text().split())
    assert len(words) > 15
    assert sum(word in known for word in words) / len(words) > 0.5


def test_answers_of_held_out_conversations(model: Qwen3_5MoeForCausalLM) -> None:
    """Names, places and values that training never saw are copied to the letter."""
    packed = Packed.of(make_samples(DEMO, library(), "test", 48, held_out=True))
    found = exact_answers(model, packed, 4096, torch.device("cpu"))
    exact = sum(share * count for share, count in found.values())
    assert exact / len(packed.kinds) > EXACT_BOUND, found
    share, count = found["tool call"]
    assert count > 5 and share > TOOL_CALL_BOUND, found

"""config.json against Hugging Face's configuration classes, and everything that is refused."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutate_json
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from et_moe.examples.qwen3_5_moe.config import ModelConfig
from et_moe.examples.qwen3_5_moe.tensors import inverse_frequencies
from et_moe.pipeline.config import ConfigError, ConfigWarning
from et_moe.pipeline.models import load_config, parse_config

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1000,
    "rms_norm_eps": 1e-5,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 100,
    "num_experts_per_tok": 3,
    "num_experts": 11,
    "tie_word_embeddings": True,
    "eos_token_id": [7, 9],
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "partial_rotary_factor": 0.5,
    },
}
RENAMED = ("yarn", "layer_types", "rope_theta", "partial_rotary_factor", "eos_token_ids")
NOT_THEIRS = ("mtp_num_hidden_layers",)  # Hugging Face has no MTP head for this model


def assert_same(config: ModelConfig, expected: Qwen3_5MoeTextConfig) -> None:
    """Every field, under Hugging Face's name or found in its rope_parameters."""
    for field in vars(config):
        if field not in RENAMED + NOT_THEIRS:
            assert getattr(config, field) == getattr(expected, field), field
    assert list(config.layer_types) == expected.layer_types
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.partial_rotary_factor == expected.rope_parameters["partial_rotary_factor"]
    eos = expected.eos_token_id
    assert list(config.eos_token_ids) == ([] if eos is None else eos)


@pytest.mark.parametrize("values", [{}, TEXT])
def test_plain_config(tmp_path: Path, values: dict) -> None:
    expected = Qwen3_5MoeTextConfig(**values)
    expected.save_pretrained(tmp_path)
    assert_same(load_config(tmp_path), expected)


def test_multimodal_config(tmp_path: Path) -> None:
    Qwen3_5MoeConfig(text_config=TEXT, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert_same(load_config(tmp_path), Qwen3_5MoeTextConfig(**TEXT))


def test_tie_word_embeddings_of_the_multimodal_config_wins() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": TEXT, "tie_word_embeddings": False}
    assert parse_config(config).tie_word_embeddings is False
    del config["tie_word_embeddings"]
    assert parse_config(config).tie_word_embeddings is True


def test_every_key_may_be_left_out(tmp_path: Path) -> None:
    """A key that is not there means what Hugging Face takes it to mean."""
    Qwen3_5MoeTextConfig(**TEXT).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    del saved["layer_types"]  # it follows from the number of layers, which may be left out too
    omitted = [key for key in saved if key != "model_type"]
    assert set(TEXT) - {"layer_types"} <= set(omitted)
    for key in omitted:
        file.write_text(json.dumps({k: v for k, v in saved.items() if k != key}))
        assert_same(load_config(tmp_path), Qwen3_5MoeTextConfig.from_pretrained(tmp_path))
    for inner in ("rope_theta", "partial_rotary_factor", "rope_type"):
        rope = {k: v for k, v in TEXT["rope_parameters"].items() if k != inner}
        file.write_text(json.dumps(saved | {"rope_parameters": rope}))
        assert_same(load_config(tmp_path), Qwen3_5MoeTextConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("interval", [1, 2, 4, 5])
def test_layer_types_from_the_interval(tmp_path: Path, interval: int) -> None:
    config = TEXT | {"num_hidden_layers": 9, "full_attention_interval": interval}
    del config["layer_types"]
    expected = Qwen3_5MoeTextConfig(**config)
    assert_same(parse_config(config | {"model_type": "qwen3_5_moe_text"}), expected)


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    """generation_config.json wins; it may have one id or a list, and each id is kept once."""
    config = TEXT | {"model_type": "qwen3_5_moe_text"}
    assert parse_config(config).eos_token_ids == (7, 9)
    assert parse_config(config | {"eos_token_id": 0}).eos_token_ids == (0,)
    assert parse_config(config | {"eos_token_id": None}).eos_token_ids == ()
    assert parse_config(config, {"eos_token_id": [3, 2, 3]}).eos_token_ids == (3, 2)
    assert parse_config(config, {"eos_token_id": None}).eos_token_ids == (7, 9)
    outer = {"model_type": "qwen3_5_moe", "text_config": TEXT, "eos_token_id": 5}
    assert parse_config(outer).eos_token_ids == (7, 9)
    inner = {k: v for k, v in TEXT.items() if k != "eos_token_id"}
    assert parse_config(outer | {"text_config": inner}).eos_token_ids == (5,)


def test_layers_of_the_mtp_head() -> None:
    config = TEXT | {"model_type": "qwen3_5_moe_text"}
    assert parse_config(config).mtp_num_hidden_layers == 0
    for layers in (0, 1):
        told = parse_config(config | {"mtp_num_hidden_layers": layers})
        assert told.mtp_num_hidden_layers == layers
        assert [told.layer_type(i) for i in range(4)] == [*TEXT["layer_types"], "full_attention"]
    outer = {"model_type": "qwen3_5_moe", "text_config": TEXT | {"mtp_num_hidden_layers": 1}}
    assert parse_config(outer).mtp_num_hidden_layers == 1


def test_derived_widths() -> None:
    config = parse_config(TEXT | {"model_type": "qwen3_5_moe_text"})
    assert config.rotary_dim == 16
    assert config.linear_key_width == 32 and config.linear_value_width == 768
    assert config.conv_channels == 832
    assert config.shared_experts == 3  # 100 columns in experts of 40


def put(key: str, value: Any) -> Callable[[dict], None]:
    return lambda config: config.update({key: value})


def put_rope(key: str, value: Any) -> Callable[[dict], None]:
    return lambda config: config["rope_parameters"].update({key: value})


POSITIVE = "expected a positive integer"
NUMBER = "expected a positive number"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
REFUSED = [
    (put("model_type", "llama"), ["model_type is 'llama'", "qwen3_5_moe_text"]),
    (put("model_type", None), ["model_type is None", "qwen3_5_moe_text"]),
    (put("model_type", ["qwen3_5_moe"]), ["model_type is ['qwen3_5_moe']"]),
    (put("text_config", 3), ["text_config", "must be an object"]),
    (put("hidden_act", "gelu"), ["hidden_act = 'gelu' is not supported", "'silu'"]),
    (put("attention_bias", True), ["attention_bias = True is not supported", "False"]),
    (put("attention_dropout", 0.1), ["attention_dropout = 0.1 is not supported", "0.0"]),
    (put("mtp_use_dedicated_embeddings", True), ["mtp_use_dedicated_embeddings = True is not sup"]),
    (put("mtp_num_hidden_layers", 2), ["mtp_num_hidden_layers is 2, only 0 (no head) and 1 are"]),
    (put("mtp_num_hidden_layers", -1), ["mtp_num_hidden_layers is -1, only 0"]),
    (put("mtp_num_hidden_layers", True), ["mtp_num_hidden_layers is True, only 0"]),
    (put("mtp_num_hidden_layers", "1"), ["mtp_num_hidden_layers is '1', only 0"]),
    (put("mtp_num_hidden_layers", [1]), ["mtp_num_hidden_layers is [1], only 0"]),
    (put("rope_parameters", "x"), ["rope_parameters", "must be an object"]),
    (put("rope_parameters", 0), ["rope_parameters", "must be an object"]),
    (put_rope("rope_type", "longrope"), ["rope_parameters.rope_type 'longrope' is not supported"]),
    (put_rope("rope_type", "yarn"), ["rope_parameters.factor is missing, which YaRN needs"]),
    (put("rope_parameters", YARN | {"factor": 0}), ["factor is 0", NUMBER]),
    (put("rope_parameters", YARN | {"rope_theta": 1}), ["rope_theta is 1.0, expected more than 1"]),
    (put("rope_parameters", {"full_attention": {}}), ["rope_parameters by layer type (full_atten"]),
    (put("rope_parameters", {"type": "linear"}), ["rope_parameters.rope_type 'linear' is not"]),
    (put("rope_scaling", 3), ["rope_scaling must be an object"]),
    (put_rope("rope_theta", 0), ["rope_theta is 0", NUMBER]),
    (put_rope("rope_theta", None), ["rope_theta is None", NUMBER]),
    (put_rope("rope_theta", float("inf")), ["rope_theta is inf", NUMBER]),
    (put_rope("rope_theta", 1e40), ["rope_theta is 1e+40", NUMBER]),
    (put_rope("rope_theta", 10**40), ["rope_theta is 1000", NUMBER]),
    (put_rope("partial_rotary_factor", float("nan")), ["partial_rotary_factor is nan", NUMBER]),
    (put_rope("partial_rotary_factor", 1.5), ["partial_rotary_factor", "at most head_dim"]),
    (put_rope("partial_rotary_factor", 0.01), ["partial_rotary_factor", "even number"]),
    (put_rope("partial_rotary_factor", 0.1), ["partial_rotary_factor", "even number"]),
    (put("rms_norm_eps", True), ["rms_norm_eps is True", NUMBER]),
    (put("rms_norm_eps", "1e-6"), ["rms_norm_eps is '1e-6'", NUMBER]),
    (put("tie_word_embeddings", 1), ["tie_word_embeddings is 1", "expected true or false"]),
    (put("layer_types", ["full_attention"]), ["layer_types", "num_hidden_layers = 3"]),
    (put("layer_types", "full_attention"), ["layer_types", "num_hidden_layers = 3"]),
    (put("layer_types", ["full_attention", "x", 1]), ["layer_types[1] is 'x'", "linear_attention"]),
    (put("layer_types", ["full_attention", [], 1]), ["layer_types[1] is []", "linear_attention"]),
    (put("eos_token_id", 320), ["eos_token_id 320", "below 320"]),
    (put("eos_token_id", [1, -1]), ["eos_token_id -1", "below 320"]),
    (put("eos_token_id", "2"), ["eos_token_id '2'", "below 320"]),
    (put("eos_token_id", True), ["eos_token_id True", "below 320"]),
    (put("num_key_value_heads", 4), ["num_attention_heads", "multiple of num_key_value_heads"]),
    (put("linear_num_key_heads", 5), ["multiple of linear_num_key_heads"]),
    (put("num_experts_per_tok", 12), ["num_experts_per_tok must not exceed num_experts"]),
    (put("linear_conv_kernel_dim", 1), ["linear_conv_kernel_dim must be 2 to 16"]),
    (put("linear_conv_kernel_dim", 17), ["linear_conv_kernel_dim must be 2 to 16"]),
    (put("num_hidden_layers", 1025), ["num_hidden_layers is 1025", "up to 1024"]),
    (put("num_experts", 1 << 30), ["num_experts is 1073741824", "up to 1024"]),
]
REFUSED += [
    (put(key, value), [f"{key} is {value!r}", POSITIVE])
    for key, original in TEXT.items()
    if type(original) is int
    for value in (0, -1, 2.0, "8", None, False, 1 << 31, [4])
]


@pytest.mark.parametrize("form", ["plain", "multimodal"])
def test_refused(tmp_path: Path, form: str) -> None:
    """The message names the file, the key, what is there and what was expected."""
    for change, expected in REFUSED:
        config = json.loads(json.dumps(TEXT)) | {"model_type": "qwen3_5_moe_text"}
        if form == "multimodal":
            change(config)
            outer = {"model_type": "qwen3_5_moe", "text_config": config}
            for key in ("model_type", "text_config"):
                if config.pop(key, "qwen3_5_moe_text") != "qwen3_5_moe_text":
                    change(outer)
            config = outer
        else:
            change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path)
        for part in [f"{tmp_path / 'config.json'}: ", *expected]:
            assert part in str(caught.value), f"{expected}: {caught.value}"


def test_the_file_at_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="x: no such directory"):
        load_config(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    config, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text("{,")
    with pytest.raises(ConfigError, match=r"/config\.json: not readable as JSON: .*line 1"):
        load_config(tmp_path)
    config.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"/config\.json: not readable as JSON"):
        load_config(tmp_path)
    config.write_text("[]")
    with pytest.raises(ConfigError, match=r"/config\.json: expected a JSON object, found list"):
        load_config(tmp_path)
    config.write_text(json.dumps(TEXT | {"model_type": "qwen3_5_moe_text"}))
    generation.write_bytes(b"\xff{}")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not readable as JSON"):
        load_config(tmp_path)
    generation.write_text('{"eos_token_id": [1, 999]}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id 999 is not"):
        load_config(tmp_path)
    generation.unlink()
    generation.mkdir()
    with pytest.raises(ConfigError, match=r"generation_config\.json: not readable as JSON"):
        load_config(tmp_path)


def test_mutated_documents() -> None:
    """A changed value is understood, or refused by name; no other exception is raised."""
    rng = random.Random(1)
    outcomes = {"accepted": 0, "refused": 0}
    multimodal = {"model_type": "qwen3_5_moe", "text_config": TEXT, "tie_word_embeddings": True}
    for i in range(5000):
        original = multimodal if i % 2 else TEXT | {"model_type": "qwen3_5_moe_text"}
        config = original
        for _ in range(rng.randint(1, 3)):
            config = mutate_json(rng, config)
        try:
            parse_config(config, where="FILE")
            outcomes["accepted"] += 1
        except ConfigError as error:
            assert str(error).startswith("FILE: ")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 500, outcomes


def test_other_ways_to_say_plain_rope() -> None:
    """`rope_scaling` is the older name; empty or of type "default" it changes nothing."""
    config = {k: v for k, v in TEXT.items() if k != "rope_parameters"}
    config |= {"model_type": "qwen3_5_moe_text"}
    rope = {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
    expected = parse_config(config | {"rope_parameters": rope})
    assert expected.rope_theta == 1e7 and expected.yarn is None
    assert parse_config(config | {"rope_parameters": rope, "rope_scaling": {}}) == expected
    assert parse_config(config | {"rope_scaling": rope | {"type": "default"}}) == expected
    assert parse_config(config | rope) == expected


def test_rope_beside_the_text_config_is_refused() -> None:
    config = {"model_type": "qwen3_5_moe", "text_config": TEXT, "rope_parameters": YARN}
    with pytest.raises(ConfigError, match="rope_parameters outside of text_config"):
        parse_config(config)


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta_fast": 16, "truncate": False}, {"attention_factor": 1.3}, {"factor": 1.0}],
)
def test_yarn_is_hugging_faces(changes: dict) -> None:
    rope = YARN | {"partial_rotary_factor": 0.5} | changes
    values = TEXT | {"rope_parameters": rope, "max_position_embeddings": 16384}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](Qwen3_5MoeTextConfig(**deepcopy(values)))
    config = parse_config(values | {"model_type": "qwen3_5_moe_text"})
    assert torch.equal(inverse_frequencies(config), frequencies)
    assert config.yarn.attention_factor == factor


def test_where_a_text_ends_without_a_generation_config(tmp_path: Path) -> None:
    def load(config: dict, warning: str) -> tuple[int, ...]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.warns(ConfigWarning, match=warning):
            return load_config(tmp_path).eos_token_ids

    config = TEXT | {"model_type": "qwen3_5_moe_text", "eos_token_id": None}
    assert load(config, "no end-of-sequence id is known") == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": []}')
    assert load(config, "no end-of-sequence id is known") == ()
    added = [{"id": 5, "content": "<|im_end|>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    for token in ("<|im_end|>", {"content": "<|im_end|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert load(config, "token 5, the tokenizer's eos_token") == (5,)
        assert load(config | {"eos_token_id": 7}, "token 5, ") == (7, 5)

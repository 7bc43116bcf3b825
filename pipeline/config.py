"""The model's configuration, read from a Hugging Face `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
LAYER_TYPES = ("linear_attention", "full_attention")

# What Hugging Face's Qwen3_5MoeTextConfig assumes of a key that config.json leaves out (it omits
# values that equal its defaults when it saves).
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_scaling": None,
}
# A damaged count must not make the list of expected tensors fill the memory.
_LIMITS = {"num_hidden_layers": 1024, "num_experts": 1024}


class ConfigError(ValueError):
    """A configuration that is malformed or that this implementation does not support."""


@dataclass(frozen=True)
class ModelConfig:
    """The text model's shape; field names are those of Hugging Face's `Qwen3_5MoeTextConfig`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts_per_tok: int
    num_experts: int
    layer_types: tuple[str, ...]
    rope_theta: float
    partial_rotary_factor: float
    eos_token_ids: tuple[int, ...]

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_value_width(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_key_width(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: q, k and v."""
        return 2 * self.linear_key_width + self.linear_value_width

    @property
    def shared_experts(self) -> int:
        """How many slots of the expert tables the shared expert occupies (the last one padded)."""
        return -(-self.shared_expert_intermediate_size // self.moe_intermediate_size)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a ConfigError names the file and what is wrong with it."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as e:
        raise ConfigError(f"{path}: not readable as JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _typed(raw: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
    """raw[key] with the type of `default`; numbers must be positive."""
    value = raw.get(key, default)
    kind, number = type(default), isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        valid, expected = isinstance(value, bool), "true or false"
    elif kind is int:
        limit = _LIMITS.get(key, 2**31 - 1)
        valid = number and isinstance(value, int) and 0 < value <= limit
        expected = f"a positive integer up to {limit}"
    else:
        valid, expected = number and 0 < value < 1e30, "a positive number below 1e30"
    if not valid:
        raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")
    return kind(value)


def _layer_types(raw: Mapping[str, Any], layers: int, where: str) -> tuple[str, ...]:
    types = raw.get("layer_types")
    if types is None:
        interval = _typed(raw, "full_attention_interval", 4, where)
        return tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"{where}: layer_types must list num_hidden_layers = {layers} types")
    for i, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise ConfigError(
                f"{where}: layer_types[{i}] is {kind!r}, expected one of {LAYER_TYPES}"
            )
    return tuple(types)


def _token_ids(value: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ConfigError(f"{where}: eos_token_id {i!r} is not a token id below {vocab_size}")
    return tuple(dict.fromkeys(ids))


def parse_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config"
) -> ModelConfig:
    """Builds the configuration from the content of `config.json` and `generation_config.json`.

    Args:
        config: a text configuration, or a multimodal one that holds it under `text_config`.
        generation: its `eos_token_id` wins over the configuration's.
        where: the configuration's file, for messages.

    Raises:
        ConfigError: names the key, its value and what was expected.
    """
    if config.get("model_type") not in MODEL_TYPES:
        found = config.get("model_type")
        raise ConfigError(f"{where}: model_type is {found!r}, expected one of {MODEL_TYPES}")
    raw = config.get("text_config", config)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: text_config must be an object")
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise ConfigError(f"{where}: {key} = {raw[key]!r} is not supported, only {only!r} is")
    values = {key: _typed(raw, key, default, where) for key, default in _DEFAULTS.items()}
    if "tie_word_embeddings" in config:
        values["tie_word_embeddings"] = _typed(config, "tie_word_embeddings", False, where)
    rope = raw.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_parameters.rope_type {kind!r} is not supported")
    fallback = {**{"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, **raw}
    for key in ("rope_theta", "partial_rotary_factor"):
        values[key] = _typed({key: rope.get(key, fallback[key])}, key, 1.0, where)
    eos, eos_file = (generation or {}).get("eos_token_id"), "generation_config.json"
    if eos is None:
        eos, eos_file = raw.get("eos_token_id", config.get("eos_token_id")), Path(where).name
    model = ModelConfig(
        **values,
        layer_types=_layer_types(raw, values["num_hidden_layers"], where),
        eos_token_ids=_token_ids(eos, values["vocab_size"], str(Path(where).with_name(eos_file))),
    )
    _check(model, where)
    return model


def _check(c: ModelConfig, where: str) -> None:
    rules = (
        (
            c.num_attention_heads % c.num_key_value_heads == 0,
            "num_attention_heads must be a multiple of num_key_value_heads",
        ),
        (
            c.linear_num_value_heads % c.linear_num_key_heads == 0,
            "linear_num_value_heads must be a multiple of linear_num_key_heads",
        ),
        (
            c.num_experts_per_tok <= c.num_experts,
            "num_experts_per_tok must not exceed num_experts",
        ),
        (c.linear_conv_kernel_dim >= 2, "linear_conv_kernel_dim must be at least 2"),
        (
            c.partial_rotary_factor <= 1 and c.rotary_dim >= 2 and c.rotary_dim % 2 == 0,
            "head_dim * partial_rotary_factor must be an even number of at most head_dim columns",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"{where}: {message}")


def load_config(directory: Path) -> ModelConfig:
    """Reads `config.json`, and `generation_config.json` where there is one, of a checkpoint."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    generation = directory / "generation_config.json"
    return parse_config(
        read_json(directory / "config.json"),
        read_json(generation) if generation.exists() else None,
        str(directory / "config.json"),
    )

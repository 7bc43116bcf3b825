"""The model's configuration, read from a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from et_moe.pipeline.config import (
    ConfigError,
    Yarn,
    read_eos_token_ids,
    read_layer_types,
    read_rope,
    read_value,
)

LAYER_TYPES = ("linear_attention", "full_attention")

# What Hugging Face's Qwen3_5MoeTextConfig assumes of a key that config.json leaves out (it omits
# values that equal its defaults when it saves).
DEFAULTS: dict[str, Any] = {
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
    "mtp_use_dedicated_embeddings": False,
}
MAX_CONV_KERNEL_DIM = 16
"""Taps of the causal convolution that the kernels of every backend take."""


@dataclass(frozen=True)
class ModelConfig:
    """The text model's shape; field names are those of Hugging Face's `Qwen3_5MoeTextConfig`.

    Attributes:
        mtp_num_hidden_layers: decoder layers of the head for multi-token prediction (see `mtp.py`),
            0 without one. Hugging Face's class does not know it, config.json has it all the same.
        default_mtp_layers: how many a configuration has that does not say so.
    """

    model_type: ClassVar[str] = "qwen3_5_moe"
    default_mtp_layers: ClassVar[int] = 0

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
    yarn: Yarn | None
    eos_token_ids: tuple[int, ...]
    mtp_num_hidden_layers: int

    def layer_type(self, layer: int) -> str:
        """The kind of a decoder layer; that of the MTP head counts as the one behind the last."""
        return self.layer_types[layer] if layer < self.num_hidden_layers else LAYER_TYPES[1]

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_value_width(self) -> int:
        """Columns of the values of all heads of linear attention."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_key_width(self) -> int:
        """Columns of the keys of all heads of linear attention."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: q, k and v."""
        return 2 * self.linear_key_width + self.linear_value_width

    @property
    def shared_experts(self) -> int:
        """How many slots of the expert tables the shared expert occupies (the last one padded)."""
        return -(-self.shared_expert_intermediate_size // self.moe_intermediate_size)


AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)


def parse_config(
    kind: type[AnyConfig],
    defaults: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    where: str,
    **further: Any,
) -> AnyConfig:
    """Builds a configuration from the content of `config.json` and `generation_config.json`.

    Args:
        kind: `ModelConfig`, or a model's that extends it.
        defaults: key -> value of a key that is left out, whose type the value must have.
        config: a text configuration, or a multimodal one that holds it under `text_config`.
        generation: its `eos_token_id` wins over the configuration's.
        where: the configuration's file, for messages.
        further: values of fields of `kind` that are not in `defaults`.

    Raises:
        ConfigError: names the key, its value and what was expected.
    """
    raw = text_config(config, where)
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise ConfigError(f"{where}: {key} = {raw[key]!r} is not supported, only {only!r} is")
    values = {key: read_value(raw, key, default, where) for key, default in defaults.items()}
    if "tie_word_embeddings" in config:
        values["tie_word_embeddings"] = read_value(config, "tie_word_embeddings", False, where)
    vocab_size = values["vocab_size"]
    model = kind(
        **values,
        **read_rope(raw, config, where),
        **further,
        layer_types=read_layer_types(raw, values["num_hidden_layers"], LAYER_TYPES, where),
        eos_token_ids=read_eos_token_ids(raw, config, generation, vocab_size, where),
        mtp_num_hidden_layers=_read_mtp_num_hidden_layers(raw, kind.default_mtp_layers, where),
    )
    _check(model, where)
    return model


def _read_mtp_num_hidden_layers(raw: Mapping[str, Any], default: int, where: str) -> int:
    value = raw.get("mtp_num_hidden_layers", default)
    if type(value) is not int or value not in (0, 1):
        expected = "only 0 (no head) and 1 are supported"
        raise ConfigError(f"{where}: mtp_num_hidden_layers is {value!r}, {expected}")
    return value


def text_config(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The text model's part of a configuration."""
    raw = config.get("text_config", config)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: text_config must be an object")
    return raw


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
        (
            2 <= c.linear_conv_kernel_dim <= MAX_CONV_KERNEL_DIM,
            f"linear_conv_kernel_dim must be 2 to {MAX_CONV_KERNEL_DIM}",
        ),
        (
            c.partial_rotary_factor <= 1 and c.rotary_dim >= 2 and c.rotary_dim % 2 == 0,
            "head_dim * partial_rotary_factor must be an even number of at most head_dim columns",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise ConfigError(f"{where}: {message}")

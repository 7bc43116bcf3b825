"""Reading `config.json`: what every model's configuration is read with.

A model's own keys are read in its folder under `examples`; `models.load_config` finds the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

# A damaged count must not make the list of expected tensors fill the memory.
LIMITS = {"num_hidden_layers": 1024, "num_experts": 1024}


class ConfigError(ValueError):
    """A configuration, checkpoint or flag that is malformed or not supported; one line that names
    the file, key, tensor or flag and what was expected."""


class Config(Protocol):
    """What the pipeline reads from a model's configuration; the rest is the model's own.

    Attributes:
        model_type: of the model, a key of `models.MODELS`.
        vocab_size: rows of the embedding and the head.
        num_hidden_layers: decoder layers.
        max_position_embeddings: the longest context that the model was made for, in tokens.
        eos_token_ids: ids that end a generation.
    """

    model_type: ClassVar[str]
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


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


def read_value(raw: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
    """`raw[key]` with the type of `default`; a number must be positive.

    Raises:
        ConfigError: names `where`, the key, the value and what was expected.
    """
    value = raw.get(key, default)
    kind, number = type(default), isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        valid, expected = isinstance(value, bool), "true or false"
    elif kind is int:
        limit = LIMITS.get(key, 2**31 - 1)
        valid = number and isinstance(value, int) and 0 < value <= limit
        expected = f"a positive integer up to {limit}"
    else:
        valid, expected = number and 0 < value < 1e30, "a positive number below 1e30"
    if not valid:
        raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")
    return kind(value)


def read_layer_types(
    raw: Mapping[str, Any], layers: int, allowed: tuple[str, str], where: str
) -> tuple[str, ...]:
    """The kind of each layer: `layer_types`, or every `full_attention_interval`-th (4) is full.

    Args:
        layers: num_hidden_layers.
        allowed: the kind of most layers and the kind of every fourth.
    """
    types = raw.get("layer_types")
    if types is None:
        interval = read_value(raw, "full_attention_interval", 4, where)
        return tuple(allowed[(i + 1) % interval == 0] for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"{where}: layer_types must list num_hidden_layers = {layers} types")
    for i, kind in enumerate(types):
        if kind not in allowed:
            raise ConfigError(f"{where}: layer_types[{i}] is {kind!r}, expected one of {allowed}")
    return tuple(types)


def read_eos_token_ids(
    raw: Mapping[str, Any],
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    vocab_size: int,
    where: str,
) -> tuple[int, ...]:
    """`eos_token_id` of `generation_config.json`, else of the text configuration `raw`, else of
    the whole `config`; one id or a list."""
    value, file = (generation or {}).get("eos_token_id"), "generation_config.json"
    if value is None:
        value, file = raw.get("eos_token_id", config.get("eos_token_id")), Path(where).name
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            place = Path(where).with_name(file)
            raise ConfigError(f"{place}: eos_token_id {i!r} is not a token id below {vocab_size}")
    return tuple(dict.fromkeys(ids))


def read_rope(raw: Mapping[str, Any], where: str) -> dict[str, float]:
    """`rope_theta` and `partial_rotary_factor`, from `rope_parameters` or the top level."""
    rope = raw.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope_parameters.rope_type {kind!r} is not supported")
    fallback = {**{"rope_theta": 10000.0, "partial_rotary_factor": 0.25}, **raw}
    return {
        key: read_value({key: rope.get(key, fallback[key])}, key, 1.0, where)
        for key in ("rope_theta", "partial_rotary_factor")
    }

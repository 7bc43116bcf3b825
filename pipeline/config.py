"""Reading `config.json`: what every model's configuration is read with.

A model's own keys are read in its folder under `examples`; `models.load_config` finds the model.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

# A damaged count must not make the list of expected tensors fill the memory.
LIMITS = {"num_hidden_layers": 1024, "num_experts": 1024}


class ConfigError(ValueError):
    """A configuration, checkpoint or flag that is malformed or not supported; one line that names
    the file, key, tensor or flag and what was expected."""


class ConfigWarning(UserWarning):
    """Something about a checkpoint that its user should know, and that is no error."""


def warn(message: str) -> None:
    """Warns of something in a checkpoint; the command line shows it as one line."""
    warnings.warn(message, ConfigWarning, stacklevel=2)


class Config(Protocol):
    """What the pipeline reads from a model's configuration; the rest is the model's own.

    Attributes:
        model_type: of the model, a key of `models.MODELS`.
        vocab_size: rows of the embedding and the head.
        num_hidden_layers: decoder layers.
        max_position_embeddings: the longest context that the model was made for, in tokens.
        mtp_num_hidden_layers: 1 with a head for multi-token prediction, 0 without.
        eos_token_ids: ids that end a generation.
    """

    model_type: ClassVar[str]
    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    mtp_num_hidden_layers: int
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


def read_text(path: Path) -> str:
    """The content of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8: {e}") from None


def end_of_turn(directory: Path) -> int | None:
    """The id of the `eos_token` of `tokenizer_config.json`, where the tokenizer knows it."""
    files = [directory / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(file.is_file() for file in files):
        return None
    token, tokens = (read_json(file) for file in files)
    token = token.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    added = tokens.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and entry.get("content") == content:
            return entry["id"] if type(entry.get("id")) is int and entry["id"] >= 0 else None
    return None


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


@dataclass(frozen=True)
class Yarn:
    """Rotary embeddings stretched beyond the context of training (Peng et al., "YaRN: Efficient
    Context Window Extension of Large Language Models", 2023), as Hugging Face configures them.

    Attributes:
        factor: by which the context is stretched.
        original_max_position_embeddings: tokens of the context before.
        beta_fast, beta_slow: turns within that context from which frequencies are kept, and up to
            which they are divided by `factor`; in between both are mixed.
        attention_factor: by which rotated queries and keys are multiplied.
        truncate: whether the borders between the kinds fall on whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


def read_rope(raw: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields `rope_theta`, `partial_rotary_factor` and `yarn` (None for plain RoPE), from
    `rope_parameters` or, as it was named before, `rope_scaling`, else from the top level.

    Args:
        raw: the text configuration.
        config: the whole one, which must not say anything of its own about them.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must be an object")
        if raw is not config and config.get(key):
            raise ConfigError(f"{where}: {key} outside of text_config is not supported")
        nested = sorted(k for k, v in (value or {}).items() if isinstance(v, dict))
        if nested:
            raise ConfigError(f"{where}: {key} by layer type ({nested[0]}) is not supported")
        rope |= value or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        found = f"rope_parameters.rope_type {kind!r} is not supported"
        raise ConfigError(f"{where}: {found}, expected 'default' or 'yarn'")
    values = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, **raw, **rope}
    fields = {k: read_value(values, k, 1.0, where) for k in ("rope_theta", "partial_rotary_factor")}
    theta = fields["rope_theta"]
    return fields | {"yarn": _read_yarn(rope, theta, raw, where) if kind == "yarn" else None}


def _read_yarn(rope: Mapping[str, Any], theta: float, raw: Mapping[str, Any], where: str) -> Yarn:
    given = {key: value for key, value in rope.items() if value is not None}
    if "factor" not in given:
        raise ConfigError(f"{where}: rope_parameters.factor is missing, which YaRN needs")
    if theta <= 1:
        raise ConfigError(f"{where}: rope_theta is {theta!r}, expected more than 1 for YaRN")
    factor = read_value(given, "factor", 1.0, where)
    original = read_value(raw, "max_position_embeddings", 32768, where)

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = scale(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        mscales = (read_value(given, key, 1.0, where) for key in ("mscale", "mscale_all_dim"))
        attention = scale(next(mscales)) / scale(next(mscales))
    return Yarn(
        factor,
        read_value(given, "original_max_position_embeddings", original, where),
        read_value(given, "beta_fast", 32.0, where),
        read_value(given, "beta_slow", 1.0, where),
        read_value(given, "attention_factor", attention, where),
        read_value(given, "truncate", True, where),
    )

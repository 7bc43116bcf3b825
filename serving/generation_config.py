"""The sampling that a model's makers recommend: `generation_config.json` of its program."""

import json
from math import inf
from pathlib import Path

_RANGES = {
    "temperature": (lambda v: v == 0 or 1e-5 <= v < inf, "0 or at least 1e-5"),
    "top_k": (lambda v: -1 <= v < 2**31 and v == int(v), "a count; 0 or -1 for all"),
    "top_p": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "0 to 1"),
    "repetition_penalty": (lambda v: 1e-3 <= v <= 1e3, "0.001 to 1000"),
}
"""What the engine takes of each parameter, so that no request is refused for a file's value."""


def read_sampling_defaults(program_dir: str | Path) -> dict[str, float]:
    """Those parameters of `SamplingParams` that the file names; none if there is no file. As in
    Hugging Face's format, `do_sample: false` means the likeliest token.

    Raises:
        ValueError: the file or a value cannot be read as such; names file and key.
    """
    path = Path(program_dir) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object")
    found = {name: config[name] for name in _RANGES if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} {value!r}: expected a number")
        fits, expected = _RANGES[name]
        if not fits(value):
            raise ValueError(f"{path}: {name} {value!r}: expected {expected}")
    if "top_k" in found:
        found["top_k"] = max(int(found["top_k"]), 0)
    return found | {"temperature": 0.0} if config.get("do_sample") is False else found

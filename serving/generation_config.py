"""The sampling that a model's makers recommend: `generation_config.json` of its program."""

import json
from pathlib import Path

_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


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
    found = {name: config[name] for name in _NAMES if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} {value!r}: expected a number")
    return found | {"temperature": 0.0} if config.get("do_sample") is False else found

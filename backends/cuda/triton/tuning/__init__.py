"""Tuned kernel configurations: data in `<kernel>.json`, looked up by target GPU and row count.

A file maps a GPU (its full name, "sm_90", or "default") to a list of entries, smallest `max_m`
first; the first entry whose `max_m` holds M is taken, and `max_m: null` holds every M:

    {"default": [{"max_m": 16, "config": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}},
                 {"max_m": null, "config": {...}}]}
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch

_TARGET: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "tuning_target", default=None
)


@contextlib.contextmanager
def tuning_target(*names: str) -> Iterator[None]:
    """Looks configurations up for this GPU, most specific name first ("NVIDIA H200", "sm_90")."""
    token = _TARGET.set(names)
    try:
        yield
    finally:
        _TARGET.reset(token)


@functools.cache
def _device_names() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (torch.cuda.get_device_name(), f"sm_{major}{minor}")


@functools.cache
def configurations(kernel: str) -> dict[str, list[dict]]:
    """The whole table of one kernel, as in its JSON file."""
    return json.loads(Path(__file__).with_name(f"{kernel}.json").read_text())


def tuned(kernel: str, m: int) -> dict[str, int]:
    """The configuration of `kernel` for M rows on the target GPU.

    Args:
        kernel: name of the JSON file.
        m: rows; a symbolic int (a dynamic prefill length) takes the last entry.

    Returns:
        Keyword arguments of the launch: block sizes, `num_warps`, `num_stages`.
    """
    table = configurations(kernel)
    names = _TARGET.get()
    names = _device_names() if names is None else names
    entries = next(table[n] for n in (*names, "default") if n in table)
    if isinstance(m, int):
        for entry in entries:
            if entry["max_m"] is None or m <= entry["max_m"]:
                return dict(entry["config"])
    return dict(entries[-1]["config"])

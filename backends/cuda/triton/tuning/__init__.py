"""Tuned configurations of kernels: data in `<table>.json`, looked up by target GPU and a size.

A table says once, as its key, which size that is (tokens, capacity of the KV cache, ...). It maps a
GPU (its full name, "sm_90", or "default") to entries. Of these the first one counts whose bound,
`max_` and the key, is not exceeded; the last bound is null and holds every size:

    {"key": "tokens",
     "entries": {"default": [{"max_tokens": 16, "config": {"BLOCK_N": 64, "num_warps": 4}},
                             {"max_tokens": null, "config": {"BLOCK_N": 128, "num_warps": 8}}]}}
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

FOLDER = Path(__file__).parent

_TARGET: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "tuning_target", default=None
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A configuration, and the largest size that it is for (None: any).

    Attributes:
        config: keyword arguments of the launch: block sizes, `num_warps`, `num_stages`.
    """

    bound: int | None
    config: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Table:
    """The content of a JSON file.

    Attributes:
        key: name of the size by which it is looked up.
        entries: GPU -> entries, smallest bound first.
    """

    key: str
    entries: dict[str, list[Entry]]


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


def parse_table(content: dict) -> Table:
    """The table that a JSON document describes.

    Raises:
        ValueError: it has other keys than a table, no entries for "default", or bounds that do not
            ascend to null.
    """
    if set(content) != {"key", "entries"}:
        raise ValueError(f"has the keys {sorted(content)}, expected entries and key")
    bound = f"max_{content['key']}"
    table = Table(content["key"], {})
    for gpu, rows in content["entries"].items():
        if unlike := [sorted(row) for row in rows if set(row) != {bound, "config"}]:
            raise ValueError(f"{gpu}: an entry has the keys {unlike[0]}, expected config, {bound}")
        bounds = [row[bound] for row in rows]
        ascend = all(a is not None and (b is None or a < b) for a, b in itertools.pairwise(bounds))
        if not bounds or bounds[-1] is not None or not ascend:
            raise ValueError(f"{gpu}: {bound} is {bounds}, expected ascending numbers, then null")
        table.entries[gpu] = [Entry(row[bound], row["config"]) for row in rows]
    if "default" not in table.entries:
        raise ValueError('has no entries for "default"')
    return table


@functools.cache
def read_table(name: str) -> Table:
    """The table in `<name>.json`.

    Raises:
        ValueError: see `parse_table`; the message names the file.
    """
    path = FOLDER / f"{name}.json"
    try:
        return parse_table(json.loads(path.read_text()))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def find_gpu(table: Table) -> str:
    """The most specific name of the target GPU that the table has entries for."""
    names = _TARGET.get()
    names = _device_names() if names is None else names
    return next(name for name in (*names, "default") if name in table.entries)


def find_largest(size: int | torch.SymInt) -> float:
    """The largest value that a size can have: its own, or a symbolic size's bound, or infinity."""
    if isinstance(size, int):
        return size
    limit = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(limit) if limit.is_Integer else math.inf


def find_entry(name: str, size: float) -> tuple[str, int]:
    """Where a table has the configuration for a size on the target GPU: name of the GPU, and index.

    A size without a bound, which is infinity, takes the last entry.
    """
    table = read_table(name)
    gpu = find_gpu(table)
    bounds = (entry.bound for entry in table.entries[gpu])
    return gpu, next(i for i, bound in enumerate(bounds) if bound is None or size <= bound)


def find_config(name: str, **size: int | torch.SymInt) -> dict[str, int]:
    """The configuration of a table for a size on the target GPU, as in `Entry`; the caller's own.

    Args:
        size: one size, under the name of the table's key: `find_config("linear_w4a8", tokens=m)`.
            Of a symbolic one the largest value counts.

    Raises:
        ValueError: the table has another key.
    """
    table = read_table(name)
    if list(size) != [table.key]:
        raise ValueError(f"{name} is looked up by {list(size)}, expected {table.key}")
    gpu, index = find_entry(name, find_largest(size[table.key]))
    return dict(table.entries[gpu][index].config)

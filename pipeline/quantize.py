"""Weights on their way from a checkpoint: quantized group by group as they are read."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from et_moe.backends.threads import worker_threads
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import Config, ConfigError, warn
from et_moe.pipeline.importance import Importance
from et_moe.pipeline.layers import StoredWeight, stored_weights
from et_moe.pipeline.models import MTP, Graph, Parts, model_of
from et_moe.pipeline.storage import Dense, Entry, Int4, Precision, Storage, Storages

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Weights quantized at a time: on a CPU by one core, whose cache the fp32 temporaries fit in."""

Spec = dict[str, Entry]
"""Name -> dtype and shape."""


class WeightSource(Protocol):
    """Where an export takes its weights from: a bundle, or a checkpoint quantized on the way."""

    directory: Path
    config: Config
    storages: Storages

    def groups(self) -> Iterator[dict[str, Tensor]]:
        """The parameters group by group, in the order of `parameter_groups`."""
        ...


def meta_graph(config: Config, precision: Precision) -> Graph:
    """The model's graph without memory for its parameters.

    Raises:
        ConfigError: a storage does not take the shape of a weight.
    """
    try:
        with torch.device("meta"):
            return model_of(config).build(config, precision)
    except (ValueError, RuntimeError) as e:  # a group that does not fit, sizes that overflow
        raise ConfigError(str(e)) from None


def parameter_spec(graph: Graph) -> Spec:
    """Name, dtype and shape of every parameter, in the order of the graph."""
    return {name: (p.dtype, tuple(p.shape)) for name, p in graph.named_parameters()}


def parameter_groups(spec: Mapping[str, Entry]) -> list[list[str]]:
    """Parameter names by group: those before the layers, each layer, those behind them, the MTP
    head's; `count_groups` says how many there are."""
    groups: dict[str, list[str]] = {}
    place = "first"
    for name in spec:
        is_layer = name.startswith("layers.")
        place = "last" if is_layer else MTP if name.startswith(MTP) else place
        key = ".".join(name.split(".")[:2]) if is_layer else place
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def count_groups(config: Config) -> int:
    """How many groups the parameters of a model make up, see `parameter_groups`."""
    return config.num_hidden_layers + 2 + config.mtp_num_hidden_layers


def _matrices(part: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The rows `[R, K]` of a part of a weight, and their importance; a table of experts whose
    columns matter differently comes expert by expert, which takes no memory for the rows."""
    if importance is None:
        yield part.flatten(0, -2), None
    elif part.dim() == 2:
        yield part, importance
    else:
        yield from zip(part.flatten(0, -3), importance.flatten(0, -3), strict=True)


def _pieces(
    parts: Parts, importance: Parts | None, kept: Sequence[Tensor], device: str
) -> Iterator[tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]:
    """Rows of a weight that are quantized at a time: with their importance, and the same rows of
    the tensors that are kept of it."""
    targets, first = [tensor.flatten(0, -2) for tensor in kept], 0
    for part, columns in zip(parts, importance or [None] * len(parts), strict=True):
        for rows, weighed in _matrices(part, columns):
            count = max(1, _CHUNK[device] // max(1, rows.shape[1]))
            for begin in range(0, len(rows), count):
                end = min(begin + count, len(rows))
                into = tuple(tensor[first + begin : first + end] for tensor in targets)
                yield rows[begin:end], None if weighed is None else weighed[begin:end], into
            first += len(rows)


def _quantize(
    parts: Parts,
    importance: Parts | None,
    kept: Sequence[Tensor],
    storage: Storage,
    method: str,
    pool: Executor,
) -> None:
    """Quantizes the parts of a weight into the tensors that are kept of it, on a GPU if there is
    one: the bits are the same."""
    gains = parts[0].is_floating_point() and not isinstance(storage, Dense)
    device = "cuda" if gains and torch.cuda.is_available() else "cpu"

    def run(piece: tuple[Tensor, Tensor | None, tuple[Tensor, ...]]) -> None:
        rows, columns, targets = piece
        columns = None if columns is None else columns.to(device)
        made = storage.quantize(rows.to(device), method, columns)
        for target, tensor in zip(targets, made, strict=True):
            target.copy_(tensor)

    pieces = _pieces(parts, importance, kept, device)
    list(pool.map(run, pieces) if device == "cpu" else map(run, pieces))


def quantize_parameter(
    name: str,
    parts: Parts,
    stored: StoredWeight | None,
    method: str,
    pool: Executor,
    importance: Parts | None = None,
) -> dict[str, Tensor]:
    """One parameter as it is kept: as it is, or the tensors that its storage makes of it."""
    if stored is None:
        tensor = torch.cat(parts)
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{name}: the tensor has entries that are not finite")
        return {name: tensor}
    try:
        floats = [part.dtype for part in parts if part.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, floats, torch.bfloat16)
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        entries = stored.storage.tensors(name, shape, dtype).values()
        kept = [torch.empty(sizes, dtype=kind) for kind, sizes in entries]
        _quantize(parts, importance, kept, stored.storage, method, pool)
    except ValueError as e:
        raise ConfigError(f"{name}: {e}") from None
    return dict(zip(stored.tensors, kept, strict=True))


def _join(storages: dict[str, Storage], checkpoint: Checkpoint) -> dict[str, Storage]:
    """The storages, but for INT4 parts that can go into INT4 tables of another part (`joined` of a
    `Model`), which may have arrived with other groups or other scales: these are stored alike."""
    for part, tables in model_of(checkpoint.config).joined.items():
        both = isinstance(storages[part], Int4) and isinstance(storages[tables], Int4)
        if both and part not in checkpoint.kept:
            storages[part] = storages[tables]
    return storages


class QuantizedCheckpoint:
    """A checkpoint whose parameters are quantized as they are read (a `WeightSource`).

    Args:
        storages: of the model's parts. Weights that arrive quantized (`Checkpoint.kept`) keep their
            values, so the parts that have any keep their storage, too.
        method: how INT4 scales are chosen, see `ops.quantize_w4`.
        importance: of the columns, for INT4 scales, or None for the same everywhere.

    Raises:
        ConfigError: a storage does not take the shape of a weight.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        storages: Storages,
        method: str = "mse",
        importance: Importance | None = None,
    ) -> None:
        self.directory = checkpoint.directory
        self.storages = _join({**storages, **checkpoint.kept}, checkpoint)
        self.config, self._checkpoint, self._method = checkpoint.config, checkpoint, method
        self._importance = importance
        for part in checkpoint.kept:
            others = checkpoint.others(part)
            if others and not isinstance(storages[part], Int4):
                warn(
                    f"{self.directory}: {part} arrives quantized, but for {others[0]} and "
                    f"{len(others) - 1} more weights, which are stored with the others and become "
                    "INT4, too"
                )
        self._stored = stored_weights(meta_graph(self.config, Precision(self.storages)))

    def groups(self) -> Iterator[dict[str, Tensor]]:
        groups = self._checkpoint.groups(self.storages)
        columns: Iterator[dict[str, Parts]] = itertools.repeat({})
        if self._importance is not None:
            columns = self._importance.groups(self.storages)
        with worker_threads() as pool:
            for group, important in zip(groups, columns, strict=False):  # repeat does not end
                yield self._quantize(group, important, pool)

    def _quantize(
        self, group: dict[str, Parts], importance: dict[str, Parts], pool: Executor
    ) -> dict[str, Tensor]:
        """A group as it is kept; what has been quantized is not held any longer."""
        kept: dict[str, Tensor] = {}
        for name in list(group):
            stored, columns = self._stored.get(name), importance.pop(name, None)
            try:
                parts = group.pop(name)
                kept |= quantize_parameter(name, parts, stored, self._method, pool, columns)
            except ConfigError as e:
                raise ConfigError(f"{self.directory}: {e}") from None
        return kept

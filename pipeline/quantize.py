"""Weights on their way from a checkpoint: quantized group by group as they are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import Config, ConfigError, warn
from et_moe.pipeline.layers import StoredWeight, stored_weights
from et_moe.pipeline.models import Graph, Parts, model_of
from et_moe.pipeline.storage import Entry, Int4, Precision, Storage, Storages

_CHUNK = 1 << 24
"""Weights quantized at a time: bounds the fp32 temporaries."""

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
    """Parameter names by group: those before the layers, each layer, and those behind them."""
    groups: dict[str, list[str]] = {}
    place = "first"
    for name in spec:
        is_layer = name.startswith("layers.")
        place = "last" if is_layer else place
        key = ".".join(name.split(".")[:2]) if is_layer else place
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _chunks(parts: Parts) -> Iterator[Tensor]:
    for part in parts:
        rows = max(1, _CHUNK // max(1, part[0].numel()))
        yield from part.split(rows)


def quantize_parameter(
    name: str, parts: Parts, stored: StoredWeight | None, method: str = "mse"
) -> dict[str, Tensor]:
    """One parameter as it is kept: as it is, or the tensors that its storage makes of it."""
    if stored is None:
        tensor = torch.cat(parts)
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{name}: the tensor has entries that are not finite")
        return {name: tensor}
    try:
        chunks = [stored.storage.quantize(chunk, method) for chunk in _chunks(parts)]
    except ValueError as e:
        raise ConfigError(f"{name}: {e}") from None
    return dict(zip(stored.tensors, map(torch.cat, zip(*chunks, strict=True)), strict=True))


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

    Raises:
        ConfigError: a storage does not take the shape of a weight.
    """

    def __init__(self, checkpoint: Checkpoint, storages: Storages, method: str = "mse") -> None:
        self.directory = checkpoint.directory
        self.storages = _join({**storages, **checkpoint.kept}, checkpoint)
        self.config, self._checkpoint, self._method = checkpoint.config, checkpoint, method
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
        for group in self._checkpoint.groups(self.storages):
            kept: dict[str, Tensor] = {}
            for name in list(group):
                stored = self._stored.get(name)
                try:
                    kept |= quantize_parameter(name, group.pop(name), stored, self._method)
                except ConfigError as e:
                    raise ConfigError(f"{self.directory}: {e}") from None
            yield kept

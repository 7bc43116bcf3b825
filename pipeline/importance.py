"""Which columns of a checkpoint's weights matter: how large the inputs are that they meet.

A file of `et-moe calibrate` is in safetensors format. For each weight that an INT4 scale may be
chosen for it has, under the weight's name behind the prefix, the mean square of each input
(float32 `[K]`, of a table of experts `[E, K]`), and under that name and `.rows` how many inputs
there were (int64 `[]` or `[E]`): for experts, how often each was chosen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from et_moe.backends.atomic_file import write_file
from et_moe.pipeline.checkpoint import EMBEDDING, Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.models import MTP, Parts, Shapes, model_of
from et_moe.pipeline.safetensors_file import SafetensorsFile
from et_moe.pipeline.storage import Storages

KIND = {"et_moe": "importance, version 1"}
"""The header's metadata. One entry: the library writes several in any order."""

ROWS = ".rows"

PRIOR_ROWS = 32
"""Rows of all experts' mean in the moments of each: a rarely chosen one has few of its own."""


@dataclass
class Moments:
    """Sums over the inputs of a matrix, or of each expert's.

    Attributes:
        squares: by column, float64 `[K]` or `[E, K]`.
        rows: how many there were, int64 `[]` or `[E]`.
    """

    squares: Tensor
    rows: Tensor

    @staticmethod
    def zeros(*sizes: int, device: torch.device) -> "Moments":
        """Of no inputs; sizes as of `squares`."""
        squares = torch.zeros(sizes, dtype=torch.float64, device=device)
        return Moments(squares, torch.zeros(sizes[:-1], dtype=torch.int64, device=device))

    def add(self, rows: Tensor, expert: int | None = None) -> None:
        """Counts inputs `[n, K]` of the matrix, or of one expert's."""
        at = () if expert is None else expert
        self.squares[at] += rows.double().square().sum(0)
        self.rows[at] += len(rows)

    def mean(self) -> Tensor:
        """Mean squares, float32; those of an expert with a few rows of all experts' mean."""
        if self.squares.dim() == 1:
            return (self.squares / self.rows).float()
        common = self.squares.sum(0) / self.rows.sum() * PRIOR_ROWS
        return ((self.squares + common) / (self.rows[:, None] + PRIOR_ROWS)).float()


def important(checkpoint: Checkpoint) -> Shapes:
    """The weights that have an importance -> its shape: those of linear layers and experts, but
    for the MTP head, which takes no part in the model's tokens."""
    model, shapes = model_of(checkpoint.config), checkpoint.shapes()
    tied = {EMBEDDING} if checkpoint.is_tied() else {}
    return {
        name: (*shape[:-2], shape[-1])
        for name, shape in shapes.items()
        if not name.startswith(MTP)
        and (model.parts.get(model.part(name)) in ("linear", "experts") or name in tied)
    }


def write_importance(path: Path, found: Mapping[str, Tensor]) -> None:
    """Writes a file of means and numbers of rows by name."""
    apart = {name: tensor.clone() for name, tensor in found.items()}  # weights share their inputs
    write_file(path, safetensors.torch.save(apart, metadata=KIND))


def _ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones((), dtype=torch.bfloat16).expand(shape)


class Importance:
    """The importance of a checkpoint's columns, read from a file.

    Raises:
        ConfigError: the file is none of `et-moe calibrate`, or not of such a checkpoint; names it
            and what is wrong.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._file, self._checkpoint = SafetensorsFile(path), checkpoint
        self._shapes, self._important = checkpoint.shapes(), important(checkpoint)
        if self._file.metadata != KIND:
            found = f"its header says {self._file.metadata}, expected {KIND}"
            raise ConfigError(f"{path}: not a file of `et-moe calibrate`: {found}")
        other = f"made of another checkpoint than {checkpoint.directory}?"
        entries = {n: e for n, e in self._file.entries.items() if not n.endswith(ROWS)}
        for name in self._important:
            if name not in entries:
                raise ConfigError(f"{path}: {name} is missing: {other}")
        for name, entry in entries.items():
            if name not in self._important:
                raise ConfigError(f"{path}: {name} is not a weight of the checkpoint: {other}")
            if entry.shape != self._important[name] or entry.dtype != "F32":
                found, expected = (entry.dtype, entry.shape), ("F32", self._important[name])
                raise ConfigError(f"{path}: {name} is {found}, expected {expected}: {other}")
        for name in self._important:  # before hours of quantizing
            self._columns(name)

    def _columns(self, name: str) -> Tensor:
        """The importance of a weight's columns, as the file has it but in bfloat16."""
        columns = self._file.read(name).bfloat16()
        if not ((columns >= 0).all() and torch.isfinite(columns).all()):
            raise ConfigError(
                f"{self._file.path}: {name} has entries that are negative or not finite"
            )
        return columns

    def _read(self, name: str) -> Tensor:
        """The importance of every entry of a weight, bfloat16, without memory for its rows."""
        shape = self._shapes[name]
        if name not in self._important:
            return _ones(shape)
        return self._columns(name).unsqueeze(-2).expand(shape)

    def groups(self, storages: Storages) -> Iterator[dict[str, Parts]]:
        """The importance of every entry of the parameters, in the parts that `Checkpoint.groups`
        makes them up of; ones for parameters that have none. The embedding has none, even if its
        weight has that of the head: no inputs meet its columns."""
        for group in self._checkpoint.groups_of(self._read, storages):
            if EMBEDDING in group:
                group[EMBEDDING] = [_ones(part.shape) for part in group[EMBEDDING]]
            yield group

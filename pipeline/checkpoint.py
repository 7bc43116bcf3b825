"""Reads a Hugging Face checkpoint and fuses its tensors into the parameters of a model's graph.

Nothing is loaded until a group (the embedding, one layer, the head) is asked for, so memory stays
at one group whatever the checkpoint's size.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from et_moe.pipeline.codes import CODES, dequantize
from et_moe.pipeline.config import ConfigError, read_json
from et_moe.pipeline.formats import format_for
from et_moe.pipeline.formats.format import Contents, HeaderError, StoredTensor, TensorError
from et_moe.pipeline.models import MTP, JoinError, Parts, Shapes, load_config, model_of
from et_moe.pipeline.safetensors_file import SafetensorsFile
from et_moe.pipeline.storage import SCALE_DTYPES, Int4, Storages


def _list_names(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Names of weights that may be one and the same."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def indexed_files(index: Path) -> list[str]:
    """The names of the files with the tensors that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map must map tensor names to files")
    files: set[str] = set()
    for name in weight_map.values():
        if isinstance(name, str) and name in files:
            continue
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: {name!r} is not the name of a file beside it")
        files.add(name)
    return sorted(files)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps Python from looking for garbage: among the objects of very many tensors there is none,
    and looking through them again and again takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint or bundle, sharded or single.

    Raises:
        ConfigError: there are none, or both kinds, of which one would be left out silently.
    """
    index, single = directory / INDEX, directory / SINGLE
    if index.exists() and single.exists():
        both = f"holds {single.name} and the shards of {index.name}"
        raise ConfigError(f"{directory}: {both}: two sets of weights, expected one of them")
    if not index.exists():
        if not single.is_file():
            raise ConfigError(f"{directory}: neither {SINGLE} nor {index.name} is there")
        return [single]
    files = [directory / name for name in indexed_files(index)]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: no such file, named by {index.name}")
    return files


class Checkpoint:
    """A checkpoint directory whose tensors were checked against its configuration.

    Args:
        directory: holds `config.json` and safetensors, sharded or single, in one of
            `formats.FORMATS`, with names as the model's `Model.checkpoint_shapes` says.

    Attributes:
        config: the model's shape; without an MTP head if there are no tensors of one, whatever
            config.json says.
        skipped: how many tensors were passed over that the graph has no use for.
        kept: part of the model -> storage of its weights that arrive quantized and stay as they
            are.

    Raises:
        ConfigError: names the file, tensor or key at fault.
    """

    @_collector_paused()
    def __init__(self, directory: Path) -> None:
        self.directory, self.skipped = directory, 0
        self.config = load_config(directory)
        self._model = model_of(self.config)
        self._files: dict[str, SafetensorsFile] = {}
        self._names: dict[str, str] = {}
        self._metadata: dict[str, str] = {}
        found: dict[str, StoredTensor] = {}
        for path in shard_files(directory):
            self._list(SafetensorsFile(path), found)
        if not any(name.startswith(MTP) for name in found):
            self.config = replace(self.config, mtp_num_hidden_layers=0)
        file = directory / "config.json"
        try:
            self._format = format_for(
                Contents(directory, read_json(file), found, self._metadata, self._read_stored)
            )
        except (TensorError, HeaderError) as e:
            raise self._located(e) from None
        except ConfigError as e:
            raise ConfigError(f"{file}: {e}") from None
        for name in self._format.skipped:
            del found[name]
        self._check(found)
        self.kept = self._kept_storages()

    def _list(self, file: SafetensorsFile, found: dict[str, StoredTensor]) -> None:
        """Adds the tensors of a file, by their names behind the prefix."""
        self._metadata |= file.metadata
        skipped = self._model.skipped_prefixes
        if not self.config.mtp_num_hidden_layers:
            skipped += (MTP, *(prefix + MTP for prefix in self._model.prefixes))
        for name, entry in file.entries.items():
            if name.startswith(skipped):
                self.skipped += 1
                continue
            prefix = next((p for p in self._model.prefixes if name.startswith(p)), "")
            short = name.removeprefix(prefix)
            if short in found:
                raise ConfigError(f"{file.path}: {name} is there twice")
            found[short] = StoredTensor((entry.dtype,), entry.shape)
            self._files[short], self._names[short] = file, name

    def _located(self, error: TensorError | HeaderError) -> ConfigError:
        if isinstance(error, HeaderError):
            # Formats that describe their weights in a header have one file.
            files = {file.path.name for file in self._files.values() if file.metadata}
            where = self.directory / min(files, default=SINGLE)
            return ConfigError(f"{where}: metadata of the header: {error}")
        file = self._files[error.tensor].path
        return ConfigError(f"{file}: {self._names[error.tensor]} {error.problem}")

    def _kept(self, name: str) -> tuple[str, Int4] | None:
        """The part and the storage of a weight that stays as it arrives."""
        storage, part = self._format.kept(name), self._model.part(name)
        return None if storage is None or part is None else (part, storage)

    def others(self, part: str) -> list[str]:
        """The weights of a part that are not kept, by their names in the files if these have them
        one by one."""
        return [
            self._names.get(name, name)
            for name in self._format.names
            if self._model.part(name) == part and self._format.kept(name) is None
        ]

    def _kept_storages(self) -> dict[str, Int4]:
        storages: dict[str, Int4] = {}
        first: dict[str, str] = {}
        for name in self._format.names:
            if (kept := self._kept(name)) is None:
                continue
            part, storage = kept
            if storages.setdefault(part, storage) != storage:
                both = f"{first[part]} is {storages[part]}, {name} is {storage}"
                raise ConfigError(f"{self.directory}: weights of {part} differ: {both}")
            first.setdefault(part, name)
        embedding = self._model.part(EMBEDDING)
        if self.is_tied() and embedding in storages:
            storages[self._model.part(HEAD)] = storages[embedding]
        return storages

    def is_tied(self) -> bool:
        """Whether the head has the embedding's weight, for want of one of its own."""
        return HEAD not in self.shapes()

    def _check(self, found: dict[str, StoredTensor]) -> None:
        expected: dict[str, StoredTensor] = {}
        try:
            shapes = self._model.checkpoint_shapes(self.config, self._format.names)
            for name, shape in shapes.items():
                expected |= self._format.stored(name, shape)
        except (TensorError, HeaderError) as e:
            raise self._located(e) from None
        missing = [n for n in expected if n not in found]
        unexpected = [self._names[n] for n in found if n not in expected]
        wrong = {"missing": missing, "unexpected": unexpected}
        lists = [f"{what} tensors: {_list_names(names)}" for what, names in wrong.items() if names]
        if lists:
            raise ConfigError(f"{self.directory}: {'; '.join(lists)}")
        for name, tensor in found.items():
            where, (dtype,) = f"{self._files[name].path}: {self._names[name]}", tensor.dtypes
            allowed, shape = expected[name].dtypes, expected[name].shape
            if dtype not in allowed:
                raise ConfigError(f"{where} has dtype {dtype}, expected one of {[*allowed]}")
            if tensor.shape != shape:
                raise ConfigError(f"{where} has shape {tensor.shape}, config.json asks {shape}")

    def groups(self, storages: Storages) -> Iterator[dict[str, Parts]]:
        """The model's parameters, group by group: embedding, each layer, norm and head, MTP head.

        Args:
            storages: of the model's parts, on which it depends which parameters there are.

        Yields:
            Parameter name (as in the model's graph, before quantization) to its parts, on the CPU
            in the checkpoint's dtype, or codes (`pipeline/codes.py`) of weights that are kept.
        """
        try:
            yield from self.groups_of(self._read, storages)
        except JoinError as e:
            raise ConfigError(f"{self.directory}: {self._latest}: {e}") from None

    def groups_of(
        self, read: Callable[[str], Tensor], storages: Storages
    ) -> Iterator[dict[str, Parts]]:
        """What takes the places of the parameters if `read` takes that of reading a weight."""
        return self._model.groups(self.config, self._format.names, read, storages)

    def shapes(self) -> Shapes:
        """The shape of every weight by its name behind the prefix."""
        return self._model.checkpoint_shapes(self.config, self._format.names)

    def _read(self, name: str) -> Tensor:
        self._latest = name
        try:
            weight = self._format.read(name, self._read_stored)
        except TensorError as e:
            raise self._located(e) from None
        if weight.dtype == CODES and self._kept(name) is None:
            return dequantize(weight, SCALE_DTYPES[self._format.kept(name).scale_dtype])
        return weight

    def _read_stored(self, name: str) -> Tensor:
        return self._files[name].read(self._names[name])

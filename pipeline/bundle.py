"""Bundles: quantized weights in a directory that needs nothing else.

A bundle holds `config.json` (Hugging Face's, with an `et_moe` section that names the version and
the storage of each part of the model, and says if there is an MTP head), the tokenizer's files, and
safetensors shards with the parameters of the model's graph by name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from et_moe.backends.atomic_file import write_file
from et_moe.backends.threads import write_behind
from et_moe.pipeline.checkpoint import shard_files
from et_moe.pipeline.config import ConfigError, read_json
from et_moe.pipeline.locks import sole_writer
from et_moe.pipeline.models import load_config, model_of
from et_moe.pipeline.quantize import (
    WeightSource,
    count_groups,
    meta_graph,
    parameter_groups,
    parameter_spec,
)
from et_moe.pipeline.safetensors_file import SafetensorsFile
from et_moe.pipeline.safetensors_stream import SafetensorsWriter
from et_moe.pipeline.storage import (
    Precision,
    Storages,
    is_scale,
    storages_from_json,
    storages_to_json,
)

BUNDLE_VERSION = 3
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What bundles and programs take over as it is: text to tokens, conversations to text, and how
tokens are drawn unless a request says otherwise."""
MTP_LAYERS = "mtp_num_hidden_layers"
"""Key of the section: layers of the MTP head in the bundle, 0 if it is not there. Hugging Face's
own key may promise a head that the checkpoint did not have."""
DIGESTS = "xxh3_64"
"""Key of the index's metadata: tensor -> `digest` of its bytes."""


class Bundle:
    """A directory written by `write_bundle` (a `WeightSource`).

    A tensor's bytes are compared with their digest when they are read.

    Raises:
        ConfigError: not a bundle, another format version, or tensors that do not fit the
            configuration; names file, key or tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, config = directory, load_config(directory)
        file = directory / "config.json"
        section = read_json(file).get("et_moe")
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: no et_moe section: not a bundle of `et-moe quantize`")
        if section.get("bundle_version") != BUNDLE_VERSION:
            found = section.get("bundle_version")
            raise ConfigError(f"{file}: bundle_version {found!r}, expected {BUNDLE_VERSION}")
        mtp = section.get(MTP_LAYERS, 0)
        if type(mtp) is not int or mtp not in (0, config.mtp_num_hidden_layers):
            expected = f"expected 0 or that of the model, {config.mtp_num_hidden_layers}"
            raise ConfigError(f"{file}: et_moe.{MTP_LAYERS} is {mtp!r}, {expected}")
        self.config = replace(config, mtp_num_hidden_layers=mtp)
        parts = model_of(self.config).parts
        try:
            self.storages = storages_from_json(section.get("storages"), parts)
        except ValueError as e:
            raise ConfigError(f"{file}: et_moe.storages: {e}") from None
        try:
            graph = meta_graph(self.config, Precision(self.storages))
        except ConfigError as e:
            raise ConfigError(f"{file}: {e}") from None
        self._spec = parameter_spec(graph)
        self._files: dict[str, SafetensorsFile] = {}
        for shard in map(SafetensorsFile, shard_files(directory)):
            self._files |= dict.fromkeys(shard.entries, shard)
        wrong = sorted(set(self._spec) ^ set(self._files))
        if wrong:
            kind = "missing" if wrong[0] in self._spec else "unexpected"
            raise ConfigError(f"{directory}: {kind} tensor {wrong[0]} ({len(wrong)} in all)")
        self._digests = self._read_digests()

    def _read_digests(self) -> dict[str, str]:
        index = self.directory / "model.safetensors.index.json"
        metadata = read_json(index).get("metadata")
        digests = metadata.get(DIGESTS) if isinstance(metadata, dict) else None
        if not isinstance(digests, dict) or not self._files.keys() <= digests.keys():
            raise ConfigError(f"{index}: metadata.{DIGESTS} must have a digest of every tensor")
        return digests

    def groups(self) -> Iterator[dict[str, Tensor]]:
        for names in parameter_groups(self._spec):
            yield {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        file, (dtype, shape) = self._files[name], self._spec[name]
        tensor = file.read(name)
        # Weights are converted to the dtype of the program. Scales are not: values were chosen by
        # them, and another dtype might not hold them.
        same_kind = tensor.is_floating_point() and dtype.is_floating_point and not is_scale(name)
        if tuple(tensor.shape) != shape or not (tensor.dtype == dtype or same_kind):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ConfigError(f"{file.path}: {name} is {found}, expected {dtype} {shape}")
        if digest(tensor) != self._digests[name]:
            raise ConfigError(f"{file.path}: damaged: checksum mismatch of tensor {name}")
        return tensor


def copy_files(source: Path, destination: Path, names: tuple[str, ...]) -> list[str]:
    """Copies those of `names` that exist, each whole or not at all; returns them."""
    copied = [name for name in names if (source / name).is_file()]
    for name in copied:
        write_file(destination / name, (source / name).read_bytes())
    return copied


def bundle_config(source: Path, storages: Storages, mtp_num_hidden_layers: int = 0) -> dict:
    """The bundle's `config.json`: the checkpoint's, with the `et_moe` section."""
    section = {"bundle_version": BUNDLE_VERSION, "storages": storages_to_json(storages)}
    if mtp_num_hidden_layers:
        section[MTP_LAYERS] = mtp_num_hidden_layers
    return read_json(source / "config.json") | {"et_moe": section}


def write_shard(path: Path, group: Mapping[str, Tensor]) -> None:
    """One safetensors file; wider dtypes first, so that every tensor is aligned."""
    order = sorted(group, key=lambda name: -group[name].dtype.itemsize)
    entries = {name: (group[name].dtype, tuple(group[name].shape)) for name in order}
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for name in order:
            writer.write(name, group[name])


class _Shards:
    """Writes the shards of a bundle, a group each, and keeps what the index says of them."""

    def __init__(self, directory: Path, count: int, progress: Callable[[], None]) -> None:
        self._directory, self._count, self._progress = directory, count, progress
        self._weight_map: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._total = 0

    def write(self, numbered: tuple[int, dict[str, Tensor]]) -> None:
        number, group = numbered
        shard = f"model-{number:05d}-of-{self._count:05d}.safetensors"
        write_shard(self._directory / shard, group)
        self._weight_map |= dict.fromkeys(group, shard)
        self._digests |= {name: digest(tensor) for name, tensor in group.items()}
        self._total += sum(t.nbytes for t in group.values())
        self._progress()

    def index(self) -> dict[str, object]:
        """Content of `model.safetensors.index.json`; the digests are this project's."""
        metadata = {"total_size": self._total, DIGESTS: self._digests}
        return {"metadata": metadata, "weight_map": self._weight_map}


def digest(tensor: Tensor) -> str:
    """XXH3 64-bit of a tensor's bytes, hexadecimal."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(data)


def write_bundle(
    source: WeightSource, destination: Path, progress: Callable[[], None] = lambda: None
) -> None:
    """Writes `source` to a new directory, two groups in memory; `config.json` comes last.

    Args:
        destination: created; must not hold a bundle or checkpoint already.
        progress: called after each group (embedding, layers, head, MTP head).

    Raises:
        ConfigError: the directory is taken, or another process writes to it.
    """
    with sole_writer(destination, ["config.json"]):
        if (destination / "config.json").exists():
            taken = "already holds a config.json; choose another directory"
            raise ConfigError(f"{destination}: {taken}")
        shards = _Shards(destination, count_groups(source.config), progress)
        write_behind(enumerate(source.groups(), start=1), shards.write)
        copy_files(source.directory, destination, COPIED_FILES)
        write_json(destination / "model.safetensors.index.json", shards.index())
        mtp = source.config.mtp_num_hidden_layers
        config = bundle_config(source.directory, source.storages, mtp)
        write_json(destination / "config.json", config)


def write_json(path: Path, value: object) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())

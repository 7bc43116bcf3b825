"""Quantized weights: made from a checkpoint, written to and read from a bundle.

A bundle is a directory that needs nothing else: `config.json` (Hugging Face's, with an `et_moe`
section that names the format), the tokenizer's files, and safetensors shards with the parameters
of `model.Qwen3_5Moe` by name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from et_moe.backends import ops
from et_moe.backends.atomic_file import write_file
from et_moe.backends.threads import write_behind
from et_moe.examples.qwen3_5_moe.graph import Quantization, Qwen3_5Moe
from et_moe.pipeline.checkpoint import (
    Checkpoint,
    Parts,
    open_safetensors,
    shard_files,
)
from et_moe.pipeline.config import ConfigError, ModelConfig, load_config, read_json
from et_moe.pipeline.safetensors_stream import SafetensorsWriter

BUNDLE_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")
_CHUNK = 1 << 24
"""Weights quantized at a time: bounds the fp32 temporaries."""

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class WeightSource(Protocol):
    """Where an export takes its weights from: a bundle, or a checkpoint quantized on the way."""

    directory: Path
    config: ModelConfig
    quantization: Quantization

    def groups(self) -> Iterator[dict[str, Tensor]]:
        """The parameters group by group, in the order of `parameter_groups`."""
        ...


def parameter_spec(c: ModelConfig, q: Quantization, dtype: torch.dtype) -> Spec:
    """Name, dtype and shape of every parameter, in the order of the model."""
    with torch.device("meta"):
        model = Qwen3_5Moe(c, q, dtype)
    return {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}


def parameter_groups(spec: Mapping[str, tuple]) -> list[list[str]]:
    """Parameter names by group: the embedding, each layer, and the final norm with the head."""
    groups: dict[str, list[str]] = {}
    for name in spec:
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else None
        key = layer or ("embed" if name.startswith("embed_tokens.") else "head")
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _chunks(parts: Parts) -> Iterator[Tensor]:
    for part in parts:
        rows = max(1, _CHUNK // max(1, part[0].numel()))
        yield from part.split(rows)


def quantize_parameter(
    name: str, parts: Parts, q: Quantization, method: str = "mse"
) -> dict[str, Tensor]:
    """One parameter as it is stored: itself, or INT4/INT8 values and their scales."""
    embedding = name == "embed_tokens.weight"
    linear = name.endswith(("_proj.weight", "lm_head.weight", ".w13", ".w2"))
    if embedding and q.qembedding == "8w":
        quantize: Callable = ops.quantize_w8
    elif linear and q.qlinear == "4w":

        def quantize(chunk: Tensor) -> tuple[Tensor, Tensor]:
            return ops.quantize_w4(chunk, q.group_size, method)
    else:
        return {name: torch.cat(parts)}
    scale_name = f"{name}_scale" if ".experts." in name else f"{name.removesuffix('weight')}scale"
    try:
        values, scales = zip(*(quantize(chunk) for chunk in _chunks(parts)), strict=True)
    except ValueError as e:
        raise ConfigError(f"{name}: {e}") from None
    return {name: torch.cat(values), scale_name: torch.cat(scales)}


class QuantizedCheckpoint:
    """A checkpoint whose parameters are quantized as they are read (a `WeightSource`)."""

    def __init__(
        self, checkpoint: Checkpoint, quantization: Quantization, method: str = "mse"
    ) -> None:
        self.directory, self.config = checkpoint.directory, checkpoint.config
        self.quantization = quantization
        self._checkpoint, self._method = checkpoint, method
        parameter_spec(
            self.config, quantization, torch.bfloat16
        )  # raises where a group does not fit

    def groups(self) -> Iterator[dict[str, Tensor]]:
        for group in self._checkpoint.groups():
            stored: dict[str, Tensor] = {}
            for name in list(group):
                stored |= quantize_parameter(name, group.pop(name), self.quantization, self._method)
            yield stored


class Bundle:
    """A directory written by `write_bundle` (a `WeightSource`).

    Raises:
        ConfigError: not a bundle, another format version, or tensors that do not fit the
            configuration; names file, key or tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.config = directory, load_config(directory)
        file = directory / "config.json"
        section = read_json(file).get("et_moe")
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: no et_moe section: not a bundle of `et-moe quantize`")
        if section.get("bundle_version") != BUNDLE_VERSION:
            found = section.get("bundle_version")
            raise ConfigError(f"{file}: bundle_version {found!r}, expected {BUNDLE_VERSION}")
        try:
            self.quantization = Quantization(**section.get("quantization", {}))
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{file}: et_moe.quantization: {e}") from None
        try:
            self._spec = parameter_spec(self.config, self.quantization, torch.bfloat16)
        except (ValueError, RuntimeError) as e:  # a group that does not fit, sizes that overflow
            raise ConfigError(f"{file}: {e}") from None
        self._files: dict[str, Path] = {}
        for shard in shard_files(directory):
            with open_safetensors(shard) as tensors:
                self._files |= dict.fromkeys(tensors.keys(), shard)
        wrong = sorted(set(self._spec) ^ set(self._files))
        if wrong:
            kind = "missing" if wrong[0] in self._spec else "unexpected"
            raise ConfigError(f"{directory}: {kind} tensor {wrong[0]} ({len(wrong)} in all)")

    def groups(self) -> Iterator[dict[str, Tensor]]:
        for names in parameter_groups(self._spec):
            yield {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        path, (dtype, shape) = self._files[name], self._spec[name]
        try:
            with open_safetensors(path) as tensors:
                tensor = tensors.get_tensor(name)
        except SafetensorError as e:
            raise ConfigError(f"{path}: {name}: {e}") from None
        same_kind = tensor.is_floating_point() and dtype.is_floating_point
        if tuple(tensor.shape) != shape or not (tensor.dtype == dtype or same_kind):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ConfigError(f"{path}: {name} is {found}, expected {dtype} {shape}")
        return tensor


def copy_files(source: Path, destination: Path, names: tuple[str, ...]) -> list[str]:
    """Copies those of `names` that exist, each whole or not at all; returns them."""
    copied = [name for name in names if (source / name).is_file()]
    for name in copied:
        write_file(destination / name, (source / name).read_bytes())
    return copied


def bundle_config(source: Path, quantization: Quantization) -> dict:
    """The bundle's `config.json`: the checkpoint's, with the `et_moe` section."""
    section = {"bundle_version": BUNDLE_VERSION, "quantization": asdict(quantization)}
    return read_json(source / "config.json") | {"et_moe": section}


def write_shard(path: Path, group: Mapping[str, Tensor]) -> None:
    """One safetensors file; wider dtypes first, so that every tensor is aligned."""
    order = sorted(group, key=lambda name: -group[name].dtype.itemsize)
    entries = {name: (group[name].dtype, tuple(group[name].shape)) for name in order}
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for name in order:
            writer.write(name, group[name])


def write_bundle(
    source: WeightSource, destination: Path, progress: Callable[[], None] = lambda: None
) -> None:
    """Writes `source` to a new directory, two groups in memory; `config.json` comes last.

    Args:
        destination: created; must not hold a bundle or checkpoint already.
        progress: called after each group (embedding, layers, head).
    """
    destination.mkdir(parents=True, exist_ok=True)
    if (destination / "config.json").exists():
        raise ConfigError(f"{destination}: already holds a config.json; choose another directory")
    count = source.config.num_hidden_layers + 2
    weight_map: dict[str, str] = {}
    total = 0

    def write(numbered: tuple[int, dict[str, Tensor]]) -> None:
        nonlocal total
        number, group = numbered
        shard = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_shard(destination / shard, group)
        weight_map.update(dict.fromkeys(group, shard))
        total += sum(t.nbytes for t in group.values())
        progress()

    write_behind(enumerate(source.groups(), start=1), write)
    copy_files(source.directory, destination, COPIED_FILES)
    write_json(
        destination / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    write_json(destination / "config.json", bundle_config(source.directory, source.quantization))


def write_json(path: Path, value: object) -> None:
    """Writes an indented JSON file, whole or not at all."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())

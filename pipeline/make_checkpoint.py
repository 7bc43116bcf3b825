"""Random checkpoints in Hugging Face layout, of the shapes that a model presets."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from et_moe.backends.atomic_file import atomic_folder
from et_moe.pipeline.models import MTP, Model, Random, parse_config
from et_moe.pipeline.safetensors_stream import SafetensorsWriter

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_ELEMENTS = 1 << 22
THREADS = min(16, len(os.sched_getaffinity(0)))
DTYPE = torch.bfloat16


def make_checkpoint(
    output_dir: Path,
    model: Model,
    preset: str = "tiny",
    seed: int = 0,
    layers: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Writes a random bfloat16 checkpoint: config.json, generation_config.json and weight shards,
    and a tokenizer where the preset has one, see the model's `preset_files`.

    Memory stays below 3 GB for any number of layers. A tensor's values depend on the seed, its name
    and its shape alone, so checkpoints that differ in `layers` agree in the layers they share.

    Args:
        output_dir: directory to make; it appears only when complete.
        model: the model family.
        preset: a key of `model.presets`.
        seed: of all weights.
        layers: keep only this many layers from the front.
        overrides: replacements for values of the preset's text config, and `layer_types`.

    Raises:
        ValueError: an unknown preset or key of `overrides`, a value that makes no model, or
            `layers` out of range.
        FileExistsError: `output_dir` exists and is not an empty directory.
        OSError: writing failed; nothing is left.
    """
    output_dir = Path(output_dir)
    text = text_config(model, preset, layers, overrides)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir}: exists and is not an empty directory")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output_dir) as temporary:
        files = model.preset_files(preset, text)
        if files.tokenizer is not None:
            write_tokenizer(files.tokenizer, temporary, text["max_position_embeddings"])
        _write_json(temporary / "config.json", files.config)
        _write_json(temporary / "generation_config.json", files.generation)
        shapes = tensor_shapes(model, text, files.prefix)
        _write_weights(temporary, model, shapes, seed, text["initializer_range"])


def text_config(
    model: Model,
    preset: str,
    layers: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The text config that `make_checkpoint` writes for these arguments; raises as it does."""
    overrides = overrides or {}
    presets = model.presets
    if preset not in presets:
        raise ValueError(f"preset '{preset}': expected one of {', '.join(presets)}")
    for key in overrides:
        if key not in presets[preset] and key != "layer_types":
            raise ValueError(f"overrides: '{key}' is not a key of the '{preset}' text config")
    text = presets[preset] | overrides
    if "layer_types" not in text:
        text["layer_types"] = [
            "linear_attention" if (i + 1) % text["full_attention_interval"] else "full_attention"
            for i in range(text["num_hidden_layers"])
        ]
    text["num_hidden_layers"] = len(text["layer_types"])
    if layers is not None:
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise ValueError(f"layers {layers}: expected 1 to {text['num_hidden_layers']}")
        text["layer_types"] = text["layer_types"][:layers]
        text["num_hidden_layers"] = layers
    return text


def tensor_shapes(
    model: Model, text: dict[str, Any], prefix: str, names: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this text config; `names` as of
    `Model.checkpoint_shapes`."""
    shapes = model.checkpoint_shapes(parse_config(text), names)
    return {
        name if name == "lm_head.weight" or name.startswith(MTP) else prefix + name: shape
        for name, shape in shapes.items()
    }


def _random_chunk(
    name: str, shape: tuple[int, ...], seed: int, rule: Random, begin: int, end: int
) -> Tensor:
    """Rows [begin, end) of a tensor, bfloat16; seeded by themselves, so any thread makes them."""
    digest = hashlib.sha256(f"{seed}:{name}:{begin}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(end - begin, *shape[1:])
    if rule.log_uniform is not None:
        values.uniform_(*rule.log_uniform, generator=generator).log_()
    elif rule.std == 0:
        values.fill_(rule.mean)
    else:
        values.normal_(rule.mean, rule.std, generator=generator)
    return values.to(DTYPE)


def _random_chunks(
    pool: ThreadPoolExecutor,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    rule: Random,
) -> Iterator[Tensor]:
    """A tensor in pieces along dimension 0, of CHUNK_ELEMENTS or one row, THREADS in memory."""
    rows = max(1, CHUNK_ELEMENTS // math.prod(shape[1:]))
    begins = range(0, shape[0], rows)
    for group in (begins[i : i + THREADS] for i in range(0, len(begins), THREADS)):
        yield from pool.map(
            lambda begin: _random_chunk(
                name, shape, seed, rule, begin, min(begin + rows, shape[0])
            ),
            group,
        )


def _write_weights(
    directory: Path,
    model: Model,
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    initializer_range: float,
) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    shard_bytes = total_bytes = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPE.itemsize
        if shards[-1] and shard_bytes + size > MAX_SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = shape
        shard_bytes += size
        total_bytes += size

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries = {name: (DTYPE, shape) for name, shape in shard.items()}
            with SafetensorsWriter(directory / file, entries, {"format": "pt"}) as writer:
                for name, shape in shard.items():
                    rule = model.random(name, shape, initializer_range)
                    writer.write_chunks(name, _random_chunks(pool, name, shape, seed, rule))
            weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(tokenizer: dict[str, Any], directory: Path, max_length: int) -> None:
    """Writes tokenizer.json, in one line, and tokenizer_config.json; the first added token ends a
    text."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": tokenizer["added_tokens"][0]["content"],
        "pad_token": tokenizer["added_tokens"][0]["content"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (directory / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

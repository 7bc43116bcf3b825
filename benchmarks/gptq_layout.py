"""Checkpoints in the layout of the official GPTQ one: very many tensors, nearly all of them holes.

The weights and scales are holes in the files, which take no room and read as zeros. What is checked
when it is read, the zero points and the order of the columns, is written.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.make_checkpoint import tensor_shapes, text_config
from et_moe.pipeline.models import MTP, Shapes

GROUP_SIZE = 128
SHARDS = 14
VISION_TENSORS = 333
"""That the official checkpoint has besides; they are skipped."""

EXPERT = "layers.0.mlp.experts.0.down_proj.weight"
"""Name by which a model takes the experts to be apart."""

ITEMSIZE = {"I32": 4, "F16": 2, "BF16": 2}

Entries = dict[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> safetensors' name of its dtype, and its shape."""


def section(group_size: int = GROUP_SIZE) -> dict[str, object]:
    """The `quantization_config` of such a checkpoint."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
    }


def stored(shapes: Shapes, group_size: int = GROUP_SIZE) -> Entries:
    """What weights with these shapes, experts apart, are stored as. The routed experts are
    quantized, but for those of the MTP head."""
    entries: Entries = {}
    for name, shape in shapes.items():
        if ".mlp.experts." not in name or name.startswith(MTP):
            entries[name] = ("BF16", shape)
            continue
        module, (n, k) = name.removesuffix(".weight"), shape
        entries[f"{module}.qweight"] = ("I32", (k // 8, n))
        entries[f"{module}.qzeros"] = ("I32", (k // group_size, n // 8))
        entries[f"{module}.scales"] = ("F16", (k // group_size, n))
        entries[f"{module}.g_idx"] = ("I32", (k,))
    return entries


def _content(name: str, shape: tuple[int, ...], group_size: int) -> bytes:
    """What is written of a tensor; none for one that is a hole."""
    if name.endswith(".qzeros"):
        return b"\x77" * (4 * math.prod(shape))
    if name.endswith(".g_idx"):
        return struct.pack(f"<{shape[0]}i", *(column // group_size for column in range(shape[0])))
    return b""


def _write_holes(path: Path, entries: Entries, group_size: int) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + ITEMSIZE[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (_, shape) in entries.items():
            if content := _content(name, shape, group_size):
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(content)
        file.truncate(8 + len(text) + end)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, object],
    entries: Entries,
    group_size: int = GROUP_SIZE,
    shards: int = SHARDS,
) -> None:
    """Makes a folder with the configuration, the tensors in so many files, and their index."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    names = list(entries)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        _write_holes(directory / file, {name: entries[name] for name in own}, group_size)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**config, "quantization_config": section(group_size)}
    (directory / "config.json").write_text(json.dumps(config))


def write_official(directory: Path, layers: int | None = None) -> int:
    """Makes the official checkpoint, or one with fewer layers, and returns the number of its
    tensors. Of the 18 GB that the whole one seems to have, 0.4 GB are written."""
    text = text_config(MODEL, "35b", layers, {"mtp_num_hidden_layers": 1})
    files = MODEL.preset_files("35b", text)
    entries = stored(tensor_shapes(MODEL, text, files.prefix, [EXPERT]))
    entries |= {f"model.visual.{number}": ("BF16", (1,)) for number in range(VISION_TENSORS)}
    write_checkpoint(directory, files.config, entries)
    return len(entries)

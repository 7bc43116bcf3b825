"""Checkpoints of very many tensors, such as the official GPTQ one, which has 124611.

The work of opening one grows no faster than their number, and that of reading a layer not at all.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import GPTQ, SMALL, make_small, storages

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import safetensors_file
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.models import parse_config

ITEMSIZE = {"I32": 4, "F16": 2, "BF16": 2}
SHARDS = 3


def official_layout(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each tensor, by name, if the routed experts are quantized."""
    shapes = MODEL.checkpoint_shapes(parse_config(config), ["layers.0.mlp.experts.0"])
    entries = {}
    for name, shape in shapes.items():
        name = name if name.startswith("lm_head") else f"model.{name}"
        if ".mlp.experts." not in name:
            entries[name] = ("BF16", shape)
            continue
        module, (n, k) = name.removesuffix(".weight"), shape
        entries[f"{module}.qweight"] = ("I32", (k // 8, n))
        entries[f"{module}.qzeros"] = ("I32", (k // 32, n // 8))
        entries[f"{module}.scales"] = ("F16", (k // 32, n))
        entries[f"{module}.g_idx"] = ("I32", (k,))
    return entries


def write_holes(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Writes a safetensors file whose tensors are holes in it, so that they read as zeros."""
    header, end = {}, 0
    for name, (dtype, shape) in entries.items():
        size = ITEMSIZE[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def write_official(tmp_path: Path):
    """Makes a checkpoint with so many experts and returns how many tensors it has."""
    config, _ = make_small(tmp_path / "small", **SMALL)

    def write(experts: int) -> tuple[Path, int]:
        text = config | {"num_experts": experts, "quantization_config": GPTQ}
        directory = tmp_path / f"of_{experts}"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(text))
        entries, weight_map = official_layout(text), {}
        for shard in range(SHARDS):
            part = dict(list(entries.items())[shard::SHARDS])
            write_holes(directory / f"{shard}.safetensors", part)
            weight_map |= dict.fromkeys(part, f"{shard}.safetensors")
        index = {"weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory, len(entries)

    return write


def count_calls(run) -> Counter:
    """The numbers of calls of Python functions and of built-in ones while `run` runs, by kind."""
    counts = Counter()
    sys.setprofile(lambda frame, event, argument: counts.update((event,)))
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


def test_opening_takes_work_in_proportion_to_the_tensors(write_official, monkeypatch) -> None:
    files = Counter()
    original = safetensors_file.SafetensorsFile.__init__
    monkeypatch.setattr(
        safetensors_file.SafetensorsFile,
        "__init__",
        lambda self, path: (files.update((path.name,)), original(self, path))[1],
    )
    work = []
    for experts in (64, 256):
        directory, tensors = write_official(experts)
        files.clear()
        counts = count_calls(lambda directory=directory: Checkpoint(directory))
        assert files == {f"{shard}.safetensors": 1 for shard in range(SHARDS)}
        work.append((counts["call"] + counts["c_call"]) / tensors)
    assert tensors > 6000
    assert work[1] < 1.1 * work[0] and work[1] < 80


def test_a_layer_takes_one_read_a_tensor(write_official, monkeypatch) -> None:
    """The tensors of other layers are not looked at."""
    directory, _ = write_official(64)
    checkpoint = Checkpoint(directory)
    read = Counter()
    original = safetensors_file.SafetensorsFile.read

    def counted(self, name):
        read.update((name,))
        tensor = original(self, name)
        if name.endswith("qzeros"):
            tensor.fill_(0x77777777)
        return tensor

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "read", counted)
    groups = checkpoint.groups(storages())
    assert list(next(groups)) == ["embed_tokens.weight"] and read.total() == 1
    read.clear()
    next(groups)
    own = {name for name in official_layout(json.loads((directory / "config.json").read_text()))}
    assert read == dict.fromkeys((n for n in own if n.startswith("model.layers.0.")), 1)

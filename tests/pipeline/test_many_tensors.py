"""Large checkpoints: of very many tensors, as the official GPTQ one with its 124611, and of more
bytes than there is memory.

The work of opening one grows no faster than their number, and that of reading a layer not at all.
"""

import gc
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import SMALL, assert_equal, make_small, parameters, storages

from et_moe.benchmarks.gptq_layout import EXPERT, Entries, stored, write_checkpoint
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import safetensors_file
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.make_checkpoint import tensor_shapes

SHARDS = 3


def small_layout(config: dict) -> Entries:
    """The tensors of a small model in the layout of the official checkpoint."""
    return stored(tensor_shapes(MODEL, config, "model.", [EXPERT]), 32)


@pytest.fixture
def write_official(tmp_path: Path):
    """Makes a checkpoint with so many experts and returns how many tensors it has."""
    config, _ = make_small(tmp_path / "small", **SMALL)

    def write(experts: int) -> tuple[Path, int]:
        text, directory = config | {"num_experts": experts}, tmp_path / f"of_{experts}"
        entries = small_layout(text)
        write_checkpoint(directory, text, entries, 32, SHARDS)
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
        assert len(files) == SHARDS and set(files.values()) == {1}
        work.append((counts["call"] + counts["c_call"]) / tensors)
    assert tensors > 6000
    assert work[1] < 1.1 * work[0] and work[1] < 80


def test_opening_looks_for_no_garbage(write_official) -> None:
    """Python looks through all objects each time their number has grown by a quarter."""
    directory, _ = write_official(64)
    gc.collect()
    before = sum(generation["collections"] for generation in gc.get_stats())
    Checkpoint(directory)
    # One is due when looking begins again.
    assert sum(generation["collections"] for generation in gc.get_stats()) <= before + 1
    assert gc.isenabled()
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError):
        Checkpoint(directory)
    assert gc.isenabled()


def test_a_layer_takes_one_read_a_tensor(write_official, monkeypatch) -> None:
    """The tensors of other layers are not looked at."""
    directory, _ = write_official(64)
    checkpoint = Checkpoint(directory)
    read = Counter()
    original = safetensors_file.SafetensorsFile.read

    def counted(self, name):
        read.update((name,))
        return original(self, name)

    monkeypatch.setattr(safetensors_file.SafetensorsFile, "read", counted)
    groups = checkpoint.groups(storages())
    assert list(next(groups)) == ["embed_tokens.weight"] and read.total() == 1
    read.clear()
    next(groups)
    own = small_layout(json.loads((directory / "config.json").read_text()))
    assert read == dict.fromkeys((n for n in own if n.startswith("model.layers.0.")), 1)


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """The tensors that count stand behind a hole of twice the memory and swap."""
    directory, path = tmp_path / "c", tmp_path / "c/model.safetensors"
    make_small(directory)
    expected = parameters(Checkpoint(directory).groups(storages()))
    memory = re.findall(r"(?:MemTotal|SwapTotal): *(\d+) kB", Path("/proc/meminfo").read_text())
    hole = 2048 * sum(map(int, memory))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for entry in header.values():
        entry["data_offsets"] = [hole + offset for offset in entry.get("data_offsets", ())]
    skipped = {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]}
    header = {"model.visual.x": skipped} | {n: e for n, e in header.items() if n != "__metadata__"}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(hole, os.SEEK_CUR)
        file.write(content[8 + length :])
    assert_equal(parameters(Checkpoint(directory).groups(storages())), expected)

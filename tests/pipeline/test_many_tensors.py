"""Checkpoints of very many tensors, such as the official GPTQ one, which has 124611.

The work of opening one grows no faster than their number, and that of reading a layer not at all.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import SMALL, make_small, storages

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

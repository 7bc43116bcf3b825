"""Exports: whole files or none, what ExecuTorch reads of them, and memory."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from checkpoints import spec_of, storages
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from files import file_size_limit, files_of

from et_moe.backends.sealed_file import CHECKSUMS, FINGERPRINT, SCALAR_TYPES
from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline import export as exporter
from et_moe.pipeline.bundle import (
    COPIED_FILES,
    Bundle,
    bundle_config,
    write_bundle,
    write_json,
)
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.make_checkpoint import text_config
from et_moe.pipeline.models import load_config, parse_config
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import storages_from_json

OPTIONS = exporter.ExportOptions(max_seq_len=32)


@pytest.fixture(scope="module")
def lowered(tiny_bundle: Path):
    bundle = Bundle(tiny_bundle)
    return exporter.lower(bundle, OPTIONS)


def test_full_disk_while_exporting(
    tiny_bundle: Path, tiny_program: Path, lowered, tmp_path: Path, monkeypatch
) -> None:
    """Neither file appears half-written, and those of an earlier export stay as they were."""
    written = files_of(tiny_program)
    monkeypatch.setattr(exporter, "lower", lambda *_: lowered)
    sizes = {name: len(data) for name, data in written.items()}
    assert sizes["model.ptd"] > sizes["model.pte"]
    for earlier in ({}, {"model.pte": b"old", "model.ptd": b"old"}):
        for name, data in earlier.items():
            (tmp_path / name).write_bytes(data)
        for limit in (0, 1000, sizes["model.ptd"] - 1):
            with file_size_limit(limit), pytest.raises(OSError) as caught:
                exporter.export(Bundle(tiny_bundle), tmp_path, OPTIONS)
            assert caught.value.errno == errno.EFBIG
            assert files_of(tmp_path) == earlier
    exporter.export(Bundle(tiny_bundle), tmp_path, OPTIONS)
    assert files_of(tmp_path) == written


def test_a_source_that_fails(tiny_bundle: Path, lowered, tmp_path: Path, monkeypatch) -> None:
    """If it fails while a group is written, its error is raised and nothing unfinished is left."""
    monkeypatch.setattr(exporter, "lower", lambda *_: lowered)
    source = Bundle(tiny_bundle)

    class Failing:
        directory, config, storages = tiny_bundle, source.config, source.storages

        def groups(self):
            groups = source.groups()
            yield next(groups)
            yield next(groups)
            raise ConfigError("the third group")

    with pytest.raises(ConfigError, match="the third group"):
        write_bundle(Failing(), tmp_path / "b")
    assert [*files_of(tmp_path / "b")] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2)]
    with pytest.raises(ConfigError, match="the third group"):
        exporter.export(Failing(), tmp_path / "e", OPTIONS)
    assert not (tmp_path / "e").exists()


def test_output_that_cannot_be_written(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exporter, "build_graphs", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), storages(group_size=32))
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(OSError, match=str(path)):
            write_bundle(source, path)
        with pytest.raises(OSError, match=str(path)):
            exporter.export(Bundle(tiny_bundle), path, OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_directory_in_place_of_an_output_file(
    tiny_bundle: Path, lowered, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(exporter, "lower", lambda *_: lowered)
    (tmp_path / "model.ptd").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model\.ptd"):
        exporter.export(Bundle(tiny_bundle), tmp_path, OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["model.ptd"]


def test_the_ptd_is_executorchs(tiny_bundle: Path, tiny_program: Path) -> None:
    """ExecuTorch's own reader finds every tensor, aligned, with its dtype, shape and bytes."""
    data = (tiny_program / "model.ptd").read_bytes()
    payload = FlatTensorSerializer().deserialize(data)
    bundle = Bundle(tiny_bundle)
    tensors = {name: t for group in bundle.groups() for name, t in group.items()}
    spec = spec_of(bundle, torch.float32)
    assert payload.named_data.keys() == {*tensors, FINGERPRINT, CHECKSUMS}
    for name, tensor in tensors.items():
        entry, stored = payload.named_data[name], tensor.to(spec[name][0])
        assert entry.tensor_layout.scalar_type == SCALAR_TYPES[stored.dtype]
        assert tuple(entry.tensor_layout.sizes) == tuple(stored.shape)
        assert list(entry.tensor_layout.dim_order) == list(range(stored.dim()))
        content = payload.buffers[entry.buffer_index]
        assert content == stored.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert data.find(content) >= 0
    checksums = payload.buffers[payload.named_data[CHECKSUMS].buffer_index]
    assert numpy.frombuffer(checksums, "<u8").shape == (len(tensors) + 1,)
    text = payload.buffers[payload.named_data[FINGERPRINT].buffer_index]
    assert bytes(text).decode() == exporter.fingerprint(bundle, OPTIONS)


@pytest.mark.filterwarnings("ignore:.*end-of-sequence id:UserWarning")
@pytest.mark.parametrize("preset", ["tiny", "35b"])
def test_a_preset_and_its_random_bundle_have_one_fingerprint(tmp_path: Path, preset: str) -> None:
    """This lets a program that was exported from a shape alone run with random weights of it."""
    flags = ("4w", 128, "8w")
    program = SimpleNamespace(
        config=parse_config(text_config(MODEL, preset)), storages=storages(*flags)
    )
    write_json(tmp_path / "config.json", text_config(MODEL, preset))
    bundle = bundle_config(tmp_path, storages(*flags))
    write_json(tmp_path / "config.json", bundle)
    weights = SimpleNamespace(
        config=load_config(tmp_path),
        storages=storages_from_json(bundle["et_moe"]["storages"], MODEL.parts),
    )
    cuda = exporter.ExportOptions("cuda", torch.bfloat16, max_seq_len=4608)
    bf16 = dataclasses.replace(cuda, activation_dtype="bf16", max_seq_len=None)
    assert exporter.fingerprint(program, bf16) == exporter.fingerprint(weights, cuda)


def test_fingerprints_tell_models_apart(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    others = [
        (dataclasses.replace(bundle.config, rms_norm_eps=1e-5), bundle.storages, OPTIONS),
        (dataclasses.replace(bundle.config, rope_theta=1e6), bundle.storages, OPTIONS),
        (bundle.config, storages("4w", 64), OPTIONS),
        (bundle.config, bundle.storages, dataclasses.replace(OPTIONS, dtype=torch.bfloat16)),
        (bundle.config, bundle.storages, dataclasses.replace(OPTIONS, backend="cuda")),
    ]
    found = {exporter.fingerprint(bundle, OPTIONS)}
    for config, kinds, options in others:
        target = SimpleNamespace(config=config, storages=kinds)
        found.add(exporter.fingerprint(target, options))
    assert len(found) == 1 + len(others)


def test_exports_are_byte_for_byte_the_same(
    tiny_checkpoint: Path, tiny_program: Path, tmp_path: Path
) -> None:
    """The exports are made from the bundle and from the checkpoint, in processes with different
    hash seeds."""
    command = ["et-moe", "export", "--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "e"]
    command += ["--recipe", "4w", "--qlinear-group-size", "32", "--max-seq-len", "32"]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    written = files_of(tiny_program)
    assert written == files_of(tmp_path / "e")
    copied = [name for name in COPIED_FILES if (tiny_checkpoint / name).exists()]
    assert set(written) == {"model.pte", "model.ptd", *copied}


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Two more wide layers cost less memory than half a layer, in each command."""
    script = Path(__file__).with_name("measure_memory.py")
    # Large tensors go back to the system at once, so that the peak is what is held and not what the
    # allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["layer"] > 60_000_000
    for task in ("calibrate", "quantize", "export"):
        growth = result[task]["4"] - result[task]["2"]
        assert growth < result["layer"] / 2, result
    assert result["export"]["4"] < 6 * result["layer"] + 300_000_000, result


def test_a_tokenizer_that_the_runner_would_refuse(tiny_bundle: Path, tmp_path: Path) -> None:
    """It is refused before anything is lowered or written."""
    bundle, output = tmp_path / "bundle", tmp_path / "program"
    shutil.copytree(tiny_bundle, bundle)
    path = bundle / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFKC"}}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: normalizer\.type: \"NFKC\" not supp"):
        exporter.export(Bundle(bundle), output, OPTIONS)
    assert not output.exists()


@pytest.mark.parametrize(("max_seq_len", "rows"), [(64, 64), (40, 40)])
def test_a_method_that_scores(tiny_bundle: Path, max_seq_len: int, rows: int) -> None:
    """It is `prefill` with a fixed number of rows and the logits of each; the weights are those of
    a program without it."""
    bundle = Bundle(tiny_bundle)
    options = exporter.ExportOptions(max_seq_len=max_seq_len, score=True)
    without = dataclasses.replace(options, score=False)
    graphs, constants = exporter._graphs(bundle, options)
    others, before = exporter._graphs(bundle, without)
    assert set(graphs) - set(others) == {"score"} and graphs["score"].length() == (1, 1)
    assert constants == before | {"get_score_tokens": rows}
    score = graphs["score"]
    assert (score.inputs, score.weights) == (others["prefill"].inputs, others["prefill"].weights)
    assert score.input_nodes()["tokens"].meta["val"].shape == (1, rows)
    found = {name: (v.dtype, tuple(v.shape)) for name, v in score.output_values().items()}
    expected = {"token": (torch.int64, (1, 1)), "logits": (torch.float32, (rows, 264))}
    assert found == expected and score.hand_over is None
    assert exporter.fingerprint(bundle, options) == exporter.fingerprint(bundle, without)

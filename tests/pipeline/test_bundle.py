"""Bundles and exports: what is written, what is refused, and what a failure leaves behind."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import assert_equal, assert_mutations_are_survived, make_small, spec_of, storages
from files import file_size_limit, files_of
from safetensors.torch import load_file, save_file

from et_moe.pipeline.bundle import (
    BUNDLE_VERSION,
    COPIED_FILES,
    Bundle,
    write_bundle,
)
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.locks import sole_writer
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.safetensors_file import SafetensorsFile
from et_moe.pipeline.storage import Precision, Storage

QUANTIZATIONS = [
    storages("4w", 32, "8w"),
    storages("4w", 32, "none"),
    storages("none", 128, "8w"),
    storages("none", 64, "none"),
    storages("none", 32, "4w"),
]


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_a_bundle_reads_back_equal(
    tiny_checkpoint: Path, tmp_path: Path, quantization: dict[str, Storage]
) -> None:
    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), quantization)
    calls = []
    write_bundle(source, tmp_path / "b", lambda: calls.append(1))
    bundle = Bundle(tmp_path / "b")
    assert bundle.storages == quantization and bundle.config == source.config
    assert len(calls) == source.config.num_hidden_layers + 2
    actual, expected = ([dict(sorted(g.items())) for g in s.groups()] for s in (bundle, source))
    assert_equal(actual, expected)
    spec = spec_of(bundle, torch.bfloat16)
    shapes = {name: tuple(t.shape) for group in actual for name, t in group.items()}
    assert shapes == {name: shape for name, (_, shape) in spec.items()}


def test_files_of_a_bundle(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """The checkpoint's tokenizer and config, the format's section, and an index that is right."""
    written = files_of(tiny_bundle)
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    copied = [name for name in COPIED_FILES if (tiny_checkpoint / name).exists()]
    assert {"tokenizer.json", "generation_config.json"} <= set(copied)
    assert set(written) == {*shards, *copied, "config.json", "model.safetensors.index.json"}
    for name in copied:
        assert written[name] == (tiny_checkpoint / name).read_bytes()
    config = json.loads(written["config.json"])
    assert config.pop("et_moe") == {
        "bundle_version": BUNDLE_VERSION,
        "storages": {
            "embedding": {"storage": "int8_per_row"},
            "attention": {"storage": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
            "linear_attention": {"storage": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
            "experts": {"storage": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
            "shared_expert": {"storage": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
            "head": {"storage": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
        },
    }
    assert config == json.loads((tiny_checkpoint / "config.json").read_text())
    index = json.loads(written["model.safetensors.index.json"])
    by_shard = {shard: load_file(tiny_bundle / shard) for shard in shards}
    assert index["weight_map"] == {n: shard for shard, ts in by_shard.items() for n in ts}
    total = sum(t.nbytes for ts in by_shard.values() for t in ts.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize(
    ("values", "weight"),
    [(("4w", 64), r"layers\.0\."), (("none", 64, "4w"), "embed_tokens$")],
)
def test_group_size_that_does_not_divide(tmp_path: Path, values, weight: str) -> None:
    make_small(tmp_path / "c")
    with pytest.raises(
        ConfigError, match=f"group size 64 does not divide the 32 columns of {weight}"
    ):
        QuantizedCheckpoint(Checkpoint(tmp_path / "c"), storages(*values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"qlinear": "3w"}, "qlinear '3w': expected one of "),
        ({"group_size": 48}, "group size 48: expected one of "),
        ({"group_size": 32.0}, "group size 32.0: expected one of "),
        ({"qembedding": "2w"}, "qembedding '2w': expected one of "),
    ],
)
def test_values_of_flags(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storages(**values)


def test_activation_dtype() -> None:
    with pytest.raises(ValueError, match="activation dtype 'fp8': expected one of "):
        Precision(storages(), activation_dtype="fp8")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """The tensor is named, and what was written before it does not look like a bundle."""
    _, tensors = make_small(tmp_path / "c")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][1, 2, 3] = float("nan")
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    source = QuantizedCheckpoint(Checkpoint(tmp_path / "c"), storages("4w", 32))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.w2: the weight has entries"):
        write_bundle(source, tmp_path / "b")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        Bundle(tmp_path / "b")


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def edit_shard(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """An edit that changes the tensors of layer 0."""

    def edit(directory: Path) -> None:
        shard = directory / "model-00002-of-00004.safetensors"
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)

    return edit


def cut_shard(directory: Path) -> None:
    shard = directory / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def section(**values) -> Callable[[Path], None]:
    return edit_config(lambda c: c["et_moe"].update(values))


def storage(part: str, **values) -> Callable[[Path], None]:
    """An edit that gives one part another storage."""
    return edit_config(lambda c: c["et_moe"]["storages"].update({part: values}))


W13 = "layers.0.mlp.experts.w13"
SHARD = "model-00002-of-00004.safetensors"
REFUSED = [
    (edit_config(lambda c: c.pop("et_moe")), ["config.json: no et_moe section"]),
    (edit_config(lambda c: c.update(et_moe=[])), ["config.json: no et_moe section"]),
    (section(bundle_version=1), ["config.json: bundle_version 1, expected 3"]),
    (section(bundle_version=None), ["config.json: bundle_version None, expected 3"]),
    (section(storages=None), ["config.json: et_moe.storages: found None, expected an object"]),
    (section(storages={"head": {}}), ["config.json: et_moe.storages: found ['head'], expected"]),
    (storage("head"), ["et_moe.storages: head.storage is None, expected one of ('int4', "]),
    (storage("head", storage=[]), ["et_moe.storages: head.storage is [], expected one of ("]),
    (storage("head", storage="dense", bits=4), ["et_moe.storages: head has ['bits'], "]),
    (
        storage("head", storage="int4", group_size=32, scale_dtype=["bfloat16"]),
        ["et_moe.storages: head: dtype of scales ['bfloat16']: expected one of"],
    ),
    (
        storage("attention", storage="int4", group_size=32, scale_dtype="float16"),
        [".scale is torch.bfloat16 (", "expected torch.float16 ("],
    ),
    (
        storage("head", storage="int4", group_size=33),
        ["config.json: et_moe.storages: head: group size 33: expected one of"],
    ),
    (
        storage("head", storage="int4", group_size=32.0),
        ["config.json: et_moe.storages: head: group size 32.0: expected one of"],
    ),
    (
        storage("experts", storage="int4", group_size=64),
        ["group size 64 does not divide the 32 columns of layers.0.mlp.experts.w13"],
    ),
    (storage("head", storage="dense"), ["unexpected tensor"]),
    (
        storage("embedding", storage="int4", group_size=64),
        ["group size 64 does not divide the 32 columns of embed_tokens"],
    ),
    (
        storage("embedding", storage="int4", group_size=32),
        ["embed_tokens.weight is torch.int8 (", "expected torch.uint8 ("],
    ),
    (edit_config(lambda c: c.update(hidden_size=64)), [SHARD.replace("2", "1", 1), "expected"]),
    (
        edit_config(lambda c: c.update(hidden_size=2**31 - 32, moe_intermediate_size=2**31 - 32)),
        ["config.json: ", "overflowed"],
    ),
    (edit_shard(lambda t: t.pop(W13)), [f"missing tensor {W13} (1 in all)"]),
    (
        edit_shard(lambda t: t.update(extra=torch.zeros(1))),
        ["unexpected tensor extra (1 in all)"],
    ),
    (
        edit_shard(lambda t: t.update({W13: t[W13][:, :8].contiguous()})),
        [f"{SHARD}: {W13} is torch.uint8 (5, 8, 16), expected torch.uint8 (5, 64, 16)"],
    ),
    (
        edit_shard(lambda t: t.update({W13: t[W13].to(torch.int8)})),
        [f"{SHARD}: {W13} is torch.int8 (5, 64, 16), expected torch.uint8 (5, 64, 16)"],
    ),
    (
        edit_shard(lambda t: t.update({f"{W13}_scale": t[f"{W13}_scale"].to(torch.int32)})),
        [f"{SHARD}: {W13}_scale is torch.int32 (5, 64, 1), expected torch.bfloat16 (5, 64, 1)"],
    ),
    (cut_shard, ["model-00003-of-00004.safetensors: not a valid safetensors file"]),
    (lambda d: (d / SHARD).unlink(), [f"{SHARD}: no such file, named by model.safetensors.index"]),
]


@pytest.mark.parametrize(("damage", "parts"), REFUSED, ids=[p[0][-40:] for _, p in REFUSED])
def test_damaged_bundles(tiny_bundle: Path, tmp_path: Path, damage, parts: list[str]) -> None:
    directory = tmp_path / "b"
    shutil.copytree(tiny_bundle, directory)
    damage(directory)
    with pytest.raises(ConfigError) as caught:
        list(Bundle(directory).groups())
    for part in [str(directory), *parts]:
        assert part in str(caught.value)


def test_mutated_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    directory = tmp_path / "b"
    shutil.copytree(tiny_bundle, directory)
    files = ["config.json", SHARD, "model.safetensors.index.json"]
    assert_mutations_are_survived("bundle", directory, 2000, *files)


def test_an_existing_bundle_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), QUANTIZATIONS[0])
    write_bundle(source, tmp_path / "b")
    before = files_of(tmp_path / "b")
    with pytest.raises(ConfigError, match="b: already holds a config"):
        write_bundle(source, tmp_path / "b")
    assert files_of(tmp_path / "b") == before
    with pytest.raises(ConfigError, match="checkpoint: already holds a config"):
        write_bundle(source, tiny_checkpoint)


def test_full_disk_while_quantizing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Files under a final name are whole, there is no config.json, and a retry completes it."""
    source = QuantizedCheckpoint(Checkpoint(tiny_checkpoint), QUANTIZATIONS[0])
    write_bundle(source, tmp_path / "whole")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "whole").glob("*.safetensors")}
    assert sizes[SHARD] > sizes["model-00001-of-00004.safetensors"]
    with file_size_limit(sizes[SHARD] - 1), pytest.raises(OSError) as caught:
        write_bundle(source, tmp_path / "b")
    assert caught.value.errno == errno.EFBIG
    assert {p.name: p.stat().st_size for p in (tmp_path / "b").iterdir()} == {
        "model-00001-of-00004.safetensors": sizes["model-00001-of-00004.safetensors"]
    }
    write_bundle(source, tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(tmp_path / "whole")


def test_a_flipped_bit_of_a_shard_is_noticed(tiny_bundle: Path, tmp_path: Path) -> None:
    """It is noticed even in INT4 weights, where every value is as good as another."""
    directory = shutil.copytree(tiny_bundle, tmp_path / "b")
    entry = SafetensorsFile(directory / SHARD).entries[W13]
    data = bytearray((directory / SHARD).read_bytes())
    data[entry.begin + 3] ^= 0x10
    (directory / SHARD).write_bytes(data)
    with pytest.raises(ConfigError, match=f"{SHARD}: damaged: checksum mismatch of tensor {W13}"):
        list(Bundle(directory).groups())


def test_a_bundle_without_digests(tiny_bundle: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_bundle, tmp_path / "b")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["metadata"]["xxh3_64"][W13]
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"index\.json: metadata\.xxh3_64 must have a digest of"):
        Bundle(directory)


def test_one_process_writes_to_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A second `quantize` or `export` into it is refused at once, and changes nothing."""
    source, folder = (
        QuantizedCheckpoint(Checkpoint(tiny_checkpoint), QUANTIZATIONS[0]),
        tmp_path / "b",
    )
    commands = {
        "quantize": ["--model-dir", tiny_checkpoint, "--qlinear-group-size", "32"],
        "export": ["--model-dir", tiny_checkpoint, "--qlinear-group-size", "32"],
    }
    with sole_writer(folder, []):
        for command, arguments in commands.items():
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "et_moe.pipeline.cli",
                    command,
                    *arguments,
                    "--output-dir",
                    folder,
                ],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1, done.stderr
            assert f"error: {folder}: another process is writing to this folder" in done.stderr
    assert not folder.exists()
    write_bundle(source, folder)

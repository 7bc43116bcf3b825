"""ExecuTorch's prequantized bundles: its values, by this project's names, or a refusal by key."""

import json
from pathlib import Path

import executorch_bundles as bundles
import pytest
import torch
from checkpoints import assert_mutations_are_survived, make_small, parameters, storages, write
from test_formats_int4 import WIDE, dense, floats

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError, ConfigWarning
from et_moe.pipeline.formats.executorch import hugging_face_names
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Int4

KEPT = Int4(32)
ROWS = {
    "qkv_proj": (128, 32, 32),
    "in_proj": (160, 128, 4, 4),
    "gate_up_proj": (96, 96),
}
"""Of the weights that the script fuses, at the shape of the checkpoint."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    make_small(folder, **WIDE)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory):
    """Makes a bundle of a kind once; returns it and what its weights are worth."""
    cache = {}

    def make(kind: str) -> tuple[Path, dict]:
        if kind not in cache:
            bundle = tmp_path_factory.mktemp("bundle") / kind
            packed: bundles.Packed = []
            if kind.startswith("mlx"):
                bundles.for_mlx(source, bundle, kind == "mlx_symmetric")
            else:
                qlinear, qembedding = KINDS[kind]
                with pytest.MonkeyPatch.context() as patch:
                    packed = bundles.for_cuda(patch, source, bundle, qlinear, qembedding)
            cache[kind] = bundle, bundles.dequantized(bundle, packed)
        return cache[kind]

    return make


KINDS = {
    "4w": ("4w", "8w"),
    "8w": ("8w", None),
    "8da4w": ("8da4w", "8w"),
    "embedding": (None, "8w"),
    "int4_embedding": (None, "4w"),
}


def as_checkpoint(folder: Path, config: dict, weights: dict) -> Checkpoint:
    """The weights as an unquantized checkpoint."""
    tensors = {}
    for name, tensor in weights.items():
        names = hugging_face_names(name)
        if name.endswith((".conv_state", "_rms_weight", ".recurrent_state", ".cache_positions")):
            continue
        if ".kv_cache." in name or name.endswith(".inv_freq"):
            continue
        rows = ROWS.get(name.split(".")[-2], (len(tensor),)) if len(names) > 1 else (len(tensor),)
        for one, part in zip(names, tensor.split(rows), strict=True):
            tensors[one if one == "lm_head.weight" else f"model.{one}"] = part.clone()
    return Checkpoint(write(folder, config, tensors))


def copy(bundle: Path, folder: Path, change) -> Path:
    """A bundle in a folder of its own, changed."""
    folder.mkdir()
    for file in bundle.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    bundles.rewrite(folder, change)
    return folder


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("4w", {"experts"}),
        ("8w", {"experts"}),
        ("8da4w", {"experts", "shared_expert", "attention", "linear_attention", "head"}),
        ("embedding", set()),
        ("int4_embedding", {"embedding"}),
        ("mlx", set()),
        ("mlx_symmetric", {"experts", "shared_expert", "attention", "linear_attention", "head"}),
    ],
)
@pytest.mark.filterwarnings("ignore::et_moe.pipeline.config.ConfigWarning")
def test_every_weight_has_its_value(tmp_path: Path, made, kind: str, kept: set[str]) -> None:
    bundle, weights = made(kind)
    actual = Checkpoint(bundle)
    assert actual.kept == dict.fromkeys(kept, KEPT)
    config = json.loads((bundle / "config.json").read_text())
    source = QuantizedCheckpoint(actual, storages("none", 32, "none"))
    found = floats(source)
    for group in parameters(as_checkpoint(tmp_path, config, weights).groups(source.storages)):
        for name, tensor in group.items():
            assert torch.equal(found.pop(name), tensor.float()), name
    assert all(name.endswith("scale") for name in found)


def test_what_is_dequantized_is_said(tmp_path: Path, made) -> None:
    bundle, _ = made("4w")
    said = (
        r"4w: 14 quantized weights, such as embed_tokens\.weight, are not symmetric INT4 in groups"
    )
    with pytest.warns(ConfigWarning, match=said + ": they are dequantized, and stored as the flag"):
        checkpoint = Checkpoint(bundle)
    source = QuantizedCheckpoint(checkpoint, storages("4w", 64, "8w"))
    assert source.storages["experts"] == KEPT and source.storages["head"] == Int4(64)
    found = floats(source)
    tables = {name for name, tensor in found.items() if ".experts.w" in name}
    assert all(torch.isfinite(found[name]).all() for name in tables) and tables


@pytest.mark.parametrize("kind", ["4w", "8da4w"])
@pytest.mark.filterwarnings("ignore::et_moe.pipeline.config.ConfigWarning")
def test_the_older_form_has_the_same_weights(tmp_path: Path, made, kind: str) -> None:
    bundle, _ = made(kind)
    older = copy(bundle, tmp_path / "older", bundles.make_legacy)
    assert list(bundles.read_header(older / "model.safetensors")) == ["quantization"]
    actual, expected = Checkpoint(older), Checkpoint(bundle)
    assert actual.kept == expected.kept
    found = dense(actual)
    assert all(torch.equal(found[name], tensor) for name, tensor in dense(expected).items())


def _cut(*names: str):
    def change(tensors, metadata) -> None:
        for name in names:
            tensors.pop(name)

    return change


def _put(name: str, make):
    return lambda tensors, metadata: tensors.update({name: make(tensors[name])})


def _nine(values: torch.Tensor) -> torch.Tensor:
    values[0, 0] = 9
    return values


def _describe(name: str, **changes):
    """Changes what the header says of a weight."""

    def change(tensors, metadata) -> None:
        described = json.loads(metadata[name])
        for key, value in changes.items():
            where = described if key.startswith("_") else described["_data"]
            where[key] = value
        metadata[name] = json.dumps(described)

    return change


def _names(text: str):
    return lambda tensors, metadata: metadata.update(tensor_names=text)


def _without_qkv(tensors, metadata) -> None:
    name = "layers.1.attn.qkv_proj"
    names = [n for n in json.loads(metadata["tensor_names"]) if n != f"{name}.weight"]
    metadata["tensor_names"] = json.dumps(names)
    _cut(*[n for n in tensors if n.startswith(name)])(tensors, metadata)


HEADER = r"model\.safetensors: metadata of the header: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _cut("lm_head._weight_scale"),
            HEADER + r"lm_head\.weight .* no tensor lm_head\._weight_sc",
        ),
        (
            _cut("layers.0.mlp.experts.w1_scale"),
            r"model\.safetensors: .*w1 has no .*w1_scale beside",
        ),
        (_cut("layers.0.ln_1.weight"), r"missing tensors: layers\.0\.ln_1\.weight"),
        (_without_qkv, r"missing tensors: layers\.1\.attn\.qkv_proj\.weight$"),
        (
            lambda tensors, metadata: tensors.update({"layers.0.attn.bias": torch.ones(3)}),
            r"unexpected tensors: layers\.0\.attn\.bias",
        ),
        (
            _put("lm_head._weight_qdata", lambda t: t.view(torch.uint8)),
            r"lm_head\._weight_qdata has dtype U8, expected one of \['I8'\]",
        ),
        (
            _put("layers.1.attn.qkv_proj._weight_qdata", lambda t: t[:-1]),
            r"qkv_proj\._weight_qdata has shape \(191, 64\), config\.json asks \(192, 64\)",
        ),
        (
            _put("layers.1.attn.o_proj._weight_qdata", _nine),
            r"model\.safetensors: .*\.attn\.o_proj\._weight_qdata has values that are not of 4",
        ),
        (
            _put("layers.0.mlp.experts.w2_scale", lambda t: t.float()),
            r"w2_scale has 2 scales a row for 64 columns, .* F32; expected groups of \(32, 64, 128",
        ),
        (_names("{"), HEADER + "tensor_names is not JSON"),
        (_names("{}"), HEADER + "tensor_names is {}, expected a JSON list"),
        (_names('["lm_head.bias"]'), HEADER + "tensor_names names 'lm_head.bias', of which the"),
        (
            _describe("lm_head.weight", _type="Float8Tensor"),
            HEADER + "lm_head.weight is a Float8Te",
        ),
        (_describe("lm_head.weight", _data=3), HEADER + "lm_head.weight has no _type with _data"),
        (
            _describe("lm_head.weight", block_size=[2, 32]),
            HEADER + r"lm_head.weight has block_size \[2, 32\], expected \[1, columns\]",
        ),
        (
            _describe("lm_head.weight", block_size=[1, 48]),
            HEADER + "lm_head.weight has block_size 48, which does not divide 64 columns",
        ),
        (
            _describe("lm_head.weight", _tensor_data_names=["qdata", "act_pre_scale"]),
            HEADER + "lm_head.weight has scales of activations: use the bf16 checkpoint",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::et_moe.pipeline.config.ConfigWarning")
def test_damage_is_refused_by_key(tmp_path: Path, made, change, message: str) -> None:
    damaged = copy(made("8da4w")[0], tmp_path / "damaged", change)
    with pytest.raises(ConfigError, match=message) as caught:
        list(QuantizedCheckpoint(Checkpoint(damaged), storages("4w", 32)).groups())
    assert str(damaged) in str(caught.value)


def test_random_damage_is_survived(tmp_path: Path, made) -> None:
    bundle = copy(made("8da4w")[0], tmp_path / "bundle", lambda tensors, metadata: None)
    assert_mutations_are_survived("checkpoint", bundle, 60, "model.safetensors")

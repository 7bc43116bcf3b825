"""Checkpoints with INT4 weights: values and scales are kept as they are, or refused."""

import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    COMPRESSED_TENSORS,
    GPTQ,
    make_small,
    storages,
    to_compressed_tensors,
    to_gptq,
    write,
)

from et_moe.backends import ops
from et_moe.pipeline.bundle import Bundle, write_bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError, ConfigWarning
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import Dense, Int4, Int8PerRow

WIDE = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "linear_value_head_dim": 32,
}
"""Two groups of 32 in every row, and a shared expert that fills one and a half slots."""

ROUTED = tuple(f"experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down"))
SHARED = tuple(f"shared_expert.{p}_proj.weight" for p in ("gate", "up", "down"))
ATTENTION = tuple(f"self_attn.{p}_proj.weight" for p in "qkvo")
LINEAR = ("in_proj_qkv.weight", "in_proj_z.weight", "out_proj.weight")
FORMATS = {
    "gptq": (to_gptq, GPTQ, "float16"),
    "compressed-tensors": (to_compressed_tensors, COMPRESSED_TENSORS, "bfloat16"),
}


def quantized(tmp_path: Path, kind: str, names: tuple[str, ...]) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint with INT4 weights, and the same as floats."""
    make, section, _ = FORMATS[kind]
    config, tensors = make_small(tmp_path / "small", **WIDE)
    stored, meant = make(tensors, names)
    actual = write(tmp_path / "quantized", config | {"quantization_config": section}, stored)
    return Checkpoint(actual), Checkpoint(write(tmp_path / "float", config, meant))


def floats(source: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    """The float32 values that the bundle of a source stands for."""
    tensors = {name: tensor for group in source.groups() for name, tensor in group.items()}
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{module}.scale" if leaf == "weight" else f"{name}_scale")
        if tensor.dtype == torch.uint8:
            group_size = 2 * tensor.shape[-1] // scale.shape[-1]
            found[name] = ops.dequantize_w4(tensor, scale, group_size)
        else:
            found[name] = tensor.float()
    return found


def dense(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return floats(QuantizedCheckpoint(checkpoint, storages("none", 32, "none")))


@pytest.mark.parametrize("qlinear", ["4w", "none"])
@pytest.mark.parametrize("kind", FORMATS)
def test_values_and_scales_are_kept_whatever_the_flags(
    tmp_path: Path, kind: str, qlinear: str
) -> None:
    actual, expected = quantized(tmp_path, kind, ROUTED + SHARED + ATTENTION)
    kept = Int4(32, FORMATS[kind][2])
    assert actual.kept == {"experts": kept, "shared_expert": kept, "attention": kept}
    source = QuantizedCheckpoint(actual, storages(qlinear, 64, "none"))
    chosen = storages(qlinear, 64)["head"]
    assert source.storages == {
        "embedding": Dense(),
        "experts": kept,
        "shared_expert": kept,
        "attention": kept,
        "linear_attention": chosen,
        "head": chosen,
    }
    meant, found = dense(expected), floats(source)
    assert list(meant) == [name for name in found if not name.endswith("scale")]
    for name in ("0.mlp.experts.w13", "0.mlp.experts.w2", "1.mlp.experts.w13", "1.mlp.experts.w2"):
        assert torch.equal(found[f"layers.{name}"], meant[f"layers.{name}"])
    for name in ("qkv_proj", "o_proj"):
        name = f"layers.1.self_attn.{name}.weight"
        assert torch.equal(found[name], meant[name])
    same = torch.equal(found["lm_head.weight"], meant["lm_head.weight"])
    assert same == (qlinear == "none")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_embedding_and_the_head_that_is_tied_to_it(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    """Both are the weight that arrives, whatever the flags."""
    make, section, scale_dtype = FORMATS[kind]
    config, tensors = make_small(tmp_path / "small", **WIDE)
    if tied:
        del tensors["lm_head.weight"]
    stored, meant = make(tensors, ("embed_tokens.weight",))
    config = config | {"tie_word_embeddings": tied, "quantization_config": section}
    checkpoint = Checkpoint(write(tmp_path / "quantized", config, stored))
    kept = Int4(32, scale_dtype)
    parts = {"embedding", "head"} if tied else {"embedding"}
    assert checkpoint.kept == dict.fromkeys(parts, kept)
    source = QuantizedCheckpoint(checkpoint, storages("8w", 64, "8w"))
    assert source.storages["embedding"] == kept
    assert source.storages["head"] == (kept if tied else Int8PerRow())
    found = floats(source)
    table = meant["model.embed_tokens.weight"]
    assert torch.equal(found["embed_tokens.weight"], table)
    assert torch.equal(found["lm_head.weight"], table) == tied


def test_float16_scales_are_not_rounded(tmp_path: Path) -> None:
    """Most scales of a GPTQ checkpoint are not bfloat16, so the test above would show rounding."""
    actual, _ = quantized(tmp_path, "gptq", ROUTED)
    source = QuantizedCheckpoint(actual, storages("4w", 32))
    groups = [g for g in source.groups() if "layers.0.mlp.experts.w13_scale" in g]
    scale = groups[0]["layers.0.mlp.experts.w13_scale"][:3]
    assert scale.dtype == torch.float16
    assert (scale.bfloat16().float() != scale.float()).float().mean() > 0.5


@pytest.mark.parametrize("kind", FORMATS)
def test_dense_weights_of_a_part_join_the_others(tmp_path: Path, kind: str) -> None:
    """The projections of linear attention are quantized, except for those of the gates."""
    actual, expected = quantized(tmp_path, kind, LINEAR)
    said = (
        "linear_attention arrives quantized, but for model.layers.0.lin.* and 1 more .* become INT4"
    )
    with pytest.warns(ConfigWarning, match=said):
        found = floats(QuantizedCheckpoint(actual, storages("none", 32, "none")))
    meant = dense(expected)
    name, rows = "layers.0.linear_attn.in_proj.weight", -8
    assert torch.equal(found[name][:rows], meant[name][:rows])
    assert not torch.equal(found[name][rows:], meant[name][rows:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuantizedCheckpoint(actual, storages("4w", 32))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_shared_expert_beside_quantized_experts(tmp_path: Path, kind: str) -> None:
    """The routed experts alone are quantized, as in Qwen's checkpoints. The shared one follows the
    flags; as INT4 it joins the tables, with the groups and the scales that they have."""
    actual, expected = quantized(tmp_path, kind, ROUTED)
    meant = dense(expected)
    source = QuantizedCheckpoint(actual, storages("4w", 64, "none"))
    assert source.storages["shared_expert"] == source.storages["experts"] == actual.kept["experts"]
    joined = floats(source)
    for name in ("layers.0.mlp.experts.w13", "layers.0.mlp.experts.w2"):
        assert torch.equal(joined[name][:3], meant[name][:3])
        error = (joined[name] - meant[name]).norm() / meant[name][3:].norm()
        assert 0.01 < error < 0.2
    apart = floats(QuantizedCheckpoint(actual, storages("none", 32, "none")))
    assert torch.equal(apart["layers.0.mlp.experts.w13"], meant["layers.0.mlp.experts.w13"][:3])
    down = apart["layers.0.mlp.shared_expert.down_proj.weight"]
    assert torch.equal(down[:, :64], meant["layers.0.mlp.experts.w2"][3])
    assert torch.equal(down[:, 64:], meant["layers.0.mlp.experts.w2"][4, :, :32])
    gate_up = apart["layers.0.mlp.shared_expert.gate_up_proj.weight"]
    gate, up = meant["layers.0.mlp.experts.w13"][3:].unflatten(1, (2, 64)).transpose(0, 1)
    assert torch.equal(gate_up, torch.cat((gate.flatten(0, 1)[:96], up.flatten(0, 1)[:96])))


def test_weights_that_no_storage_keeps_become_floats(tmp_path: Path) -> None:
    """A router is such a weight; float32 holds its products of value and scale exactly."""
    config, tensors = make_small(tmp_path / "small", num_experts=8)
    stored, meant = to_gptq(tensors, ("mlp.gate.weight",))
    directory = write(tmp_path / "q", config | {"quantization_config": GPTQ}, stored)
    actual, expected = Checkpoint(directory), Checkpoint(write(tmp_path / "f", config, meant))
    assert actual.kept == {}
    found, want = dense(actual), dense(expected)
    assert torch.equal(found["layers.0.mlp.gate.weight"], want["layers.0.mlp.gate.weight"])


def test_a_bundle_keeps_the_dtype_of_scales(tmp_path: Path) -> None:
    actual, _ = quantized(tmp_path, "gptq", ROUTED)
    source = QuantizedCheckpoint(actual, storages("4w", 32))
    write_bundle(source, tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.storages == source.storages
    assert bundle.storages["experts"].scale_dtype == "float16"
    for group, other in zip(bundle.groups(), source.groups(), strict=True):
        for name, tensor in group.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])


def test_version_2_of_gptq_and_auto_round(tmp_path: Path) -> None:
    config, tensors = make_small(tmp_path / "small", **WIDE)
    expected = None
    auto_round = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    for section, version in (
        (GPTQ | {"checkpoint_format": "gptq"}, 1),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, 2),
        ({"bits": 4, "sym": True} | auto_round, 1),
    ):
        stored, _ = to_gptq(tensors, ROUTED, version=version)
        directory = write(tmp_path / "c", config | {"quantization_config": section}, stored)
        found = floats(QuantizedCheckpoint(Checkpoint(directory), storages("4w", 32)))
        expected = expected or found
        assert all(torch.equal(found[name], expected[name]) for name in expected)


UP = "model.layers.1.mlp.experts.2.up_proj"
I32 = torch.int32


def _cut(name: str):
    return lambda tensors: tensors.pop(name)


def _put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


def _wide_groups(tensors) -> None:
    tensors[f"{UP}.scales"] = torch.ones(1, 64).half()
    tensors[f"{UP}.qzeros"] = torch.full((1, 8), 0x77777777, dtype=I32)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ({"bits": 8}, None, r"config\.json: quantization_config\.bits is 8; of GPTQ only 4"),
        (
            {"sym": False},
            None,
            r"quantization_config\.sym is False; of GPTQ only True is supported",
        ),
        ({"checkpoint_format": "marlin"}, None, r"checkpoint_format is 'marlin'; of GPTQ only"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round"},
            None,
            r"packing_format is 'auto_round'; of AutoRound only 'auto_round:auto_gptq'",
        ),
        (
            {},
            _put(f"{UP}.g_idx", torch.arange(64, dtype=I32) % 2),
            rf"model\.safetensors: {UP}\.g_idx permutes the columns .*: use the bf16 checkpoint",
        ),
        (
            {},
            _put(f"{UP}.qzeros", torch.full((2, 8), 0x77777767, dtype=I32)),
            rf"{UP}\.qzeros has zeros other than 8 \(asymmetric weights\): use the bf16",
        ),
        ({"checkpoint_format": "gptq_v2"}, None, r"\.gate_proj\.qzeros has zeros other than"),
        (
            {},
            _put(f"{UP}.qweight", torch.zeros(16, 64, dtype=I32)),
            rf"{UP}\.qweight has 8 bits a weight, 4 are supported: use the bf16 checkpoint",
        ),
        (
            {},
            _put(f"{UP}.scales", torch.ones(2, 64)),
            rf"{UP}\.scales has dtype F32, expected one of \['BF16', 'F16'\]",
        ),
        ({}, _put(f"{UP}.scales", torch.ones(4, 64).half()), rf"{UP}\.scales has 4 groups for 64"),
        ({}, _wide_groups, r"weights of experts differ: .*32.*, layers.*up_proj.weight is .*64"),
        ({}, _cut(f"{UP}.scales"), rf"{UP}\.qweight has no scales beside it"),
        ({}, _cut(f"{UP}.qzeros"), r"missing tensors: layers\.1\.mlp\.experts\.2\.up_proj\.qzeros"),
        ({}, _put(f"{UP}.bias", torch.ones(64)), rf"unexpected tensors: {UP}\.bias"),
        (
            {},
            _put(f"{UP}.scales", torch.full((2, 64), float("inf")).half()),
            r"layers\.1\.mlp\.experts\.w13: the weight has scales that are not finite",
        ),
    ],
)
def test_gptq_is_refused_by_name(tmp_path: Path, section: dict, change, message: str) -> None:
    config, tensors = make_small(tmp_path / "small", **WIDE)
    stored, _ = to_gptq(tensors, ROUTED)
    if change is not None:
        change(stored)
    directory = write(tmp_path / "c", config | {"quantization_config": GPTQ | section}, stored)
    with pytest.raises(ConfigError, match=message) as caught:
        list(QuantizedCheckpoint(Checkpoint(directory), storages("4w", 32)).groups())
    assert str(directory) in str(caught.value)


def test_a_gate_that_is_not_quantized_beside_its_up(tmp_path: Path) -> None:
    """The two are stored in one table, where floats must not be taken for INT4 values."""
    config, tensors = make_small(tmp_path / "small", **WIDE)
    stored, _ = to_gptq(tensors, tuple(n for n in ROUTED if n != "experts.1.gate_proj.weight"))
    directory = write(tmp_path / "c", config | {"quantization_config": GPTQ}, stored)
    with pytest.raises(ConfigError, match=r"experts\.1\.up_proj\.weight: .*not both quantized"):
        list(QuantizedCheckpoint(Checkpoint(directory), storages("4w", 32)).groups())


WEIGHTS = COMPRESSED_TENSORS["config_groups"]["group_0"]["weights"]


def _groups(**changes) -> dict:
    return {"config_groups": {"group_0": {"weights": WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (_groups(num_bits=8), None, r"num_bits is 8; of compressed-tensors \(group_0\) only 4"),
        (_groups(symmetric=False), None, r"symmetric is False; of compressed-tensors \(group_0\)"),
        (
            {"format": "nvfp4-pack-quantized"},
            None,
            r"format is 'nvfp4-pack-quantized'; of compressed-tensors only 'pack-quantized'",
        ),
        ({"config_groups": {"g": {}}}, None, r"config_groups\.g\.weights is None, expected an obj"),
        (
            {},
            _put(f"{UP}.weight_zero_point", torch.zeros(8, 2, dtype=I32)),
            rf"model\.safetensors: {UP}\.weight_zero_point makes the weights asymmetric: use the",
        ),
        (
            {},
            _put(f"{UP}.weight_g_idx", torch.arange(64, dtype=I32) % 2),
            rf"{UP}\.weight_g_idx permutes the columns",
        ),
        (
            {},
            _put(f"{UP}.weight_shape", torch.tensor([64, 60])),
            rf"{UP}\.weight_shape is not \[64, 64\], the shape of the values",
        ),
        (
            {},
            _put(f"{UP}.weight_packed", torch.zeros(32, 8, dtype=I32)),
            rf"{UP}\.weight_packed has shape \(32, 8\), config\.json asks \(64, 8\)",
        ),
    ],
)
def test_compressed_tensors_is_refused_by_name(
    tmp_path: Path, section: dict, change, message: str
) -> None:
    config, tensors = make_small(tmp_path / "small", **WIDE)
    stored, _ = to_compressed_tensors(tensors, ROUTED)
    if change is not None:
        change(stored)
    section = {"quantization_config": COMPRESSED_TENSORS | section}
    directory = write(tmp_path / "c", config | section, stored)
    with pytest.raises(ConfigError, match=message) as caught:
        list(QuantizedCheckpoint(Checkpoint(directory), storages("4w", 32)).groups())
    assert str(directory) in str(caught.value)

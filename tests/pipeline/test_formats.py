"""Checkpoint formats: what is stored, and what is read from it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import FP8, assert_equal, make_small, parameters, storages, to_fp8, write

from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.quantize import QuantizedCheckpoint


def test_block_fp8_is_the_product(tmp_path: Path) -> None:
    """Some numbers of rows or columns are not divided by the block's, such as 40 by 32."""
    config, tensors = make_small(tmp_path / "small")
    stored, meant = to_fp8(tensors)
    section = {"quantization_config": FP8}
    actual = Checkpoint(write(tmp_path / "fp8", config | section, stored))
    expected = Checkpoint(write(tmp_path / "float", config, meant))
    assert any(t.dtype == torch.float8_e4m3fn for t in stored.values())
    assert_equal(parameters(actual.groups(storages())), parameters(expected.groups(storages())))
    for group in QuantizedCheckpoint(actual, storages(group_size=32)).groups():
        assert all(torch.isfinite(t).all() for t in group.values() if t.is_floating_point())


def test_a_quantization_config_over_unquantized_tensors(tmp_path: Path) -> None:
    config, tensors = make_small(tmp_path / "small")
    for section in (FP8, {"quant_method": "gptq"}, "x"):
        directory = write(tmp_path / "c", config | {"quantization_config": section}, tensors)
        assert_equal(
            parameters(Checkpoint(directory).groups(storages())),
            parameters(Checkpoint(tmp_path / "small").groups(storages())),
        )


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            FP8 | {"weight_block_size": None},
            {},
            r"config\.json: quantization_config\.weight_block_size is None, expected two sizes",
        ),
        (FP8 | {"weight_block_size": [0, 16]}, {}, r"weight_block_size is \[0, 16\], expected"),
        (FP8, {f"{Q_PROJ}_scale_inv": torch.ones(2, 2)}, r"_scale_inv has shape \(2, 2\), config"),
        (FP8, {Q_PROJ: torch.zeros(128, 32)}, r"q_proj\.weight has dtype F32, expected one of"),
        (
            {"quant_method": "awq"},
            {"model.layers.1.self_attn.q_proj.qweight": torch.zeros(4, 128, dtype=torch.int32)},
            r"config\.json: the weights are quantized by awq \(layers.*qweight\), .*use the bf16",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            {"model.layers.1.self_attn.q_proj.weight_scale": torch.zeros(4)},
            r"the weights are quantized by compressed-tensors \(layers.*weight_scale\)",
        ),
        (
            {"quant_method": "mxfp4"},
            {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(4, dtype=torch.uint8)},
            r"the weights are quantized by mxfp4 \(layers.*gate_up_proj_blocks\), .*INT4 by GPTQ",
        ),
        (
            {"quant_method": "bitsandbytes"},
            {"model.layers.1.self_attn.q_proj.weight.absmax": torch.zeros(4)},
            r"the weights are quantized by bitsandbytes \(layers.*absmax\)",
        ),
        (
            None,
            {"layers.1.attn.o_proj._weight_qdata": torch.zeros(4, dtype=torch.int8)},
            r"the weights are quantized \(layers\.1\.attn\.o_proj\._weight_qdata\), .*use the bf16",
        ),
        (None, {"x.absmax": torch.zeros(4)}, r"the weights are quantized \(x\.absmax\), which"),
    ],
)
def test_refused(tmp_path: Path, section: dict | None, change: dict, message: str) -> None:
    config, tensors = make_small(tmp_path / "small")
    if section is not None:
        config = config | {"quantization_config": section}
    if section is not None and section["quant_method"] == "fp8":
        tensors = to_fp8(tensors)[0]
    directory = write(tmp_path / "c", config, tensors | change)
    with pytest.raises(ConfigError, match=message) as caught:
        Checkpoint(directory)
    assert str(directory) in str(caught.value)
    assert json.loads((directory / "config.json").read_text()) == config

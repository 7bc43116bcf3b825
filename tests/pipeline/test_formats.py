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


QUANTIZED = {
    "awq": ("awq", {"qweight": torch.int32, "qzeros": torch.int32}),
    "float-quantized": ("compressed-tensors", {"weight_scale": torch.float32}),
    "MXFP4": ("mxfp4", {"gate_up_proj_blocks": torch.uint8}),
    "bitsandbytes 4-bit": ("bitsandbytes", {"weight.absmax": torch.float32}),
    "bitsandbytes 8-bit": (
        "bitsandbytes",
        {"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8},
    ),
    "HQQ": ("hqq", {"W_q": torch.uint8, "scale": torch.float16, "zero": torch.float16}),
    "EXL3": ("exl3", {"trellis": torch.int16, "suh": torch.float16, "svh": torch.float16}),
    "EXL2": ("exl2", {"q_weight": torch.int32, "q_scale": torch.int32}),
    "AQLM": ("aqlm", {"codes": torch.int8, "codebooks": torch.float16}),
    "Quanto": ("quanto", {"weight._data": torch.int8, "weight._scale": torch.float32}),
    "NVFP4": (
        "modelopt",
        {"weight": torch.uint8, "weight_scale": torch.uint8, "weight_scale_2": torch.float32},
    ),
    "ExecuTorch": ("", {"_weight_qdata": torch.int8}),
    "other": ("new", {"indices": torch.int16, "centroids": torch.float16}),
}
"""What is quantized -> its `quant_method`, and the tensors of a module in place of its weight."""


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_methods_that_are_not_supported(tmp_path: Path, kind: str, said: bool) -> None:
    """Method, file and tensor are named, and what to use instead, with the method in the
    configuration or without; what nothing tells is unexpected."""
    method, parts = QUANTIZED[kind]
    config, tensors = make_small(tmp_path / "small")
    module = Q_PROJ.removesuffix(".weight")
    del tensors[Q_PROJ]
    tensors |= {f"{module}.{part}": torch.zeros(4, dtype=dtype) for part, dtype in parts.items()}
    if said:
        config["quantization_config"] = {"quant_method": method} if method else "x"
    directory = write(tmp_path / "c", config, tensors)
    with pytest.raises(ConfigError) as caught:
        Checkpoint(directory)
    message = str(caught.value)
    if kind == "other" and not said:
        assert "unexpected tensors: " in message
        return
    names = {"awq": "AWQ", "NVFP4": "NVFP4", "float-quantized": ""}
    by = method if said and method else names.get(kind, kind.split()[0])
    assert message.startswith(f"{directory / 'model.safetensors'}: {module}.")
    assert "is of weights quantized" in message and by in message
    assert message.endswith(
        "not supported: use the bf16 checkpoint, the block-wise FP8 one, or symmetric INT4 by GPTQ "
        "or compressed-tensors"
    )
    assert "\n" not in message

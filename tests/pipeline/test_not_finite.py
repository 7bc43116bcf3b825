"""Entries that are not finite are found while a checkpoint is read, in every kind of tensor."""

import re
from pathlib import Path

import pytest
from checkpoints import (
    COMPRESSED_TENSORS,
    FP8,
    GPTQ,
    SMALL,
    make_small,
    per_expert,
    storages,
    to_compressed_tensors,
    to_fp8,
    to_gptq,
    write,
)

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.make_checkpoint import tensor_shapes, text_config
from et_moe.pipeline.quantize import QuantizedCheckpoint

WITH_HEAD = {"mtp_num_hidden_layers": 1}
NAMES = list(tensor_shapes(MODEL, text_config(MODEL, "tiny", None, SMALL | WITH_HEAD), "model."))
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "-infinity": float("-inf")}
PARTS = ("4w", "8w", "none")

PLACES = {
    "in_proj_": "linear_attn.in_proj.weight",
    "q_proj": "self_attn.qkv_proj.weight",
    "k_proj": "self_attn.qkv_proj.weight",
    "v_proj": "self_attn.qkv_proj.weight",
    "mlp.gate.": "mlp.gate.weight",
    "shared_expert_gate": "mlp.gate.weight",
    "experts.gate_up_proj": "mlp.experts.w13",
    "experts.down_proj": "mlp.experts.w2",
    "shared_expert.": "mlp.",
    "mtp.fc": "mtp.fc",
}
"""What names of tensors have in them -> what the parameter that is made of them is called."""


def parameter(name: str) -> str:
    """What a message must hold about a tensor of a checkpoint: its parameter, or where it is."""
    name = name.removeprefix("model.")
    found = next((place for part, place in PLACES.items() if part in name), None)
    layer = re.match(r"(mtp\.)?layers\.\d+\.", name)
    return name if found is None else (layer.group() if layer else "") + found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Config and tensors of a small checkpoint with an MTP head."""
    return make_small(tmp_path_factory.mktemp("small") / "checkpoint", **WITH_HEAD)


def message_of(directory: Path, qlinear: str) -> str:
    """What is said while a checkpoint is quantized that must not be."""
    chosen = storages(qlinear, 32, "none" if qlinear == "none" else "8w")
    with pytest.raises(ConfigError) as caught:
        list(QuantizedCheckpoint(Checkpoint(directory), chosen).groups())
    assert str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("qlinear", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor(small, tmp_path: Path, name: str, qlinear: str) -> None:
    config, tensors = small
    for value in VALUES.values():
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] = value
        directory = write(tmp_path / "c", config, tensors | {name: damaged})
        said = message_of(directory, qlinear)
        assert parameter(name) in said and "has entries that are not finite" in said


@pytest.mark.parametrize("qlinear", PARTS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_experts_apart(small, tmp_path: Path, value: float, qlinear: str) -> None:
    config, tensors = small
    apart = per_expert(tensors)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    apart[name] = apart[name].clone()
    apart[name][3, 5] = value
    said = message_of(write(tmp_path / "c", config, apart), qlinear)
    assert "layers.1.mlp.experts.w13: the weight has entries that are not finite" in said


ROUTED = tuple(f"experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down"))
FORMATS = {
    "gptq": (lambda tensors: to_gptq(tensors, ROUTED), GPTQ, "scales"),
    "compressed-tensors": (
        lambda tensors: to_compressed_tensors(tensors, ROUTED),
        COMPRESSED_TENSORS,
        "weight_scale",
    ),
    "fp8 scales": (to_fp8, FP8, "weight_scale_inv"),
    "fp8 values": (to_fp8, FP8, "weight"),
}
"""How a checkpoint is stored, its `quantization_config`, and the tensor that is damaged."""


@pytest.mark.parametrize(
    ("kind", "value"),
    [(k, v) for k in FORMATS for v in ("NaN", "infinity") if (k, v) != ("fp8 values", "infinity")],
)
def test_weights_that_arrive_quantized(small, tmp_path: Path, kind: str, value: str) -> None:
    """FP8 has no infinity."""
    make, section, suffix = FORMATS[kind]
    config, tensors = small
    stored, _ = make(tensors)
    name = f"model.layers.1.mlp.experts.2.up_proj.{suffix}"
    stored[name] = stored[name].clone()
    stored[name][0, 0] = VALUES[value]
    directory = write(tmp_path / "c", config | {"quantization_config": section}, stored)
    for qlinear in PARTS:
        said = message_of(directory, qlinear)
        assert "layers.1.mlp.experts.w13: the weight has " in said and "not finite" in said

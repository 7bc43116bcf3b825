"""Small checkpoints in every form that the reader takes, made from one set of tensors."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from mutations import fuzz_count
from safetensors.torch import load_file, save_file
from torch import Tensor

from et_moe.examples.qwen3_5_moe.model import MODEL
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.make_checkpoint import make_checkpoint
from et_moe.pipeline.quantize import (
    QuantizedCheckpoint,
    Spec,
    WeightSource,
    meta_graph,
    parameter_spec,
)
from et_moe.pipeline.storage import Precision, Storage, choose_storages

Tensors = dict[str, Tensor]

# A layer of each kind, dimensions that all differ and that a group size of 32 divides.
SMALL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 24,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "max_position_embeddings": 64,
    "layer_types": ["linear_attention", "full_attention"],
}

# The same with the smallest sizes that the CUDA kernels take; the hidden size is the smallest for
# which linear layers of one token are computed in one launch.
SMALL_FOR_CUDA = {
    "vocab_size": 264,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention"],
}


def storages(
    qlinear: str = "4w", group_size: int = 128, qembedding: str = "8w"
) -> dict[str, Storage]:
    """How the parts of Qwen3.5 are stored with these flags of the command line."""
    return choose_storages(MODEL.parts, qlinear, group_size, qembedding)


def spec_of(source: WeightSource, dtype: torch.dtype) -> Spec:
    """Name, dtype and shape of every parameter of a source's model."""
    return parameter_spec(meta_graph(source.config, Precision(source.storages, dtype=dtype)))


def make_small(directory: Path, **overrides) -> tuple[dict, Tensors]:
    """Writes a checkpoint of shape SMALL as one file; returns its config and tensors."""
    make_checkpoint(directory, MODEL, "tiny", seed=1, overrides=SMALL | overrides)
    (directory / "model.safetensors.index.json").unlink()
    tensors = load_file(directory / "model-00001-of-00001.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (directory / "model-00001-of-00001.safetensors").rename(directory / "model.safetensors")
    return json.loads((directory / "config.json").read_text()), tensors


def change_config(directory: Path, **values: object) -> None:
    """Sets keys of a checkpoint's or bundle's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def export_small(
    folder: Path,
    context: int,
    max_sequences: int,
    eos_token_id: list[int] | None = None,
    **options: object,
) -> Path:
    """The CPU program of a small model, quantized as `tiny_bundle` is, with such a context.

    Args:
        eos_token_id: instead of the model's own. options: further ones of the export.
    """
    checkpoint, program = folder / "checkpoint", folder / "program"
    make_small(checkpoint, max_position_embeddings=context)
    if eos_token_id is not None:
        generation = {"eos_token_id": eos_token_id}
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    source = QuantizedCheckpoint(Checkpoint(checkpoint), storages("4w", 32, "8w"))
    sizes = {"max_seq_len": context, "max_sequences": max_sequences}
    export(source, program, ExportOptions(**sizes, **options))
    return program


def write(directory: Path, config: Mapping, *shards: Tensors) -> Path:
    """Writes config.json and one safetensors file, or several with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else None
        contiguous = {n: t.contiguous() for n, t in tensors.items()}
        save_file(contiguous, directory / (name or "model.safetensors"))
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def per_expert(tensors: Mapping[str, Tensor]) -> Tensors:
    """The same model with a gate, an up and a down projection per expert."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                split[f"{base}.{e}.gate_proj.weight"] = gate.clone()
                split[f"{base}.{e}.up_proj.weight"] = up.clone()
        elif kind == "down_proj" and base.endswith("experts"):
            for e, rows in enumerate(tensor):
                split[f"{base}.{e}.down_proj.weight"] = rows.clone()
        else:
            split[name] = tensor
    return split


def _eight_in_an_int32(values: Tensor) -> Tensor:
    """Packs values 0..15 of shape `[..., K]` into int32 `[..., K/8]`, the first in the lowest
    nibble."""
    eight = values.long().unflatten(-1, (-1, 8))
    words = sum(eight[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def int4_values(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight as values -8..7 `[N, K]` and scales `[N, K/group_size]`, which are not those that
    this project would choose."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / 7.3).to(dtype)
    values = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    return values.flatten(-2).int(), scale


def _product(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale.float().repeat_interleave(values.shape[1] // scale.shape[1], 1)


def to_gptq(
    tensors: Tensors, quantized: tuple[str, ...], group_size: int = 32, version: int = 1
) -> tuple[Tensors, Tensors]:
    """The weights whose names end with `quantized` as GPTQ stores them, one expert at a time, among
    the other tensors; and the same tensors with those weights as floats."""
    stored, meant = {}, {}
    for name, weight in per_expert(tensors).items():
        if not name.endswith(quantized):
            stored[name] = meant[name] = weight
            continue
        module = name.removesuffix(".weight")
        values, scale = int4_values(weight, group_size, torch.float16)
        zeros = torch.full(scale.shape, 6 + version)
        stored[f"{module}.qweight"] = _eight_in_an_int32(values + 8).t()
        stored[f"{module}.qzeros"] = _eight_in_an_int32(zeros.t())
        stored[f"{module}.scales"] = scale.t()
        stored[f"{module}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // group_size
        meant[name] = _product(values, scale)
    return stored, meant


def to_compressed_tensors(
    tensors: Tensors, quantized: tuple[str, ...], group_size: int = 32
) -> tuple[Tensors, Tensors]:
    """The same as `to_gptq`, in the format "pack-quantized" of compressed-tensors."""
    stored, meant = {}, {}
    for name, weight in per_expert(tensors).items():
        if not name.endswith(quantized):
            stored[name] = meant[name] = weight
            continue
        values, scale = int4_values(weight, group_size, torch.bfloat16)
        stored[f"{name}_packed"] = _eight_in_an_int32(values + 8)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(weight.shape)
        meant[name] = _product(values, scale)
    return stored, meant


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
}


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16]}
_FP8_WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")
_FP8_WEIGHTS += ("gate_proj", "up_proj", "down_proj")


def to_fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors as Qwen stores them in FP8, each expert by itself, and what they stand for."""
    stored, meant = {}, {}
    for name, weight in per_expert(tensors).items():
        if not name.endswith(tuple(f"{q}.weight" for q in _FP8_WEIGHTS)):
            stored[name] = meant[name] = weight
            continue
        n, k = weight.shape
        scale = torch.rand(-(-n // 32), -(-k // 16)).bfloat16() + 0.5
        stored[name] = (weight * 4).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        blocks = scale.float().repeat_interleave(32, 0)[:n].repeat_interleave(16, 1)[:, :k]
        meant[name] = stored[name].float() * blocks
    return stored, meant


def renamed(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The same model with another prefix in place of `model.`."""
    return {
        prefix + n.removeprefix("model.") if n.startswith("model.") else n: t
        for n, t in tensors.items()
    }


def parameters(groups) -> list[Tensors]:
    """The groups of a checkpoint with each parameter in one piece."""
    return [{name: torch.cat(parts) for name, parts in group.items()} for group in groups]


def assert_equal(actual: list[Tensors], expected: list[Tensors]) -> None:
    """Checks that groups, names and their order, dtypes and values are the same."""
    assert [list(group) for group in actual] == [list(group) for group in expected]
    for group, other in zip(actual, expected, strict=True):
        for name, tensor in group.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


def assert_mutations_are_survived(kind: str, directory: Path, count: int, *files: str) -> None:
    """Checks that `count` damaged copies of each file, or as many as the environment says, are
    read, or refused with the name of the file; see the script."""
    count = fuzz_count(count)
    script = Path(__file__).with_name("pipeline") / "mutate_checkpoint.py"
    command = [sys.executable, script, kind, directory, str(count), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 + count)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"
    outcomes = json.loads(done.stdout)
    assert list(outcomes) == list(files)
    for file, counts in outcomes.items():
        assert counts["read"] + counts["refused"] == count, file
        # A bundle notices every change of its tensors.
        least = 0 if kind == "bundle" and file.endswith(".safetensors") else count // 20
        assert counts["refused"] > count // 20 and counts["read"] >= least, outcomes

"""Prequantized bundles made by ExecuTorch's own script, on a CPU.

The script moves layers to a GPU, and packs some weights there; here they stay, and a loop packs
them as the CUDA kernel does (`matrix_to_m16n8k16_Bint4_layout` of PyTorch's int4mm.cu).
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


Packed = list[tuple[Tensor, Tensor]]
"""Results and arguments of `pack_tiles`."""


def pack_tiles(packed: Tensor, inner_k_tiles: int) -> Tensor:
    """`aten::_convert_weight_to_int4pack` of CUDA: uint8 `[N, K/2]`, the even column in the high
    nibble, to int32 `[N/8, K/(16 inner_k_tiles), 32, inner_k_tiles/2]`, lane by lane."""
    tiles = packed.unflatten(1, (-1, 8 * inner_k_tiles)).unflatten(0, (-1, 8)).long()
    words = torch.zeros(tiles.shape[0], tiles.shape[2], 32, inner_k_tiles // 2, dtype=torch.int64)
    for lane in range(32):
        for inner in range(0, inner_k_tiles, 2):
            for i, column in enumerate((0, 4, 8, 12)):
                pair = tiles[:, lane // 4, :, 8 * inner + lane % 4 + column]
                bits = (pair >> 4) << (4 * i) | (pair & 0xF) << (16 + 4 * i)
                words[:, :, lane, inner // 2] |= bits
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _stay(monkeypatch, library: torch.library.Library, packed: Packed) -> None:
    """Lets ExecuTorch's script quantize without a GPU, and take the first scales and zeros."""
    from executorch.examples.models.qwen3_5_moe import export
    from torchao.quantization.quantize_.workflows.int4 import int4_tile_packed_to_4d_tensor as tiles

    move = nn.Module.to

    def cast(module: nn.Module, device: str | None = None, dtype: torch.dtype | None = None):
        return module if dtype is None else move(module, dtype)

    def pack(values: Tensor, inner_k_tiles: int) -> Tensor:
        packed.append((pack_tiles(values, inner_k_tiles), values))
        return packed[-1][0]

    choose = partial(tiles._choose_qparams_and_quantize_affine_hqq, optimize=False)
    monkeypatch.setattr(tiles, "_choose_qparams_and_quantize_affine_hqq", choose)
    monkeypatch.setattr(nn.Module, "to", cast)
    monkeypatch.setattr(export, "_to_device_skip_meta", cast)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    library.impl("_convert_weight_to_int4pack", pack, "CPU")


def for_cuda(
    monkeypatch, checkpoint: Path, bundle: Path, qlinear: str | None, qembedding: str | None
) -> Packed:
    """What `quantize_and_save --backend cuda` writes, with groups of 32; returns what it packed."""
    from executorch.examples.models.qwen3_5_moe import export, quantize_and_save
    from executorch.examples.models.qwen3_5_moe.model import Qwen35MoE

    args = SimpleNamespace(qlinear=qlinear, qembedding=qembedding, qlinear_group_size=32, hqq=False)
    packed: Packed = []
    aten = torch.library._scoped_library("aten", "IMPL")
    with monkeypatch.context() as patch, aten as library:
        _stay(patch, library, packed)
        model, config = Qwen35MoE.from_hf_checkpoint(str(checkpoint), max_seq_len=64)
        export._quantize(model, config, args)
        _copy(checkpoint, bundle)
        quantize_and_save.save_quantized_model(model, str(bundle / "model.safetensors"))
    return packed


def for_mlx(checkpoint: Path, bundle: Path, symmetric: bool) -> None:
    """What `quantize_and_save --backend mlx` writes, with groups of 32.

    The model that it quantizes needs generated files of MLX, which the wheel lacks: here its
    recipe is applied to the tensors by the names that they have in it.
    """
    from executorch.examples.models.qwen3_5_moe import quantize_and_save as script
    from executorch.examples.models.qwen3_5_moe.model import Qwen35MoEConfig
    from executorch.extension.llm.export.quant import quantize_stream

    config = Qwen35MoEConfig.from_hf_config(str(checkpoint / "config.json"))
    recipe = script._mlx_quant_recipe(config, 32)
    recipe.rules[-1] = replace(
        recipe.rules[-1], config=replace(recipe.rules[-1].config, symmetric=symmetric)
    )
    _copy(checkpoint, bundle)
    tensors = script._load_remapped_subset(
        *script._open_checkpoint_shards(str(checkpoint)), config, lambda name: True
    )
    named = [pair for name, tensor in tensors.items() for pair in _switch(name, tensor.bfloat16())]
    stream = list(quantize_stream(named, recipe))
    buffers = [("layers.0.attn.conv_state", torch.zeros(1, 4)), ("norm._rms_weight", torch.ones(4))]
    script.save_quantized_tensors([*stream, *buffers], str(bundle / "model.safetensors"))


def _switch(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor by its names in the model for MLX, in which experts have modules of their own."""
    table = re.fullmatch(r"(.*\.experts)\.w([12])_weight", name)
    if table is None:
        return [(name, tensor)]
    module, kind = table.groups()
    halves = zip(("gate", "up"), tensor.chunk(2, 1), strict=True) if kind == "1" else None
    return [
        (f"{module}.{part}_proj.experts.{e}.weight", rows.clone())
        for part, experts in (halves or [("down", tensor)])
        for e, rows in enumerate(experts)
    ]


def _copy(checkpoint: Path, bundle: Path) -> None:
    bundle.mkdir()
    for file in FILES:
        shutil.copy(checkpoint / file, bundle)


def read_header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length))["__metadata__"]


def rewrite(bundle: Path, change) -> None:
    """Lets `change` have the tensors and the metadata of a bundle, and writes them back."""
    file = bundle / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    metadata = read_header(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def make_legacy(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Brings a bundle into the form that older versions of the script wrote."""
    quantized = {}
    for name in json.loads(metadata.pop("tensor_names")):
        described = json.loads(metadata.pop(name))
        if described["_type"] == "Tensor":
            continue
        module, _, leaf = name.rpartition(".")
        for data in described["_tensor_data_names"]:
            tensors[f"{name}.__{data}"] = tensors.pop(f"{module}._{leaf}_{data}")
        attributes = described["_data"].items()
        quantized[name] = {"_type": described["_type"]} | {
            key: f"torch.{value['_data']}" if isinstance(value, dict) else value
            for key, value in attributes
        }
    metadata["quantization"] = json.dumps(quantized)


def dequantized(bundle: Path, packed: Packed) -> dict[str, Tensor]:
    """The weights of a bundle by their names in it, read by ExecuTorch's own loader."""
    from executorch.examples.models.qwen3_5_moe.quantize_and_save import load_quantized_state_dict
    from executorch.extension.llm.export.quant import dequantize_weight
    from torchao.quantization import Int4TilePackedTo4dTensor
    from torchao.utils import TorchAOBaseTensor

    weights = {}
    state = load_quantized_state_dict(str(bundle / "model.safetensors"))
    for name, tensor in state.items():
        if isinstance(tensor, Int4TilePackedTo4dTensor):
            weights[name] = _multiply_out(tensor, packed)
        elif isinstance(tensor, TorchAOBaseTensor):
            weights[name] = dequantize_weight(tensor, torch.float32)
        elif name.endswith((".w1", ".w2")):
            nibbles = torch.stack((tensor & 0xF, (tensor >> 4) & 0xF), -1).flatten(-2).float() - 8
            scale = state[f"{name}_scale"].float()
            weights[name] = nibbles * scale.repeat_interleave(32, -1)
        elif not name.endswith("_scale"):
            weights[name] = tensor
    return weights


def _multiply_out(weight, packed: Packed) -> Tensor:
    """A tile-packed weight, of the values that were packed into it."""
    values = next(values for words, values in packed if torch.equal(words, weight.qdata))
    scale, zero = weight.scale_and_zero.float().transpose(0, 1).repeat_interleave(32, 1).unbind(-1)
    whole = torch.stack((values >> 4, values & 0xF), -1).flatten(-2).float()
    return ((whole - 8) * scale + zero)[: weight.shape[0], : weight.shape[1]]

"""compressed-tensors (`llm-compressor`), of its formats "pack-quantized" with 4 bits a weight.

A quantized matrix `[N, K]` of a module is stored as `weight_packed` int32 `[N, K/8]`, eight values
along K in an element, the first in the lowest nibble, each as value + 8; `weight_scale` `[N, K/g]`;
and `weight_shape` int64 `[2]`. Symmetric weights have no `weight_zero_point`. Which matrices are
quantized is told by what is in the files.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from et_moe.pipeline.codes import encode
from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.formats.format import Contents, StoredTensor
from et_moe.pipeline.formats.int4 import SCALES, Int4Format, check_section
from et_moe.pipeline.storage import Int4


class CompressedTensors(Int4Format):
    """The same values and scales, in the order of a bundle."""

    VALUES, SCALE = "weight_packed", "weight_scale"
    FURTHER = OPTIONAL = ("weight_g_idx", "weight_shape", "weight_zero_point")

    def __init__(self, contents: Contents) -> None:
        section = contents.config["quantization_config"]
        check_section(section, {"format": ("pack-quantized",)}, "compressed-tensors")
        groups = section.get("config_groups")
        for name, group in (groups if isinstance(groups, dict) else {}).items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict):
                where = f"quantization_config.config_groups.{name}.weights"
                raise ConfigError(f"{where} is {weights!r}, expected an object")
            expected = {"num_bits": (4,), "type": ("int",), "symmetric": (True,)}
            check_section(weights, expected, f"compressed-tensors ({name})")
        super().__init__(contents.tensors)
        for tensor in contents.tensors:
            module, _, suffix = tensor.rpartition(".")
            if suffix == "weight_zero_point" and self._has(module, self.VALUES):
                raise self._fail(module, suffix, "makes the weights asymmetric")

    @staticmethod
    def matches(contents: Contents) -> bool:
        section = contents.config.get("quantization_config")
        method = section.get("quant_method") if isinstance(section, dict) else None
        return method == "compressed-tensors" and any(
            n.endswith(".weight_packed") for n in contents.tensors
        )

    def _columns(self, shape: tuple[int, ...]) -> int:
        return 8 * shape[1]

    def _groups(self, shape: tuple[int, ...]) -> int:
        return shape[1]

    def _layout(self, n: int, k: int, groups: int) -> dict[str, StoredTensor]:
        return {
            "weight_packed": StoredTensor(("I32",), (n, k // 8)),
            "weight_scale": StoredTensor(tuple(SCALES), (n, groups)),
            "weight_shape": StoredTensor(("I64", "I32"), (2,)),
            "weight_g_idx": StoredTensor(("I32",), (k,)),
        }

    def _codes(self, module: str, storage: Int4, read: Callable[[str], Tensor]) -> Tensor:
        values, scale = read("weight_packed"), read("weight_scale")
        shape = [values.shape[0], 8 * values.shape[1]]
        if self._has(module, "weight_shape") and read("weight_shape").tolist() != shape:
            raise self._fail(module, "weight_shape", f"is not {shape}, the shape of the values")
        if self._has(module, "weight_g_idx"):
            self._check_order(module, "weight_g_idx", storage, read("weight_g_idx"))
        return encode(values.view(torch.uint8), scale)

"""Block-wise FP8, as Qwen publishes it (`quant_method` "fp8" with `weight_block_size`).

A quantized matrix `[N, K]` is stored as float8_e4m3fn under its own name, and beside it, under the
name with `_scale_inv` behind, a scale for each block of 128 by 128 weights,
`[ceil(N / 128), ceil(K / 128)]`; the weight is their product. Which matrices are quantized is told
by what is in the files: norms, convolutions, router, embedding and head stay as they were trained.
"""

from collections.abc import Callable

from torch import Tensor

from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.formats.format import Contents, StoredTensor
from et_moe.pipeline.formats.unquantized import DTYPES, Floats

SUFFIX = "_scale_inv"


class BlockFp8(Floats):
    """FP8 weights with a scale a block; they are dequantized to float32, which is exact."""

    def __init__(self, contents: Contents) -> None:
        section = contents.config["quantization_config"]
        block = section.get("weight_block_size")
        valid = isinstance(block, list) and len(block) == 2
        if not valid or any(type(size) is not int or size < 1 for size in block):
            raise ConfigError(
                f"quantization_config.weight_block_size is {block!r}, expected two sizes; FP8 with "
                "a scale per tensor or channel is not supported, use the bf16 checkpoint"
            )
        self._block = tuple(block)
        self._scaled = {n.removesuffix(SUFFIX) for n in contents.tensors if n.endswith(SUFFIX)}
        super().__init__(contents.tensors)

    @staticmethod
    def matches(contents: Contents) -> bool:
        section = contents.config.get("quantization_config")
        return isinstance(section, dict) and section.get("quant_method") == "fp8"

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        if name not in self._scaled or len(shape) < 2:
            return {name: StoredTensor(DTYPES, shape)}
        *outer, n, k = shape
        blocks = (*outer, -(-n // self._block[0]), -(-k // self._block[1]))
        return {
            name: StoredTensor(("F8_E4M3",), shape),
            name + SUFFIX: StoredTensor(DTYPES, blocks),
        }

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if name not in self._scaled:
            return read(name)
        weight, scale = read(name).float(), read(name + SUFFIX).float()
        for dim, size in zip((-2, -1), self._block, strict=True):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return weight.mul_(scale)

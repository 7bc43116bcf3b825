"""Weights as they were trained: bf16, fp16 or fp32, one tensor each."""

from collections.abc import Callable, Mapping

from torch import Tensor

from et_moe.pipeline.config import ConfigError
from et_moe.pipeline.formats.format import Contents, StoredTensor
from et_moe.pipeline.storage import Int4

DTYPES = ("BF16", "F16", "F32")

_QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".absmax",
    "_blocks",
    "_scales",
    "._weight_qdata",
    ".__qdata",
    ".w1_scale",
)
"""What names of tensors end with in the formats of GPTQ, AWQ, compressed-tensors, NVFP4,
bitsandbytes, MXFP4, and torchao, with which ExecuTorch writes its prequantized bundles."""


class Floats:
    """What formats have in common whose weights are floats once they are read."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.names, self.skipped = tensors, ()

    def kept(self, name: str) -> Int4 | None:
        return None


class Unquantized(Floats):
    """A tensor a weight, under its own name. A `quantization_config` that was left in a
    configuration over such tensors is of no account."""

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents.tensors)
        quantized = next((name for name in contents.tensors if name.endswith(_QUANTIZED)), None)
        if quantized is None:
            return
        section = contents.config.get("quantization_config")
        method = section.get("quant_method") if isinstance(section, dict) else None
        what = "quantized" if method is None else f"quantized by {method}"
        raise ConfigError(
            f"the weights are {what} ({quantized}), which is not supported: use the bf16 "
            "checkpoint, the block-wise FP8 one, or symmetric INT4 by GPTQ or compressed-tensors"
        )

    @staticmethod
    def matches(contents: Contents) -> bool:
        return True

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        return {name: StoredTensor(DTYPES, shape)}

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        return read(name)

"""Weights as they were trained: bf16, fp16 or fp32, one tensor each."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from et_moe.pipeline.formats.format import StoredTensor

DTYPES = ("BF16", "F16", "F32")


class Unquantized:
    """A tensor a weight, under its own name. A `quantization_config` that was left in a
    configuration over such tensors is of no account."""

    @staticmethod
    def matches(config: Mapping[str, Any]) -> bool:
        return True

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        return {name: StoredTensor(DTYPES, shape)}

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        return read(name)

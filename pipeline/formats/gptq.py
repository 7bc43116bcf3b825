"""GPTQ with 4 bits, as Qwen publishes it, and as GPTQModel and AutoRound export it.

A quantized matrix `[N, K]` of a module is stored as `qweight` int32 `[K/8, N]`, eight values along
K in an element, the first in the lowest nibble; `scales` `[K/g, N]`; `qzeros` int32 `[K/g, N/8]`;
and `g_idx` int32 `[K]`, the group of each column. The weight is (value - zero) * scale. Symmetric
weights have the zero 8 everywhere; the checkpoint format "gptq" stores 1 less, "gptq_v2" the zero.
Which matrices are quantized is told by what is in the files.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from et_moe.pipeline.codes import encode
from et_moe.pipeline.formats.format import Contents, StoredTensor
from et_moe.pipeline.formats.int4 import SCALES, Int4Format, check_section
from et_moe.pipeline.storage import Int4

_ZEROS = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - (1 << 32)}
"""Checkpoint format -> an element of `qzeros` for eight zeros of 8."""

_AUTO_ROUND = "auto_round:auto_gptq"


class Gptq(Int4Format):
    """The same values and scales, in the order of a bundle."""

    VALUES, SCALE, FURTHER, OPTIONAL = "qweight", "scales", ("qzeros", "g_idx"), ("g_idx",)

    def __init__(self, contents: Contents) -> None:
        section = contents.config["quantization_config"]
        auto_round = section["quant_method"] != "gptq"
        if auto_round:
            check_section(section, {"packing_format": (_AUTO_ROUND,)}, "AutoRound")
        # Older files have the key of `quantize_config.json`, or none.
        check_section(
            section,
            {"bits": (4,), "sym": (True,), "checkpoint_format": (*_ZEROS, "")},
            "AutoRound" if auto_round else "GPTQ",
        )
        self._zeros = _ZEROS[section.get("checkpoint_format") or "gptq"]
        super().__init__(contents.tensors)

    @staticmethod
    def matches(contents: Contents) -> bool:
        section = contents.config.get("quantization_config")
        method = section.get("quant_method") if isinstance(section, dict) else None
        awq = method == "auto-round" and "awq" in str(section.get("packing_format"))
        return (
            method in ("gptq", "auto-round")
            and not awq
            and any(name.endswith(".qweight") for name in contents.tensors)
        )

    def _columns(self, shape: tuple[int, ...]) -> int:
        return 8 * shape[0]

    def _groups(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def _layout(self, n: int, k: int, groups: int) -> dict[str, StoredTensor]:
        return {
            "qweight": StoredTensor(("I32",), (k // 8, n)),
            "scales": StoredTensor(tuple(SCALES), (groups, n)),
            "qzeros": StoredTensor(("I32",), (groups, n // 8)),
            "g_idx": StoredTensor(("I32",), (k,)),
        }

    def _codes(self, module: str, storage: Int4, read: Callable[[str], Tensor]) -> Tensor:
        if not (read("qzeros") == self._zeros).all():
            raise self._fail(module, "qzeros", "has zeros other than 8 (asymmetric weights)")
        if self._has(module, "g_idx"):
            self._check_order(module, "g_idx", storage, read("g_idx"))
        values = read("qweight")
        # The bytes of an element are four bytes of a row of a bundle's weight.
        rows = values.view(torch.uint8).unflatten(1, (-1, 4)).transpose(0, 1).flatten(1)
        return encode(rows, read("scales").t())

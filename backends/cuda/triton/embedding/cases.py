"""The quantized embedding of Qwen3.5-35B-A3B."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.embedding.op import embedding_w4, embedding_w8

_VOCABULARY, _HIDDEN = 248320, 2048


def _call(m: int, device: torch.device, weight: torch.Tensor, groups: int, **sizes: int) -> dict:
    scale = torch.ones(_VOCABULARY, groups, dtype=torch.bfloat16, device=device)
    tensors = {"ids": torch.arange(m, device=device), "weight": weight, "scale": scale}
    return {**tensors, **sizes, "dtype": torch.bfloat16}


def _int8(m: int, device: torch.device) -> dict:
    weight = torch.ones(_VOCABULARY, _HIDDEN, dtype=torch.int8, device=device)
    return _call(m, device, weight, 1)


def _int4(m: int, device: torch.device) -> dict:
    weight = torch.ones(_VOCABULARY, _HIDDEN // 2, dtype=torch.uint8, device=device)
    return _call(m, device, weight, _HIDDEN // 128, group_size=128)


CASES = [OpCase("embedding_w8", embedding_w8, _int8), OpCase("embedding_w4", embedding_w4, _int4)]

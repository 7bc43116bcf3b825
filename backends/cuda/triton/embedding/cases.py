"""The INT8 embedding of Qwen3.5-35B-A3B."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.embedding.op import embedding_w8

_VOCABULARY, _HIDDEN = 248320, 2048


def _arguments(m: int, device: torch.device) -> dict:
    return {
        "ids": torch.arange(m, device=device),
        "weight": torch.ones(_VOCABULARY, _HIDDEN, dtype=torch.int8, device=device),
        "scale": torch.ones(_VOCABULARY, 1, dtype=torch.bfloat16, device=device),
        "dtype": torch.bfloat16,
    }


CASES = [OpCase("embedding_w8", embedding_w8, _arguments)]

"""Sampling from the vocabulary of Qwen3.5."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.sampling.op import sample


def _arguments(m: int, device: torch.device) -> dict:
    return {
        "logits": torch.randn((1, 248320), device=device) * 4,
        "temperature": torch.full((1,), 0.6, device=device),
        "top_k": torch.full((1,), 20, dtype=torch.int64, device=device),
        "top_p": torch.full((1,), 0.95, device=device),
        "seed": torch.full((1,), 42, dtype=torch.int64, device=device),
        "position": torch.full((1,), m, dtype=torch.int64, device=device),
    }


CASES = [OpCase("sample", sample, _arguments, tokens=(1,))]

"""Sampling from the vocabulary of Qwen3.5."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.sampling.op import sample


def _arguments(m: int, device: torch.device) -> dict:
    """Arguments of m sequences."""
    return {
        "logits": torch.randn((m, 248320), device=device) * 4,
        "temperature": torch.full((m,), 0.6, device=device),
        "top_k": torch.full((m,), 20, dtype=torch.int64, device=device),
        "top_p": torch.full((m,), 0.95, device=device),
        "seed": torch.full((m,), 42, dtype=torch.int64, device=device),
        "positions": torch.full((m,), 1, dtype=torch.int64, device=device),
    }


def _draft_arguments(m: int, device: torch.device) -> dict:
    """Arguments of m rows of one sequence."""
    return _arguments(1, device) | {"logits": torch.randn((m, 248320), device=device) * 4}


CASES = [
    OpCase("sample", sample, _arguments, tokens=(1,)),
    OpCase("sample/drafts", sample, _draft_arguments, tokens=(2, 3, 4)),
]

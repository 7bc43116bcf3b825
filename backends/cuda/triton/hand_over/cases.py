"""The hand-over at the end of decode, of m sequences."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.hand_over.op import hand_over, hand_over_drafts


def _arguments(m: int, device: torch.device) -> dict:
    def integers(*shape):
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return {
        "token": integers(m, 1),
        "positions": integers(m),
        "drawn": integers(2, m),
        "tokens": integers(m, 1),
    }


def _draft_arguments(m: int, device: torch.device) -> dict:
    def integers(*shape):
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return {
        "step": integers(m, 5),
        "positions": integers(m),
        "drawn": integers(2, m, 5),
        "tokens": integers(m, 4),
        "versions": integers(m),
        "calls": integers(m),
    }


CASES = [
    OpCase("hand_over", hand_over, _arguments, tokens=(1, 7)),
    OpCase("hand_over_drafts", hand_over_drafts, _draft_arguments, tokens=(1, 7)),
]

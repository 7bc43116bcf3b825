"""Shifts of rows of Qwen3.5-35B-A3B: a prompt's, and four of each of several sequences."""

import torch

from et_moe.backends.cuda.triton.cases.op_case import OpCase
from et_moe.backends.cuda.triton.token_shift.op import token_shift

_HIDDEN, _ROWS = 2048, 4


def _arguments(rows: int, sequences: int, device: torch.device) -> dict:
    return {
        "x": torch.ones(rows, _HIDDEN, dtype=torch.bfloat16, device=device),
        "state": torch.zeros(sequences, _ROWS, _HIDDEN, dtype=torch.bfloat16, device=device),
        "slots": torch.arange(sequences, dtype=torch.int32, device=device),
        "versions": torch.zeros(sequences, dtype=torch.int64, device=device),
    }


def _prompt(m: int, device: torch.device) -> dict:
    return _arguments(m, 1, device)


def _drafts(m: int, device: torch.device) -> dict:
    return _arguments(m * _ROWS, m, device) | {"each_row": True}


CASES = [
    OpCase("token_shift", token_shift, _prompt),
    OpCase("token_shift_drafts", token_shift, _drafts, tokens=(1, 8)),
]

"""Numbers of rows: which kernels run for how many, and how many of them are not padding."""

import torch
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import statically_known_true

from et_moe.backends.cuda.triton.common.launch import is_one
from et_moe.backends.cuda.triton.tuning import find_largest

LINEAR_ROWS = 4
"""Up to this many rows linear layers run a matrix-vector kernel, which reads the weights once and
multiplies them with one row after the other. Of more, products on the matrix unit cost less."""

DECODE_TOKENS = 16
"""Up to this many tokens the router and the experts run their kernels for a few tokens. Of more,
the pairs of a token and an expert are sorted by expert, and an expert's weights are read once
however many pairs it has."""


def is_decode(tokens: int | torch.SymInt) -> bool:
    """Whether a call has at most `DECODE_TOKENS` tokens, whatever a symbolic number stands for."""
    return find_largest(tokens) <= DECODE_TOKENS


def has_one_row_each(rows: int | torch.SymInt, sequences: int | torch.SymInt) -> bool:
    """Whether a call has one row of each sequence, in every call; else it has rows of one sequence.

    Raises:
        ValueError: it has other rows of several sequences, which no kernel takes.
    """
    if statically_known_true(rows == sequences):
        return True
    if not is_one(sequences):
        raise ValueError(f"{rows} rows of {sequences} sequences: expected one row of each")
    return False


@triton.jit
def count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS: tl.constexpr):
    """How many of the `tokens` tokens are not padding, which is at their end.

    Args:
        num_tokens_ptr: int64 pointer to the number. Without HAS_NUM_TOKENS it is not read, and no
            token is padding.
    """
    count = tokens
    if HAS_NUM_TOKENS:
        count = tl.minimum(tl.load(num_tokens_ptr), tokens)
    return count

"""Numbers of tokens: which kernels run for how many, and how many of them are not padding."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.tuning import find_largest

DECODE_TOKENS = 16
"""Up to this many tokens the router and the experts run their kernels for a few tokens. Of more,
the pairs of a token and an expert are sorted by expert, and an expert's weights are read once
however many pairs it has."""


def is_decode(tokens: int | torch.SymInt) -> bool:
    """Whether a call has at most `DECODE_TOKENS` tokens, whatever a symbolic number stands for."""
    return find_largest(tokens) <= DECODE_TOKENS


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

"""How many tokens an op has: which kernels take so many, and how many of them are no padding."""

import torch
import triton
import triton.language as tl

DECODE_TOKENS = 16
"""Up to this many tokens the router and the experts run their kernels for few tokens. From there
on, token-expert pairs are sorted by expert, and an expert's weights are read once for all its
pairs."""


def is_decode(tokens: int | torch.SymInt) -> bool:
    """Whether a call has at most `DECODE_TOKENS` tokens; a symbolic number counts as more."""
    return isinstance(tokens, int) and tokens <= DECODE_TOKENS


@triton.jit
def count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS: tl.constexpr):
    """How many of `tokens` tokens are no padding.

    Args:
        num_tokens_ptr: pointer to the number if HAS_NUM_TOKENS, else any pointer: then all tokens
            count.
    """
    count = tokens
    if HAS_NUM_TOKENS:
        count = tl.minimum(tl.load(num_tokens_ptr), tokens)
    return count

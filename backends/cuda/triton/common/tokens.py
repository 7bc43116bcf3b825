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


def count_decode_rows(
    rows: int | torch.SymInt,
    sequences: int | torch.SymInt,
    each_row: bool,
    most: int = LINEAR_ROWS,
) -> int:
    """How many rows every call has of each sequence, if kernels for decoding shall take them; else
    0, and the rows are of one sequence.

    These kernels take one row or, with each_row, up to `most`, each of which has the bits that it
    has alone.

    Raises:
        ValueError: there are other rows, which no kernel takes.
    """
    limit = most if each_row else 1
    for each in range(1, limit + 1):
        if statically_known_true(rows == each * sequences):
            return each
    if each_row or not is_one(sequences):
        wanted = f"1 to {limit} rows" if each_row else "one row"
        raise ValueError(f"{rows} rows of {sequences} sequences: expected {wanted} of each")
    return 0


@triton.jit
def find_sequence(row, TOKENS: tl.constexpr):
    """The sequence of a row, and how many of its rows come first; each sequence has TOKENS."""
    if TOKENS == 1:
        return row, 0
    else:
        return row // TOKENS, row % TOKENS


@triton.jit
def load_version(versions_ptr, VERSIONS: tl.constexpr):
    """The version of a state that a sequence goes on from, int64; one below or above those that
    there are counts as the first or the last.

    Nobody writes versions while a program runs, so they are read before `wait_for_previous`.
    """
    return tl.minimum(tl.maximum(tl.load(versions_ptr), 0), VERSIONS - 1)


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

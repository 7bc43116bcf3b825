"""The row before each row of a sequence, wherever a call ends (Peng et al., "RWKV", 2023, shift
tokens like this)."""

import torch

from et_moe.backends.ops.library import declare
from et_moe.backends.ops.sequences import (
    check_each_row,
    rows_each,
    sequence_rows,
    version_of,
)


def _token_shift_fake(x, state, slots, versions, num_tokens=None, each_row=False):
    return torch.empty_like(x)


@declare(_token_shift_fake, mutates=("state",))
def token_shift(
    x: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    versions: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    each_row: bool = False,
) -> torch.Tensor:
    """Shifts the rows of each sequence by one. See `sequences.py`.

    Args:
        x: float `[B R, H]`.
        state: `[S, V, H]` in x's dtype, updated in place: of each slot the row that came last, in
            V versions.
        slots: `int32 [B]`. versions: `int64 [B]`.
        num_tokens: `int64 [B]` or None for R; further rows are padding with undefined outputs.
        each_row: whether each row leaves a version, R of them at most V; else the last one leaves
            version 0.

    Returns:
        `[B R, H]` in x's dtype: row r is row r - 1 of x, row 0 is the state.

    Raises:
        ValueError: a version that there is not, or each_row with more rows than versions.
    """
    out, count = torch.zeros_like(x), state.shape[1]
    check_each_row(each_row, rows_each(x.shape[0], slots.shape[0]), versions, count)
    for b, first, valid in sequence_rows(x.shape[0], slots.shape[0], num_tokens):
        own, rows = state[int(slots[b])], x[first : first + valid]
        out[first] = own[version_of(versions, b, count)]
        out[first + 1 : first + valid] = rows[:-1]
        left = rows if each_row else rows[-1:]
        own[: len(left)] = left
    return out

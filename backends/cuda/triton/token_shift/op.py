"""The row before each row of a sequence."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, load_version
from et_moe.backends.ops.sequences import check_each_row, rows_each

_BLOCK = 1024


@triton.jit
def _token_shift_kernel(
    x_ptr,
    state_ptr,
    slots_ptr,
    versions_ptr,
    num_tokens_ptr,
    out_ptr,
    rows,
    H: tl.constexpr,
    VERSIONS: tl.constexpr,
    LEAVES: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row; `rows` of each sequence. The program of a sequence's first row reads
    the state and then replaces it, so nothing races: with LEAVES by so many rows, each a version,
    else by the last one."""
    row = tl.program_id(0)
    sequence = row // rows
    own = row % rows
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    count = count_valid_tokens(num_tokens_ptr + sequence, rows, HAS_NUM_TOKENS)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    state = state_ptr + slot * (VERSIONS * H) + column
    version = load_version(versions_ptr + sequence, VERSIONS)
    wait_for_previous()
    before = x_ptr + (row.to(tl.int64) - 1) * H + column
    value = tl.load(before, mask=inside & (own > 0) & (own < count), other=0.0)
    if (own == 0) & (count > 0):
        value = tl.load(state + version * H, mask=inside, other=0.0)
        tl.debug_barrier()  # until every warp of this program has read the old state
        if LEAVES > 0:
            for i in tl.static_range(LEAVES):
                left = inside & (i < count)
                tl.store(state + i * H, tl.load(before + (i + 1) * H, mask=left), mask=left)
        else:
            tl.store(state, tl.load(before + count * H, mask=inside), mask=inside)
    tl.store(out_ptr + row.to(tl.int64) * H + column, value, mask=inside)


def token_shift(
    x: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    versions: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    each_row: bool = False,
) -> torch.Tensor:
    """`ops.token_shift`: `[B R, H]` in one launch. All tensors are contiguous. The outputs of
    padding are zeros; a version below or above those that there are counts as the first or the
    last.

    Raises:
        ValueError: each_row with more rows than versions.
    """
    hidden, count = x.shape[1], state.shape[1]
    rows = rows_each(x.shape[0], slots.shape[0])
    check_each_row(each_row, rows, versions, count)
    out = torch.empty_like(x)
    block = min(_BLOCK, triton.next_power_of_2(hidden))
    launch(
        _token_shift_kernel,
        (x.shape[0], cdiv(hidden, block)),
        x,
        state,
        slots,
        versions,
        slots if num_tokens is None else num_tokens,
        out,
        rows,
        H=hidden,
        VERSIONS=count,
        LEAVES=rows if each_row else 0,
        HAS_NUM_TOKENS=num_tokens is not None,
        BLOCK=block,
        num_warps=4,
    )
    return out

"""The convolution of one token, or of a few: in a kernel of its own, or at the end of the kernel
that makes x.

Both compute with the same instructions, so a sequence gets the same bits from either.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import start_next, wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens, load_version
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def find_conv_state(
    state_ptr, slots_ptr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, VERSIONS: tl.constexpr
):
    """Where a sequence's state begins, with version 0 of what a call leaves.

    Args:
        state_ptr: `[S, TAPS - 2 + VERSIONS, CHANNELS]`. slots_ptr: that of the sequence.
    """
    slot = tl.load(slots_ptr).to(tl.int64)
    return state_ptr + slot * ((TAPS - 2 + VERSIONS) * CHANNELS)


@triton.jit
def find_conv_version(state_ptr, versions_ptr, CHANNELS: tl.constexpr, VERSIONS: tl.constexpr):
    """Where the earlier inputs lie of a sequence whose state begins at state_ptr. Nothing may be
    stored there: torch would take the versions for updated.

    Args:
        versions_ptr: that of the sequence, or None if VERSIONS is 1 and there is nothing to choose.
    """
    if versions_ptr is not None:
        state_ptr += load_version(versions_ptr, VERSIONS) * CHANNELS
    return state_ptr


@triton.jit
def load_conv_window(weight_ptr, state_ptr, n, own_n, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Loads what `convolve` needs besides the token itself: taps and earlier inputs.

    Args:
        weight_ptr: `[CHANNELS, TAPS]`. state_ptr: `[TAPS - 1, CHANNELS]`, the earlier inputs.
        n, own_n: `[N]`, columns of the token, and which of them are this program's. Of others, and
            of columns from CHANNELS on, nothing is read and the result is 0.

    Returns:
        A tuple of TAPS vectors `[N]` of taps, and one of TAPS - 1 vectors of earlier inputs.
    """
    inside = own_n & (n < CHANNELS)
    taps, earlier = (), ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight_ptr + n * TAPS + tap, mask=inside, other=0.0),)
    for tap in tl.static_range(TAPS - 1):
        earlier += (tl.load(state_ptr + tap * CHANNELS + n, mask=inside, other=0.0),)
    return taps, earlier


@triton.jit
def convolve(x, window, TAPS: tl.constexpr):
    """The convolution's result, after SiLU, in the dtype of x `[N]`; window: `load_conv_window`."""
    taps, earlier = window
    y = x.to(tl.float32) * taps[TAPS - 1].to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        # Left to the compiler, it might fuse these otherwise in one kernel than in another.
        y = tl.fma(earlier[tap].to(tl.float32), taps[tap].to(tl.float32), y)
    return silu(y).to(x.dtype)


@triton.jit
def store_convolved(
    x,
    window,
    state_ptr,
    out_ptr,
    n,
    own_n,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    COPIES: tl.constexpr,
    token=0,
    count=1,
):
    """`causal_conv1d` of one token; it stores the result and updates the state in place.

    Taps and inputs are single vectors, not matrices, since those are loaded in the layout of x.

    Args:
        x: `[N]` in the dtype of out, the token's columns n. From CHANNELS on they are stored as
            they are.
        window: as from `load_conv_window`.
        state_ptr: as from `find_conv_state`.
        COPIES: how many threads hold a copy of x, as for `store_once`.
        token, count: which of its sequence's tokens it is, and how many of these are not padding.
    """
    _, earlier = window
    inside = own_n & (n < CHANNELS)
    y = tl.where(n < CHANNELS, convolve(x, window, TAPS), x)
    store_once(out_ptr + n, y, own_n, COPIES)
    tl.debug_barrier()  # until every warp of this program has read the old state
    for tap in tl.static_range(TAPS - 1):
        if tap + 1 < TAPS - 1:
            value, row, mask = earlier[tap + 1], tap, inside & (token == 0) & (count > 0)
        else:
            value, row, mask = x, tap + token, inside & (token < count)
        value = value.to(state_ptr.dtype.element_ty)
        store_once(state_ptr + row * CHANNELS + n, value, mask, COPIES)


@triton.jit
def _conv_step_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    slots_ptr,
    versions_ptr,
    num_tokens_ptr,
    out_ptr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    VERSIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """TOKENS tokens of one sequence, each of which leaves a version; BLOCK_C channels. A sequence
    without a valid row gets zeros."""
    # One token takes less time here than the next kernel needs to load its state.
    start_next()
    sequence = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    count = count_valid_tokens(num_tokens_ptr + sequence, TOKENS, HAS_NUM_TOKENS)
    own = in_channels & (count > 0)
    versions = None if versions_ptr is None else versions_ptr + sequence
    state_ptr = find_conv_state(state_ptr, slots_ptr + sequence, CHANNELS, TAPS, VERSIONS)
    old_ptr = find_conv_version(state_ptr, versions, CHANNELS, VERSIONS)
    window = load_conv_window(weight_ptr, old_ptr, channel, own, CHANNELS, TAPS)
    taps, inputs = window
    wait_for_previous()
    x_ptr += sequence.to(tl.int64) * (TOKENS * ROW) + channel
    for token in tl.static_range(TOKENS):
        inside = own if token == 0 else in_channels & (token < count)
        inputs += (tl.load(x_ptr + token * ROW, mask=inside, other=0.0),)
    out = out_ptr + sequence.to(tl.int64) * (TOKENS * CHANNELS) + channel
    for token in tl.static_range(TOKENS):
        earlier = ()
        for tap in tl.static_range(TAPS - 1):
            earlier += (inputs[token + tap],)
        y = convolve(inputs[token + TAPS - 1], (taps, earlier), TAPS)
        tl.store(out + token * CHANNELS, y, mask=in_channels)
    tl.debug_barrier()  # until every warp of this program has read the old state
    for row in tl.static_range(TAPS - 2 + TOKENS):
        value = inputs[row + 1].to(state_ptr.dtype.element_ty)
        # From row TAPS - 2 on it is a new input.
        inside = own if row <= TAPS - 2 else in_channels & (row - (TAPS - 2) < count)
        tl.store(state_ptr + row * CHANNELS + channel, value, mask=inside)


def count_conv_versions(state: torch.Tensor, taps: int) -> int:
    """How many versions a convolution's state `[S, W - 2 + V, C]` has."""
    return state.shape[1] - (taps - 2)


def conv_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None,
    versions: torch.Tensor | None,
    tokens: int,
) -> torch.Tensor:
    """`causal_conv1d` of `tokens` tokens of each sequence, with its arguments, each of which leaves
    a version: `[B tokens, C]` in x's dtype."""
    sequences, (channels, taps) = slots.shape[0], weight.shape
    out = x.new_empty((x.shape[0], channels))
    config = find_config("causal_conv1d_step", tokens=sequences)
    launch(
        _conv_step_kernel,
        (cdiv(channels, config["BLOCK_C"]), sequences),
        x,
        weight,
        state,
        slots,
        versions,
        slots if num_tokens is None else num_tokens,
        out,
        ROW=x.stride(0),
        CHANNELS=channels,
        TAPS=taps,
        VERSIONS=count_conv_versions(state, taps),
        TOKENS=tokens,
        HAS_NUM_TOKENS=num_tokens is not None,
        **config,
    )
    return out

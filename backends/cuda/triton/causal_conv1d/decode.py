"""The convolution of one token: in a kernel of its own, or at the end of the one that makes x.

Both compute with the same instructions, so a sequence gets the same bits from either.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import start_next, wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.tuning import find_config


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
):
    """`causal_conv1d` of one token; it stores the result and updates the state in place.

    Taps and inputs are single vectors, not matrices, since those are loaded in the layout of x.

    Args:
        x: `[N]` in the dtype of out, the token's columns n. From CHANNELS on they are stored as
            they are.
        window: as from `load_conv_window`.
        COPIES: how many threads hold a copy of x, as for `store_once`.
    """
    _, earlier = window
    inside = own_n & (n < CHANNELS)
    y = tl.where(n < CHANNELS, convolve(x, window, TAPS), x)
    store_once(out_ptr + n, y, own_n, COPIES)
    tl.debug_barrier()  # until every warp of this program has read the old state
    for tap in tl.static_range(TAPS - 1):
        value = earlier[tap + 1] if tap + 1 < TAPS - 1 else x
        value = value.to(state_ptr.dtype.element_ty)
        store_once(state_ptr + tap * CHANNELS + n, value, inside, COPIES)


@triton.jit
def _conv_step_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    slots_ptr,
    num_tokens_ptr,
    out_ptr,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One token of one sequence, BLOCK_C channels. A sequence without a valid row gets zeros."""
    # One token takes less time here than the next kernel needs to load its state.
    start_next()
    sequence = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    valid = count_valid_tokens(num_tokens_ptr + sequence, 1, HAS_NUM_TOKENS) > 0
    own = in_channels & valid
    state_ptr += tl.load(slots_ptr + sequence).to(tl.int64) * ((TAPS - 1) * CHANNELS)
    window = load_conv_window(weight_ptr, state_ptr, channel, own, CHANNELS, TAPS)
    _, earlier = window
    wait_for_previous()
    x = tl.load(x_ptr + sequence.to(tl.int64) * ROW + channel, mask=own, other=0.0)
    out = out_ptr + sequence.to(tl.int64) * CHANNELS + channel
    tl.store(out, convolve(x, window, TAPS), mask=in_channels)
    tl.debug_barrier()  # until every warp of this program has read the old state
    for tap in tl.static_range(TAPS - 1):
        value = earlier[tap + 1] if tap + 1 < TAPS - 1 else x
        value = value.to(state_ptr.dtype.element_ty)
        tl.store(state_ptr + tap * CHANNELS + channel, value, mask=own)


def conv_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None,
) -> torch.Tensor:
    """`causal_conv1d` of one token of each sequence, with its arguments: `[B, C]` in x's dtype."""
    sequences, (channels, taps) = x.shape[0], weight.shape
    out = x.new_empty((sequences, channels))
    config = find_config("causal_conv1d_step", tokens=sequences)
    launch(
        _conv_step_kernel,
        (cdiv(channels, config["BLOCK_C"]), sequences),
        x,
        weight,
        state,
        slots,
        slots if num_tokens is None else num_tokens,
        out,
        ROW=x.stride(0),
        CHANNELS=channels,
        TAPS=taps,
        HAS_NUM_TOKENS=num_tokens is not None,
        **config,
    )
    return out

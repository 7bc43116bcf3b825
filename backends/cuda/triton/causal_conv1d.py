"""Depthwise causal convolution over time, then SiLU."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.dependent_launch import start_next, wait_for_previous
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.tuning import tuned


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS: tl.constexpr):
    """Tokens that are not padding."""
    count = tokens
    if HAS_NUM_TOKENS:
        count = tl.minimum(tl.load(num_tokens_ptr), tokens)
    return count


@triton.jit
def update_conv_state(
    x_ptr,
    state_ptr,
    count,
    channel,
    in_channels,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
):
    """Leaves the last TAPS - 1 of the old state and `count` new inputs in the state, in place."""
    row = tl.arange(0, TAPS_P2)
    source = count - (TAPS - 1) + row  # before token 0: a row of the old state
    inside = (row < TAPS - 1)[:, None] & in_channels[None, :]
    old = tl.load(
        state_ptr + (source + TAPS - 1)[:, None] * CHANNELS + channel[None, :],
        mask=inside & (source < 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    fresh = tl.load(
        x_ptr + source.to(tl.int64)[:, None] * ROW + channel[None, :],
        mask=inside & (source >= 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    tl.debug_barrier()  # every warp of this program has read the old state
    tl.store(
        state_ptr + row[:, None] * CHANNELS + channel[None, :],
        (old + fresh).to(state_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def conv_window(
    weight_ptr,
    state_ptr,
    n,
    own_n,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
):
    """Taps and earlier inputs `[TAPS_P2, N]` of one token's columns n `[N]`, where own_n is set.

    For `store_convolved`, once the token's own inputs are known. Columns from CHANNELS on get 0.
    """
    tap = tl.arange(0, TAPS_P2)[:, None]
    inside = (own_n & (n < CHANNELS))[None, :]
    taps = weight_ptr + n[None, :] * TAPS + tap
    earlier = state_ptr + tap * CHANNELS + n[None, :]
    return (
        tl.load(taps, mask=inside & (tap < TAPS), other=0.0),
        tl.load(earlier, mask=inside & (tap < TAPS - 1), other=0.0),
    )


@triton.jit
def store_convolved(
    x,
    taps,
    earlier,
    state_ptr,
    out_ptr,
    n,
    own_n,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
):
    """`causal_conv1d` of one token, with what `conv_window` gave: out, and the state in place.

    x fp32 `[N]` is rounded to out's dtype first; its columns from CHANNELS on stay what they are.
    One tile has all inputs and each is stored from where it is: to move a vector to another layout
    takes two barriers.
    """
    tap = tl.arange(0, TAPS_P2)[:, None]
    now = tap == TAPS - 1
    x = x.to(out_ptr.dtype.element_ty).to(tl.float32)
    inputs = tl.where(now, x[None, :], earlier.to(tl.float32))
    y = silu(tl.sum(inputs * taps.to(tl.float32), axis=0))
    out = out_ptr + n
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=own_n & (n < CHANNELS))
    others = now & (own_n & (n >= CHANNELS))[None, :]
    out = tl.broadcast_to(out[None, :], inputs.shape)
    tl.store(out, inputs.to(out_ptr.dtype.element_ty), mask=others)
    tl.debug_barrier()  # every warp of this program has read the old state
    shifted = state_ptr + (tap - 1) * CHANNELS + n[None, :]
    inside = (own_n & (n < CHANNELS))[None, :] & (tap > 0) & (tap < TAPS)
    tl.store(shifted, inputs.to(state_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _causal_conv1d_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    num_tokens_ptr,
    out_ptr,
    tokens,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A [BLOCK_T, BLOCK_C] tile of the output; BLOCK_T is at least TAPS - 1.

    Only the programs of the first tokens read the state; they also replace it, so nothing races.
    """
    start_next()  # of one token this takes less time than the next kernel takes to load its state
    block = tl.program_id(0)
    first = block == 0
    start = block.to(tl.int64) * BLOCK_T
    token = tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    tap = tl.arange(0, TAPS_P2)[None, :]
    weight = tl.load(
        weight_ptr + channel[:, None] * TAPS + tap,
        mask=in_channels[:, None] & (tap < TAPS),
        other=0.0,
    ).to(tl.float32)
    tile = x_ptr + start * ROW + token[:, None] * ROW + channel[None, :]
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if first:
        for i in tl.static_range(TAPS - 1):
            old = state_ptr + (token + i)[:, None] * CHANNELS + channel[None, :]
            before = (token < TAPS - 1 - i)[:, None] & in_channels[None, :]
            x = tl.load(old, mask=before, other=0.0).to(tl.float32)
            y += x * tl.sum(tl.where(tap == i, weight, 0.0), 1)[None, :]
    wait_for_previous()
    count = valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS)
    valid = tl.minimum(count - start, BLOCK_T).to(tl.int32)
    for i in tl.static_range(TAPS):
        source = token - (TAPS - 1 - i)
        in_x = ((source >= 0) | (not first)) & (source < valid)
        inside = in_x[:, None] & in_channels[None, :]
        x = tl.load(tile - (TAPS - 1 - i) * ROW, mask=inside, other=0.0).to(tl.float32)
        y += x * tl.sum(tl.where(tap == i, weight, 0.0), 1)[None, :]
    out = out_ptr + start * CHANNELS + token[:, None] * CHANNELS + channel[None, :]
    inside = (token < tokens - start)[:, None] & in_channels[None, :]
    tl.store(out, silu(y).to(out_ptr.dtype.element_ty), mask=inside)
    if first:
        update_conv_state(
            x_ptr, state_ptr, count, channel, in_channels, ROW, CHANNELS, TAPS, TAPS_P2
        )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `et_moe.backends.ops.causal_conv1d`. Columns of x past the channels are ignored."""
    tokens, (channels, taps) = x.shape[0], weight.shape
    out = x.new_empty((tokens, channels))
    config = tuned("causal_conv1d", tokens)
    config["BLOCK_T"] = max(config["BLOCK_T"], triton.next_power_of_2(taps - 1))
    launch(
        _causal_conv1d_kernel,
        (cdiv(tokens, config["BLOCK_T"]), cdiv(channels, config["BLOCK_C"])),
        x,
        weight,
        state,
        state if num_tokens is None else num_tokens,
        out,
        tokens,
        ROW=x.stride(0),
        CHANNELS=channels,
        TAPS=taps,
        TAPS_P2=triton.next_power_of_2(taps),
        HAS_NUM_TOKENS=num_tokens is not None,
        **config,
    )
    return out

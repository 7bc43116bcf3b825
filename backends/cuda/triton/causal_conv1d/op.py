"""Depthwise causal convolution over time, then SiLU."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d.decode import (
    conv_decode,
    count_conv_versions,
    find_conv_state,
    find_conv_version,
)
from et_moe.backends.cuda.triton.common.dependent_launch import start_next, wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.tokens import count_decode_rows, count_valid_tokens
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops.sequences import check_each_row


@triton.jit
def update_conv_state(
    x_ptr,
    old_ptr,
    state_ptr,
    count,
    channel,
    in_channels,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
):
    """Replaces the state by the last TAPS - 1 inputs: `count` new ones behind those of the state.

    Args:
        x_ptr: new inputs, ROW elements from token to token.
        old_ptr, state_ptr: `[TAPS - 1, CHANNELS]`, the old state and the place of the new one,
            which may overlap.
        channel, in_channels: `[N]`, the program's channels, and which of them exist.
    """
    row = tl.arange(0, TAPS_P2)
    source = count - (TAPS - 1) + row  # below 0: a row of the old state
    inside = (row < TAPS - 1)[:, None] & in_channels[None, :]
    old = tl.load(
        old_ptr + (source + TAPS - 1)[:, None] * CHANNELS + channel[None, :],
        mask=inside & (source < 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    fresh = tl.load(
        x_ptr + source.to(tl.int64)[:, None] * ROW + channel[None, :],
        mask=inside & (source >= 0)[:, None],
        other=0.0,
    ).to(tl.float32)
    tl.debug_barrier()  # until every warp of this program has read the old state
    tl.store(
        state_ptr + row[:, None] * CHANNELS + channel[None, :],
        (old + fresh).to(state_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _causal_conv1d_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    slots_ptr,
    versions_ptr,
    num_tokens_ptr,
    out_ptr,
    tokens,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
    VERSIONS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T tokens, at least TAPS - 1, of BLOCK_C channels of the output `[T, CHANNELS]`.

    A thread has some channels to itself, and keeps each input in registers for all TAPS outputs
    that it takes part in. Only the programs of the first tokens read the state, and they replace
    it, or its version 0, so nothing races.
    """
    # Its programs are short, and the next kernel's are launched meanwhile.
    start_next()
    block = tl.program_id(0)
    count = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS)
    first = block == 0
    has_state = first & (count > 0)  # without a valid row the state is neither read nor replaced
    state_ptr = find_conv_state(state_ptr, slots_ptr, CHANNELS, TAPS, VERSIONS)
    old_ptr = find_conv_version(state_ptr, versions_ptr, CHANNELS, VERSIONS)
    start = block.to(tl.int64) * BLOCK_T
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < CHANNELS
    tap = tl.arange(0, TAPS_P2)[None, :]
    weight = tl.load(
        weight_ptr + channel[:, None] * TAPS + tap,
        mask=in_channels[:, None] & (tap < TAPS),
        other=0.0,
    ).to(tl.float32)
    taps, window = (), ()
    for i in tl.static_range(TAPS):
        taps += (tl.sum(tl.where(tap == i, weight, 0.0), 1),)
    for i in tl.static_range(TAPS - 1):
        old = tl.load(old_ptr + i * CHANNELS + channel, mask=in_channels & has_state, other=0.0)
        window += (old,)
    wait_for_previous()
    valid = tl.minimum(count - start, BLOCK_T).to(tl.int32)
    tile = x_ptr + start * ROW + channel
    inputs = ()
    for i in tl.static_range(BLOCK_T + TAPS - 1):
        inside = in_channels & (i - (TAPS - 1) < valid)
        if i < TAPS - 1:
            inside = inside & (not first)
        x = tl.load(tile + (i - (TAPS - 1)) * ROW, mask=inside, other=0.0)
        if i < TAPS - 1:
            x = tl.where(first, window[i], x)
        inputs += (x,)
    out = out_ptr + start * CHANNELS + channel
    for i in tl.static_range(BLOCK_T):
        y = tl.zeros((BLOCK_C,), tl.float32)
        for j in tl.static_range(TAPS):
            y += inputs[i + j].to(tl.float32) * taps[j]
        inside = in_channels & (i < tokens - start)
        tl.store(out + i * CHANNELS, silu(y).to(out_ptr.dtype.element_ty), mask=inside)
    if has_state:
        update_conv_state(
            x_ptr, old_ptr, state_ptr, count, channel, in_channels, ROW, CHANNELS, TAPS, TAPS_P2
        )


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    num_tokens: torch.Tensor | None = None,
    versions: torch.Tensor | None = None,
    each_row: bool = False,
) -> torch.Tensor:
    """`ops.causal_conv1d`: `[B R, C]` in x's dtype, in one launch.

    B or R is 1 or, with each_row, R is at most 4. A version below or above those that there are
    counts as the first or the last.

    Args:
        x: `[B R, C or more]`, bf16 or fp32, contiguous rows; columns from C on are ignored.
        weight: `[C, W]`; state: `[S, W - 1, C]` or `[S, W - 2 + V, C]`, updated in place.
        slots: `int32 [B]`; num_tokens, versions: `int64 [B]` or None.

    Raises:
        ValueError: sequences have other rows, or each_row without versions or with too few.
    """
    rows = count_decode_rows(x.shape[0], slots.shape[0], each_row)
    check_each_row(each_row, rows, versions, count_conv_versions(state, weight.shape[1]))
    if rows:
        return conv_decode(x, weight, state, slots, num_tokens, versions, rows)
    tokens, (channels, taps) = x.shape[0], weight.shape
    out = x.new_empty((tokens, channels))
    config = find_config("causal_conv1d", tokens=tokens)
    config["BLOCK_T"] = max(config["BLOCK_T"], triton.next_power_of_2(taps - 1))
    launch(
        _causal_conv1d_kernel,
        (cdiv(tokens, config["BLOCK_T"]), cdiv(channels, config["BLOCK_C"])),
        x,
        weight,
        state,
        slots,
        versions,
        slots if num_tokens is None else num_tokens,
        out,
        tokens,
        ROW=x.stride(0),
        CHANNELS=channels,
        TAPS=taps,
        TAPS_P2=triton.next_power_of_2(taps),
        VERSIONS=count_conv_versions(state, taps),
        HAS_NUM_TOKENS=num_tokens is not None,
        **config,
    )
    return out

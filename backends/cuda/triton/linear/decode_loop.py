"""A linear layer with INT4 or INT8 weights on a few rows, in one launch.

The weights are read once, into the registers in which they are used, as for one row (`decode.py`).
Then one row after the other is normed, quantized and multiplied by the instructions of that kernel:
a row gets the bits that it gets alone. What a row costs is the barriers of its reductions; a launch
ahead that quantizes all rows costs more (docs/performance.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d.decode import (
    count_conv_versions,
    find_conv_state,
    find_conv_version,
    load_conv_window,
    store_convolved,
)
from et_moe.backends.cuda.triton.common.dependent_launch import (
    prefetch,
    prefetch_each,
    wait_for_previous,
)
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.common.tokens import find_sequence
from et_moe.backends.cuda.triton.linear.decode import (
    floor_power_of_two,
    multiply_row,
    order_row,
    point_to_weights,
    supports_k,
)
from et_moe.backends.cuda.triton.linear.words import forget_words
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _gemv_loop_kernel(
    x,
    norm_weight,
    weight,
    weight_scale,
    residual,
    conv_weight,
    conv_state,
    conv_slots,
    conv_versions,
    num_tokens,
    out,
    eps,
    M,
    N,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    VERSIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """RMSNorm, quantization, product and residual of M rows, and perhaps a convolution; see
    `_gemv_kernel`.

    With conv_weight the rows are sequences of TOKENS tokens, whose first CHANNELS results are
    convolved over time; each token leaves a version of its sequence's state.

    How many registers a thread has decides how many programs a multiprocessor has, and whether all
    run at once. So weights stay packed, and what a row needs besides is loaded for each row, most
    of it from the L1 cache.
    """
    HALF: tl.constexpr = 128
    TILES: tl.constexpr = BLOCKS * 8 // BITS
    RUNS: tl.constexpr = BLOCKS // SPAN
    PIECES: tl.constexpr = SPAN * (HALF // 16)
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    # The last program overlaps its neighbour; both store the same, and the neighbour convolves.
    own_n, first_n, weight, weight_scale = point_to_weights(
        weight, weight_scale, N, BLOCKS, SPAN, GROUP, BITS, BLOCK_N, 1
    )
    at = tl.arange(0, TILES)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    w, scales = tl.load(weight, eviction_policy="evict_first"), tl.load(weight_scale)
    n = first_n + tl.arange(0, BLOCK_N)
    if norm_weight is not None:
        prefetch(norm_weight, TILES * HALF * norm_weight.dtype.element_ty.primitive_bitwidth // 8)
    # The next row is on its way while one is multiplied; but with the state of each row's sequence
    # a thread would need more registers than three programs on a multiprocessor have.
    AHEAD: tl.constexpr = conv_weight is None or TOKENS > 1
    wait_for_previous()
    following = tl.load(x + at)
    for m in tl.range(0, M, num_stages=1):
        value = following if AHEAD else tl.load(x + m * (TILES * HALF) + at)
        value = value.to(tl.float32)
        if residual is not None:
            addend = tl.load(residual + m * N + n)
        if conv_weight is not None:
            sequence, token = find_sequence(m, TOKENS)
            count = TOKENS
            if num_tokens is not None:
                count = tl.load(num_tokens + sequence)
            state = find_conv_state(conv_state, conv_slots + sequence, CHANNELS, TAPS, VERSIONS)
            versions = None if conv_versions is None else conv_versions + sequence
            old = find_conv_version(state, versions, CHANNELS, VERSIONS)
            if TOKENS > 1:  # a token goes on from the version that the one before it has left
                old = tl.where(token == 0, old, state + (token - 1) * CHANNELS)
            if (token == 0) & (count > 0):
                inside = tl.minimum(n, CHANNELS - 1)
                prefetch_each(conv_weight + inside * TAPS)
                for tap in tl.static_range(TAPS - 1):
                    prefetch_each(old + tap * CHANNELS + inside)
        if norm_weight is not None:
            gain = tl.load(norm_weight + at)
            squares = tl.sum(tl.reshape(value * value, (TILES * HALF,)), axis=0)
            value = apply_rms_norm(value, gain, squares / (TILES * HALF), eps, x.dtype.element_ty)
        q, q0, x_scales = order_row(value, 1, RUNS, SPAN, BITS)
        if AHEAD:  # behind the last row it is unused
            following = tl.load(x + tl.minimum(m + 1, M - 1) * (TILES * HALF) + at)
        if BITS == 4:
            w, scales = forget_words(w), forget_words(scales)
        y = multiply_row(w, scales, q, q0, x_scales, 1, BITS, SCALE_TYPE)
        if residual is not None:
            y += addend.to(tl.float32)
        y = y.to(out.dtype.element_ty)
        target = out + m * N
        if conv_weight is None:
            store_once(target + n, y, n >= 0, PIECES)
        else:
            own = n >= own_n
            window = load_conv_window(conv_weight, old, n, own & (token < count), CHANNELS, TAPS)
            store_convolved(
                *(y, window, state, target, n, own, CHANNELS, TAPS, PIECES, token, count)
            )
            if TOKENS > 1:
                tl.debug_barrier()  # until the next token can read what this one has left


class ConvRows(NamedTuple):
    """A `causal_conv1d` of a few rows, whose result takes the place of the first C columns.

    Attributes:
        weight: `[C, W]`; state: `[S, W - 2 + V, C]`, updated in place.
        slots: `int32 [B]`; versions, num_tokens: `int64 [B]` or None.
        tokens: rows of a sequence, each of which leaves a version.
    """

    weight: torch.Tensor
    state: torch.Tensor
    slots: torch.Tensor
    versions: torch.Tensor | None
    num_tokens: torch.Tensor | None
    tokens: int


def supports_loop(n: int, k: int, bits: int, planes: int) -> bool:
    """Whether `linear_decode_loop` takes a weight `[N, K]` of 4 or 8 bits and activations of so
    many planes.

    It does where `linear_decode` takes it, one block of results a program. With several a program
    would have the rows wait for the weights, or read these again for each of them. And two planes
    beside the next row and the weights are more than the registers hold.
    """
    repeat = find_config(f"linear_w{bits}_gemv", out_features=n)["REPEAT"]
    return planes == 1 and supports_k(k) and repeat == 1


def linear_decode_loop(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    conv: ConvRows | None = None,
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[T, K]`, `supports_loop` given.

    Args:
        group_size: None for INT8 weights.
        conv: a convolution behind it, or None.

    Returns:
        `[T, N]` in x's dtype.
    """
    n, blocks = weight.shape[0], weight.shape[1] // 128
    bits = 8 if group_size is None else 4
    config = find_config(f"linear_w{bits}_gemv", out_features=n)
    config.pop("REPEAT")
    block_n = min(config.pop("BLOCK_ROWS") // blocks, floor_power_of_two(n))
    channels, taps = (0, 1) if conv is None else conv.weight.shape
    out = x.new_empty((x.shape[0], n))
    launch(
        _gemv_loop_kernel,
        (cdiv(n, block_n),),
        x,
        norm_weight,
        weight,
        scale,
        residual,
        *((None,) * 5 if conv is None else conv[:5]),
        out,
        eps,
        x.shape[0],
        n,
        CHANNELS=channels,
        TAPS=taps,
        VERSIONS=1 if conv is None else count_conv_versions(conv.state, taps),
        TOKENS=1 if conv is None else conv.tokens,
        BLOCKS=blocks,
        SPAN=min(config.pop("SPAN"), blocks),
        GROUP=group_size,
        BITS=bits,
        BLOCK_N=block_n,
        **config,
    )
    return out

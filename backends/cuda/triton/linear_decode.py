"""A linear layer with INT4 weights on one row: all of it in one launch, a convolution behind it
included."""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d import conv_window, store_convolved
from et_moe.backends.cuda.triton.dependent_launch import prefetch, wait_for_previous
from et_moe.backends.cuda.triton.int4 import NIBBLE_SCALE, high_nibbles, low_nibbles
from et_moe.backends.cuda.triton.launch import cdiv, launch
from et_moe.backends.cuda.triton.linear_layout import scale_pair
from et_moe.backends.cuda.triton.row_quantization import normed, plane_dot, quantized
from et_moe.backends.cuda.triton.tuning import tuned


@triton.jit
def _w4_gemv_kernel(
    x,
    norm_weight,
    weight,
    weight_scale,
    residual,
    conv_weight,
    conv_state,
    out,
    eps,
    N,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_P2: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """A linear layer on one row in one launch: RMSNorm, quantization, product, residual.

    K is BLOCKS blocks of 256 columns, the weight a flat `[N BLOCKS, 128]` of bytes. All of it is
    multiplied with all of x as `[128, COLUMNS]`, column c holding block c (the matrix unit computes
    eight columns anyway), and of a weight's row the column of its own block is kept. So the work
    spreads over the whole of K and every byte of the weight is read once, in order.
    With conv_weight the row is one token, whose first CHANNELS columns are convolved over time.
    """
    HALF: tl.constexpr = 128
    ROWS: tl.constexpr = BLOCK_N * BLOCKS
    STEPS: tl.constexpr = HALF // GROUP
    flat, rows_n = tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
    j, steps = tl.arange(0, HALF), tl.arange(0, STEPS)
    first_n = min(tl.program_id(0) * (BLOCK_N * REPEAT), N - BLOCK_N * REPEAT)
    start = weight + first_n.to(tl.int64) * (BLOCKS * HALF)
    weight = start + (flat[:, None] * HALF + j[None, :])
    weight_scale += (flat % BLOCKS * STEPS)[:, None] * N + (first_n + flat // BLOCKS)[:, None]
    weight_scale += steps[None, :] * N
    target = out + (first_n + rows_n)
    column = tl.arange(0, COLUMNS)
    at = column[:, None] * (2 * HALF) + j[None, :]
    valid = column[:, None] < BLOCKS
    # All loads are on their way before the first value is needed, the weights' before x exists.
    # The weights are read once: what kernels hand on stays in the L2 cache instead.
    w, scales = tl.load(weight, eviction_policy="evict_first"), tl.load(weight_scale)
    if REPEAT > 1:
        prefetch(start + ROWS * HALF, ROWS * HALF)
    if norm_weight is not None:
        low_gain = tl.load(norm_weight + at, mask=valid, other=0.0)
        high_gain = tl.load(norm_weight + HALF + at, mask=valid, other=0.0)
    if conv_weight is not None:
        n = first_n + tl.arange(0, BLOCK_N * REPEAT)
        # Columns that the last program shares with its neighbour are the neighbour's.
        own_n = n >= tl.program_id(0) * (BLOCK_N * REPEAT)
        taps, earlier = conv_window(conv_weight, conv_state, n, own_n, CHANNELS, TAPS, TAPS_P2)
        row = tl.zeros((BLOCK_N, REPEAT), tl.float32)
    wait_for_previous()
    low = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(x + HALF + at, mask=valid, other=0.0).to(tl.float32)
    if residual is not None:
        residual += first_n + rows_n
        addend = tl.load(residual)
    if norm_weight is not None:
        squares = tl.sum(tl.sum(low * low + high * high, axis=1), axis=0)
        mean = squares / (BLOCKS * 2 * HALF)
        low = normed(low, low_gain, mean, eps, x.dtype.element_ty)
        high = normed(high, high_gain, mean, eps, x.dtype.element_ty)
    low, low_scale = quantized(low, PLANES)
    high, high_scale = quantized(high, PLANES)
    low_scale, high_scale = low_scale * NIBBLE_SCALE, high_scale * NIBBLE_SCALE

    own = (flat % BLOCKS)[:, None] == column[None, :]
    for i in tl.static_range(REPEAT):
        if i + 1 < REPEAT:
            next_w = tl.load(weight + (i + 1) * (ROWS * HALF), eviction_policy="evict_first")
            next_scales = tl.load(weight_scale + (i + 1) * BLOCK_N)
            if residual is not None:
                next_addend = tl.load(residual + (i + 1) * BLOCK_N)
        w = w.to(tl.int8, bitcast=True)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.static_range(STEPS):
            # Of x the columns of one step remain: that is cheaper than to cut the weights up.
            within = (j // GROUP == step)[None, :]
            pair = tl.sum(tl.where(steps[None, :] == step, scales, 0), axis=1)
            low_group, high_group = scale_pair(pair)
            d = plane_dot(low_nibbles(w), tl.where(within, low, 0), PLANES)
            acc += d.to(tl.float32) * low_scale[None, :] * low_group[:, None]
            d = plane_dot(high_nibbles(w), tl.where(within, high, 0), PLANES)
            acc += d.to(tl.float32) * high_scale[None, :] * high_group[:, None]
        y = tl.sum(tl.where(own, acc, 0.0), axis=1)
        y = tl.sum(tl.reshape(y, (BLOCK_N, BLOCKS)), axis=1)
        if residual is not None:
            y += addend.to(tl.float32)
        if conv_weight is None:
            tl.store(target + i * BLOCK_N, y.to(out.dtype.element_ty))
        else:
            row = tl.where(tl.arange(0, REPEAT)[None, :] == i, y[:, None], row)
        if i + 1 < REPEAT:
            w, scales = next_w, next_scales
            if residual is not None:
                addend = next_addend
    if conv_weight is not None:
        row = tl.reshape(tl.trans(row), (BLOCK_N * REPEAT,))
        store_convolved(row, taps, earlier, conv_state, out, n, own_n, CHANNELS, TAPS, TAPS_P2)


def power_of_two(limit: int) -> int:
    """The largest power of two that is not above `limit`."""
    return 1 << (limit.bit_length() - 1)


def takes(k: int) -> bool:
    """Whether `linear_decode` computes rows of k columns: 256, 512, ... up to 8192."""
    return k in (256, 512, 1024, 2048, 4096, 8192)


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
    conv: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`linear_w4a8` (one plane) or `linear_w4a16` (two) of x `[1, K]`, for K that it `takes`.

    Args:
        conv: weight `[C, W]` and state `[W-1, C]`, updated in place, of a `causal_conv1d` which
            takes the place of the first C columns, or None.
    """
    n, blocks = weight.shape[0], weight.shape[1] // 128
    config = tuned("linear_gemv", n)
    block_n = min(config.pop("BLOCK_ROWS") // blocks, power_of_two(n))
    repeat = min(config.pop("REPEAT"), power_of_two(n // block_n))
    conv_weight, conv_state = (None, None) if conv is None else conv
    channels, taps = (0, 1) if conv_weight is None else conv_weight.shape
    out = x.new_empty((1, n))
    launch(
        _w4_gemv_kernel,
        (cdiv(n, block_n * repeat),),
        x,
        norm_weight,
        weight,
        scale,
        residual,
        conv_weight,
        conv_state,
        out,
        eps,
        n,
        CHANNELS=channels,
        TAPS=taps,
        TAPS_P2=triton.next_power_of_2(taps),
        BLOCKS=blocks,
        COLUMNS=max(blocks, 8),
        GROUP=group_size,
        PLANES=planes,
        BLOCK_N=block_n,
        REPEAT=repeat,
        **config,
    )
    return out

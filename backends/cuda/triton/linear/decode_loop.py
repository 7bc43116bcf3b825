"""A linear layer with INT4 or INT8 weights on a few rows, in one launch.

The weights are read once, into the registers in which they are used, as for one row (`decode.py`).
Then one row after the other is normed, quantized and multiplied by the instructions of that kernel:
a row gets the bits that it gets alone. What a row costs is the barriers of its reductions; a launch
ahead that quantizes all rows costs more (docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.linear.decode import (
    floor_power_of_two,
    multiply_row,
    order_row,
    point_to_weights,
    supports_k,
)
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _gemv_loop_kernel(
    x,
    norm_weight,
    weight,
    weight_scale,
    residual,
    out,
    eps,
    M,
    N,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """RMSNorm, quantization, product and residual of M rows; see `_gemv_kernel`."""
    HALF: tl.constexpr = 128
    TILES: tl.constexpr = BLOCKS * 8 // BITS
    RUNS: tl.constexpr = BLOCKS // SPAN
    PIECES: tl.constexpr = SPAN * (HALF // 16)
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    # The last program overlaps its neighbour; both store the same.
    _, first_n, weight, weight_scale = point_to_weights(
        weight, weight_scale, N, BLOCKS, SPAN, GROUP, BITS, BLOCK_N, 1
    )
    at = tl.arange(0, TILES)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    w, scales = tl.load(weight, eviction_policy="evict_first"), tl.load(weight_scale)
    if norm_weight is not None:
        gain = tl.load(norm_weight + at)
    n = first_n + tl.arange(0, BLOCK_N)
    wait_for_previous()
    next_value = tl.load(x + at)
    for m in tl.range(0, M, num_stages=1):
        value = next_value.to(tl.float32)
        # The next row is on its way while this one is worked on; behind the last one it is unused.
        next_value = tl.load(x + tl.minimum(m + 1, M - 1) * (TILES * HALF) + at)
        if residual is not None:
            addend = tl.load(residual + m * N + n)
        if norm_weight is not None:
            squares = tl.sum(tl.reshape(value * value, (TILES * HALF,)), axis=0)
            value = apply_rms_norm(value, gain, squares / (TILES * HALF), eps, x.dtype.element_ty)
        q, q0, x_scales = order_row(value, 1, RUNS, SPAN, BITS)
        y = multiply_row(w, scales, q, q0, x_scales, 1, BITS, SCALE_TYPE)
        if residual is not None:
            y += addend.to(tl.float32)
        store_once(out + m * N + n, y.to(out.dtype.element_ty), n >= 0, PIECES)


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
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[T, K]`, `supports_loop` given.

    Args:
        group_size: None for INT8 weights.

    Returns:
        `[T, N]` in x's dtype.
    """
    n, blocks = weight.shape[0], weight.shape[1] // 128
    bits = 8 if group_size is None else 4
    config = find_config(f"linear_w{bits}_gemv", out_features=n)
    config.pop("REPEAT")
    block_n = min(config.pop("BLOCK_ROWS") // blocks, floor_power_of_two(n))
    out = x.new_empty((x.shape[0], n))
    launch(
        _gemv_loop_kernel,
        (cdiv(n, block_n),),
        x,
        norm_weight,
        weight,
        scale,
        residual,
        out,
        eps,
        x.shape[0],
        n,
        BLOCKS=blocks,
        SPAN=min(config.pop("SPAN"), blocks),
        GROUP=group_size,
        BITS=bits,
        BLOCK_N=block_n,
        **config,
    )
    return out

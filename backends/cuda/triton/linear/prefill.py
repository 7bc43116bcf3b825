"""Linear layers with INT4 weights on any number of rows: quantization, then a GEMM.

A row's results are the same bits in every configuration, for any number of rows and beside any
others: products of a step are integers, and their rescaled sums are added in the order of the
columns, a step's low nibbles before its high ones. It is not the order of `decode.py`, which
rescales the sums of 16 columns where this rescales those of 128, the whole group
(docs/performance.md says what one order for both would cost).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int4 import (
    extract_high_nibbles,
    extract_low_nibbles,
)
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.linear.decode import floor_power_of_two
from et_moe.backends.cuda.triton.linear.layout import (
    nibble_distance,
    point_to_scale_pairs,
    split_scale_pair,
)
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_rows
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def _w4_gemm_kernel(
    q,
    scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A rescaled integer GEMM plus residual, a `[BLOCK_M, BLOCK_N]` tile of out per program.

    The weights are the left operand. They go from shared memory through registers, where they are
    unpacked, into the matrix unit. GROUP_M tiles of rows run together and share the weights in the
    L2 cache. q and scale are those of `quantize_rows`, M padded to a
    multiple of BLOCK_M, and the scales of a tile side by side.
    """
    wait_for_previous()
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid, width = tl.program_id(0), GROUP_M * tiles_n
    first = pid // width * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    first_m = (first + pid % width % height) * BLOCK_M
    # The last tile overlaps its neighbour rather than reach past the end; both store the same.
    first_n = min(pid % width // height * BLOCK_N, N - BLOCK_N)
    rows_m, rows_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = tl.arange(0, STEP)
    padded_m = tiles_m * BLOCK_M
    q += first_m.to(tl.int64) * K + rows_m[:, None] * K + k[None, :]
    weight += first_n.to(tl.int64) * (K // 2) + rows_n[:, None] * (K // 2) + k[None, :]
    scale += first_m + rows_m
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    weight_scale = point_to_scale_pairs(weight_scale) + (first_n + rows_n)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # The number of stages stands here, not at the launch, so that scales are prefetched, too.
    for block in tl.range(0, K, 2 * HALF, num_stages=STAGES):
        for offset in tl.static_range(0, HALF, STEP):
            w = tl.load(weight + block // 2 + offset).to(tl.int8, bitcast=True)
            group_scales = split_scale_pair(
                tl.load(weight_scale + (block // 2 + offset) // STEP * N), SCALE_TYPE
            )
            for high in tl.static_range(2):
                begin = block + offset + high * HALF
                half_w = extract_high_nibbles(w) if high else extract_low_nibbles(w)
                row_scale = tl.load(scale + begin // TILE * padded_m)
                d = tl.dot(half_w, tl.trans(tl.load(q + begin)), out_dtype=tl.int32)
                if PLANES == 2:
                    low_plane = tl.trans(tl.load(q + padded_m.to(tl.int64) * K + begin))
                    d = tl.dot(half_w, low_plane, d << 7, out_dtype=tl.int32)
                acc += d.to(tl.float32) * row_scale[None, :] * group_scales[high][:, None]
    m, n = first_m + rows_m, first_n + rows_n
    acc = tl.trans(acc)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m[:, None] < M
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def linear_prefill(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
) -> torch.Tensor:
    """`linear_w4a8` (one plane) or `linear_w4a16` (two) of x `[T, K]`: `[T, N]` in x's dtype."""
    m, (n, padded_k) = x.shape[0], (weight.shape[0], 2 * weight.shape[1])
    config = find_config(f"linear_w4a{8 * planes}", tokens=m)
    block_m = config["BLOCK_M"]
    config["BLOCK_N"] = min(config["BLOCK_N"], floor_power_of_two(n))
    half = nibble_distance(padded_k)
    step = min(half, group_size)
    padded_m = cdiv(m, block_m) * block_m
    q, q_scale = quantize_rows(x, norm_weight, eps, padded_k, planes, padded_m, False, num_warps=4)
    out = x.new_empty((m, n))
    launch(
        _w4_gemm_kernel,
        (cdiv(m, block_m) * cdiv(n, config["BLOCK_N"]),),
        q,
        q_scale,
        weight,
        scale,
        residual,
        out,
        m,
        n,
        K=padded_k,
        GROUP=group_size,
        HALF=half,
        TILE=ACTIVATION_TILE,
        STEP=step,
        PLANES=planes,
        **config,
    )
    return out

"""Linear layers with INT4 or INT8 weights on any number of rows: quantization, then a GEMM.

A row's results are the same bits in every configuration, for any number of rows and beside any
others: products of a step are integers, and their rescaled sums are added in the order of the
columns, a step's low nibbles before its high ones. It is not the order of `decode.py`, which
rescales the sums of 16 columns where this rescales those of 128, the whole group or tile
(docs/performance.md says what one order for both would cost).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int4 import extract_high_nibbles, extract_low_nibbles
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.linear.decode import floor_power_of_two
from et_moe.backends.cuda.triton.linear.layout import (
    nibble_distance,
    point_to_scale_pairs,
    split_scale_pair,
)
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_rows
from et_moe.backends.cuda.triton.linear.tiles import place_tile, store_tile
from et_moe.backends.cuda.triton.linear.words import multiply_apart
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def unpack_bytes(w, PART: tl.constexpr, BITS: tl.constexpr):
    """The INT8 weights of one part of a block, see `words.py`, of its bytes as int8."""
    if BITS == 8:
        return w
    elif PART == 0:
        return extract_low_nibbles(w)
    else:
        return extract_high_nibbles(w)


@triton.jit
def _gemm_kernel(
    q,
    scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A rescaled integer GEMM plus residual, a `[BLOCK_M, BLOCK_N]` tile of out per program.

    The weights are the left operand. INT4 ones go from shared memory through registers, where they
    are unpacked, into the matrix unit. q and scale are those of `quantize_rows`, M padded to a
    multiple of BLOCK_M, K to what the steps cover, and the scales of a tile side by side. A row of
    the weight has ROW_BYTES bytes.
    """
    wait_for_previous()
    first_m, first_n = place_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows_m, rows_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    k = tl.arange(0, STEP)
    padded_m = tl.cdiv(M, BLOCK_M) * BLOCK_M
    q += first_m.to(tl.int64) * K + rows_m[:, None] * K + k[None, :]
    PARTS: tl.constexpr = 8 // BITS
    weight += first_n.to(tl.int64) * ROW_BYTES + rows_n[:, None] * ROW_BYTES + k[None, :]
    scale += first_m + rows_m
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    if BITS == 4:
        weight_scale = point_to_scale_pairs(weight_scale)
    weight_scale += first_n + rows_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # The number of stages stands here, not at the launch, so that scales are prefetched, too.
    for block in tl.range(0, K, PARTS * HALF, num_stages=STAGES):
        for offset in tl.static_range(0, HALF, STEP):
            at = block // PARTS + offset
            if ROW_BYTES * PARTS < K:
                w = tl.load(weight + at, mask=(at + k < ROW_BYTES)[None, :], other=0)
            else:
                w = tl.load(weight + at)
            w = w.to(tl.int8, bitcast=True)
            if BITS == 4:
                group_scales = split_scale_pair(tl.load(weight_scale + at // STEP * N), SCALE_TYPE)
            for part in tl.static_range(PARTS):
                begin = block + offset + part * HALF
                part_w = unpack_bytes(w, part, BITS)
                row_scale = tl.load(scale + begin // TILE * padded_m)
                d = tl.dot(part_w, tl.trans(tl.load(q + begin)), out_dtype=tl.int32)
                if PLANES == 2:
                    low_plane = tl.trans(tl.load(q + padded_m.to(tl.int64) * K + begin))
                    d = tl.dot(part_w, low_plane, d << 7, out_dtype=tl.int32)
                if BITS == 4:
                    acc += d.to(tl.float32) * row_scale[None, :] * group_scales[part][:, None]
                else:
                    acc += d.to(tl.float32) * row_scale[None, :]
    if BITS == 8:
        row_scales = tl.load(weight_scale).to(tl.float32)
        acc = multiply_apart(acc, tl.broadcast_to(row_scales[:, None], (BLOCK_N, BLOCK_M)))
    store_tile(acc, residual, out, first_m, first_n, M, N, BLOCK_M, BLOCK_N)


def linear_prefill(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[T, K]`: `[T, N]` in x's dtype.

    Args:
        group_size: None for INT8 weights; planes: INT8 planes of the activations.
    """
    m, (n, row_bytes) = x.shape[0], weight.shape
    if group_size is None:
        bits, half = 8, ACTIVATION_TILE
        step, padded_k = half, cdiv(row_bytes, half) * half
    else:
        bits, padded_k = 4, 2 * row_bytes
        half = nibble_distance(padded_k)
        step = min(half, group_size)
    config = find_config(f"linear_w{bits}a{8 * planes}", tokens=m)
    block_m = config["BLOCK_M"]
    config["BLOCK_N"] = min(config["BLOCK_N"], floor_power_of_two(n))
    padded_m = cdiv(m, block_m) * block_m
    q, q_scale = quantize_rows(x, norm_weight, eps, padded_k, planes, padded_m, False, 4, bits)
    out = x.new_empty((m, n))
    launch(
        _gemm_kernel,
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
        ROW_BYTES=row_bytes,
        GROUP=group_size,
        HALF=half,
        TILE=ACTIVATION_TILE,
        STEP=step,
        BITS=bits,
        PLANES=planes,
        **config,
    )
    return out

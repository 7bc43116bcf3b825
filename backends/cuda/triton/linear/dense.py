"""Linear layers with float weights: a GEMV kernel on a few rows, a GEMM on more.

An RMSNorm in front is a launch of its own. While it runs, the weights for a few rows are on their
way into registers.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import add_dot
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.common.tokens import LINEAR_ROWS
from et_moe.backends.cuda.triton.linear.decode import floor_power_of_two
from et_moe.backends.cuda.triton.linear.op import check_norm_and_residual
from et_moe.backends.cuda.triton.linear.row_quantization import rms_norm
from et_moe.backends.cuda.triton.linear.tiles import place_tile, store_tile
from et_moe.backends.cuda.triton.tuning import find_config, find_largest

_WARP_BYTES = 512
"""What a warp loads at once, 16 bytes a thread."""
_MAX_ROW_BYTES = 1 << 14
"""Of the weight of a few rows: a warp keeps a row of it in registers."""


@triton.jit
def _dense_rows_kernel(
    x,
    weight,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Product and residual of M rows, up to ROWS, for BLOCK_N columns of out.

    A warp has STEP columns of a row of the weight at a time. All rows of x take the same
    instructions, so what a row gets does not depend on the others.
    """
    PIECES: tl.constexpr = STEP * weight.dtype.element_ty.primitive_bitwidth // 128
    # The last program overlaps its neighbour; both store the same.
    first_n = min(tl.program_id(0) * BLOCK_N, N - BLOCK_N)
    block_n = tl.arange(0, BLOCK_N)
    # There are BLOCK_N times the columns, so that each thread loads those of x that it needs.
    column = tl.broadcast_to(tl.arange(0, STEP)[None, :], (BLOCK_N, STEP))
    weight += first_n.to(tl.int64) * K + block_n[:, None] * K + column
    w = ()
    for begin in tl.static_range(0, K, STEP):
        w += (tl.load(weight + begin, eviction_policy="evict_first"),)
    wait_for_previous()
    for m in tl.static_range(ROWS):
        # Rows past the end are read as the last one; their results are not stored.
        row = x + tl.minimum(m, M - 1) * K + column
        acc = tl.zeros((BLOCK_N, STEP), tl.float32)
        for i in tl.static_range(K // STEP):
            values = tl.load(row + i * STEP).to(tl.float32)
            acc = tl.fma(w[i].to(tl.float32), values, acc)
        y = tl.sum(acc, axis=1)
        at = m * N + first_n + block_n
        inside = (block_n >= 0) & (m < M)
        if residual is not None:
            y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        store_once(out + at, y.to(out.dtype.element_ty), inside, PIECES)


@triton.jit
def _dense_gemm_kernel(
    x,
    weight,
    residual,
    out,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A GEMM in x's dtype plus residual, a `[BLOCK_M, BLOCK_N]` tile of out per program."""
    wait_for_previous()
    first_m, first_n = place_tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows_n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows past the end are read as the last one.
    rows_m = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1)
    x += rows_m.to(tl.int64)[:, None] * K + k[None, :]
    weight += first_n.to(tl.int64) * K + rows_n[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = None if K % BLOCK_K == 0 else (begin + k < K)[None, :]
        other = None if K % BLOCK_K == 0 else 0.0
        w = tl.load(weight + begin, mask=inside, other=other)
        a = tl.load(x + begin, mask=inside, other=other)
        acc = add_dot(w, tl.trans(a), acc, out)
    store_tile(acc, residual, out, first_m, first_n, M, N, BLOCK_M, BLOCK_N)


def _check(x, weight, norm_weight, residual) -> None:
    (n, k), columns = weight.shape, x.shape[1]
    if k != columns:
        raise ValueError(f"weight has {k} columns, expected {columns}, those of x")
    if weight.dtype not in (x.dtype, torch.bfloat16):
        raise ValueError(f"weight is {weight.dtype}, expected bfloat16 or x's dtype, {x.dtype}")
    check_norm_and_residual(n, k, norm_weight, residual)


def _run_rows(x, weight, residual, out, rows: int, step: int) -> None:
    (n, k), m = weight.shape, x.shape[0]
    config = find_config("linear_dense_rows", out_features=n)
    block_n = min(config.pop("BLOCK_N"), floor_power_of_two(n))
    launch(
        _dense_rows_kernel,
        (cdiv(n, block_n),),
        x,
        weight,
        residual,
        out,
        m,
        n,
        K=k,
        STEP=step,
        BLOCK_N=block_n,
        ROWS=triton.next_power_of_2(rows),
        **config,
    )


def _run_gemm(x, weight, residual, out) -> None:
    (n, k), m = weight.shape, x.shape[0]
    table = "linear_dense_fp32" if x.dtype == torch.float32 else "linear_dense"
    config = find_config(table, tokens=m)
    config["BLOCK_N"] = min(config["BLOCK_N"], floor_power_of_two(n))
    grid = cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"])
    launch(_dense_gemm_kernel, (grid,), x, weight, residual, out, m, n, K=k, **config)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.linear` in one launch, or in two with a norm.

    Args:
        x: `[T, K]`, bf16 or fp32; norm_weight `[K]`, and residual `[T, N]` contiguous.
        weight: `[N, K]`, contiguous, in bf16 or x's dtype.

    Returns:
        `[T, N]` in x's dtype.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    _check(x, weight, norm_weight, residual)
    x = x.contiguous() if norm_weight is None else rms_norm(x, norm_weight, eps)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    rows, step = find_largest(x.shape[0]), _WARP_BYTES // weight.itemsize
    row_bytes = weight.shape[1] * weight.itemsize
    if rows <= LINEAR_ROWS and row_bytes % _WARP_BYTES == 0 and row_bytes <= _MAX_ROW_BYTES:
        _run_rows(x, weight, residual, out, rows, step)
    else:
        _run_gemm(x, weight, residual, out)
    return out

"""A linear layer with INT4 or INT8 weights on 5 to 16 rows: quantization, then products at once.

A loop over K, as of the GEMM for more rows (`prefill.py`), takes a step's whole latency each time.
Here a program has all weights of a few columns of out on their way before the rows exist, and the
products of all steps are independent of each other: each warp has steps of its own. The sum over
the steps comes last, in one order, so that a row's bits depend on no other row.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.tokens import DECODE_TOKENS
from et_moe.backends.cuda.triton.linear.layout import point_to_scale_pairs, split_scale_pair
from et_moe.backends.cuda.triton.linear.prefill import unpack_bytes
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_rows
from et_moe.backends.cuda.triton.linear.tiles import store_tile
from et_moe.backends.cuda.triton.linear.words import multiply_apart
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def _at_once_kernel(
    q,
    scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    ROW_BYTES: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A rescaled integer product plus residual: all M rows, at most ROWS, of BLOCK_N columns.

    q is int8 `[PLANES, ROWS, K]` and scale fp32 `[K / TILE, ROWS]`, as from `quantize_rows`. A row
    of the weight has ROW_BYTES bytes, STEP of which share scales; its blocks have TILE bytes.
    """
    STEPS: tl.constexpr = ROW_BYTES // STEP
    PARTS: tl.constexpr = 8 // BITS
    K: tl.constexpr = ROW_BYTES * PARTS
    # The last program overlaps its neighbour; both store the same.
    first_n = min(tl.program_id(0) * BLOCK_N, N - BLOCK_N)
    step, n, m = tl.arange(0, STEPS), tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
    byte = tl.arange(0, STEP)[None, None, :]
    weight += first_n.to(tl.int64) * ROW_BYTES
    at = n[None, :, None] * ROW_BYTES + step[:, None, None] * STEP + byte
    w = tl.load(weight + at, eviction_policy="evict_first").to(tl.int8, bitcast=True)
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    if BITS == 4:
        pairs = point_to_scale_pairs(weight_scale) + first_n
        group_scales = split_scale_pair(tl.load(pairs + step[:, None] * N + n), SCALE_TYPE)
    else:
        group_scales = (tl.load(weight_scale + first_n + n).to(tl.float32),)
    wait_for_previous()
    acc = tl.zeros((STEPS, BLOCK_N, ROWS), tl.float32)
    for part in tl.static_range(PARTS):
        # The columns of a step, and the tile that they lie in.
        column = step * STEP // TILE * (PARTS * TILE) + part * TILE + step * STEP % TILE
        row_scale = tl.load(scale + (column // TILE * ROWS)[:, None] + m[None, :])
        rows = q + m[None, :, None] * K + column[:, None, None] + byte
        part_w = unpack_bytes(w, part, BITS)
        d = tl.dot(part_w, tl.permute(tl.load(rows), (0, 2, 1)), out_dtype=tl.int32)
        if PLANES == 2:
            low_plane = tl.permute(tl.load(rows + ROWS * K), (0, 2, 1))
            d = tl.dot(part_w, low_plane, d << 7, out_dtype=tl.int32)
        if BITS == 4:
            factor = row_scale[:, None, :] * group_scales[part][:, :, None]
            acc = tl.fma(d.to(tl.float32), factor, acc)
        else:
            acc = tl.fma(d.to(tl.float32), tl.broadcast_to(row_scale[:, None, :], acc.shape), acc)
    y = tl.sum(acc, axis=0)
    if BITS == 8:
        y = multiply_apart(y, tl.broadcast_to(group_scales[0][:, None], (BLOCK_N, ROWS)))
    store_tile(y, residual, out, 0, first_n, M, N, ROWS, BLOCK_N)


def supports_at_once(n: int, k: int) -> bool:
    """Whether `linear_at_once` takes a weight `[N, K]`: K is 256 times a power of two, up to 8192,
    and there are columns enough for a program."""
    return k in (256, 512, 1024, 2048, 4096, 8192) and n >= 16


def linear_at_once(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
) -> torch.Tensor:
    """A linear layer (`op.py`) on up to `DECODE_TOKENS` rows, `supports_at_once` given.

    Args:
        group_size: None for INT8 weights; planes: INT8 planes of the activations.

    Returns:
        `[T, N]` in x's dtype.
    """
    (m, k), (n, row_bytes) = x.shape, weight.shape
    bits = 8 if group_size is None else 4
    config = find_config(f"linear_w{bits}_at_once", row_bytes=row_bytes)
    q, q_scale = quantize_rows(x, norm_weight, eps, k, planes, DECODE_TOKENS, False, 4, bits)
    out = x.new_empty((m, n))
    launch(
        _at_once_kernel,
        (cdiv(n, config["BLOCK_N"]),),
        q,
        q_scale,
        weight,
        scale,
        residual,
        out,
        m,
        n,
        ROW_BYTES=row_bytes,
        STEP=ACTIVATION_TILE if group_size is None else min(ACTIVATION_TILE, group_size),
        TILE=ACTIVATION_TILE,
        BITS=bits,
        PLANES=planes,
        ROWS=DECODE_TOKENS,
        **config,
    )
    return out

"""A linear layer with INT4 or INT8 weights on 5 to 16 rows: quantization, then one product.

What takes the time of a GEMM of so few rows is its steps, each behind the one before it. Here a
program has all of its weights at once, on their way before the rows are quantized, and a warp has
blocks of columns of its own. Bytes go from memory into the registers in which the matrix unit takes
them. That is possible because a product does not depend on the order of its columns, as long as
weights and activations have the same: see `_order_columns`.

A row's results are the same bits for any number of rows and beside any others: a block's products
are integers, a warp adds up its rescaled blocks in the order of the columns, and then the warps'
sums are added up. For up to 4 rows and for more than 16 the order is another (docs/performance.md).
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.quantized_rows import QuantizedRows, RowFormat
from et_moe.backends.cuda.triton.linear.decode import floor_power_of_two, supports_k
from et_moe.backends.cuda.triton.linear.layout import point_to_scale_pairs, split_scale_pair
from et_moe.backends.cuda.triton.linear.prefill import unpack_bytes
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_rows
from et_moe.backends.cuda.triton.linear.words import multiply_apart
from et_moe.backends.cuda.triton.tuning import find_config
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def _point_to_blocks(base, ROW_BYTES, STRIDE, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Pointers to a block of 128 columns of each warp, `[ROWS / 8, 2, WARPS, 8, 64]`.

    The order of dimensions is that in which Triton gives them lanes and warps: a warp's lanes hold
    16 bytes each of 8 rows. The first dimension is which 8 rows, the second which half of a block.

    Args:
        base: pointer to bytes of rows, ROW_BYTES apart; STRIDE: bytes from warp to warp.
    """
    eight = tl.arange(0, ROWS // 8)[:, None, None, None, None]
    half = tl.arange(0, 2)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    row = tl.arange(0, 8)[None, None, None, :, None]
    byte = tl.arange(0, 64)[None, None, None, None, :]
    return base + (eight * 8 + row) * ROW_BYTES + warp * STRIDE + (half * 64 + byte)


@triton.jit
def _order_columns(blocks):
    """Blocks as from `_point_to_blocks` as operands of a product, `[WARPS, ROWS, 128]`.

    Of 32 columns of an operand a lane holds four and the four that lie 16 behind these (PTX ISA,
    "Matrix Fragments for mma.m16n8k32"). So columns get the order in which a lane's 16 bytes are
    four runs of four columns, two for each of two products, and nothing moves between lanes.
    """
    ROWS: tl.constexpr = blocks.shape[0] * 8
    WARPS: tl.constexpr = blocks.shape[2]
    words = tl.reshape(blocks, (ROWS // 8, 2, WARPS, 8, 4, 4, 4)).permute(2, 0, 3, 1, 5, 4, 6)
    return tl.reshape(words, (WARPS, ROWS, 128))


@triton.jit
def _load_scales(base, STRIDE, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Loads a scale of each row and warp, `[ROWS / 8, WARPS, 8, 4]`, into the lanes that have the
    row's products: the last dimension is four copies. STRIDE: scales from warp to warp."""
    eight = tl.arange(0, ROWS // 8)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    row = tl.arange(0, 8)[None, None, :, None]
    at = tl.broadcast_to(eight * 8 + row + warp * STRIDE, (ROWS // 8, WARPS, 8, 4))
    # Without the hint, scales would be loaded in another layout.
    return tl.load(tl.max_contiguous(base + at, (1, 1, 1, 1)))


@triton.jit
def _spread_scales(scales, COLUMNS: tl.constexpr):
    """Scales as from `_load_scales` for products `[WARPS, ROWS, COLUMNS]`."""
    ROWS: tl.constexpr = scales.shape[0] * 8
    WARPS: tl.constexpr = scales.shape[1]
    scales = scales.permute(1, 0, 2, 3).reshape((WARPS, ROWS, 1, 4, 1))
    scales = tl.broadcast_to(scales, (WARPS, ROWS, COLUMNS // 8, 4, 2))
    return tl.reshape(scales, (WARPS, ROWS, COLUMNS))


@triton.jit
def _few_rows_kernel(
    q,
    q_scale,
    weight,
    weight_scale,
    residual,
    out,
    M,
    N,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Product and residual of M rows, up to ROWS, for BLOCK_N columns of out.

    q is int8 `[ROWS, K]` and q_scale fp32 `[K / 128, ROWS]`, as from `quantize_rows`; rows from M
    on are anything. A row of the weight is BLOCKS blocks of 128 bytes, of which each of WARPS warps
    has as many, one behind the other.
    """
    PARTS: tl.constexpr = 8 // BITS
    EACH: tl.constexpr = BLOCKS // WARPS
    K: tl.constexpr = BLOCKS * PARTS * 128
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    # The last program overlaps its neighbour; both store the same.
    first_n = min(tl.program_id(0) * BLOCK_N, N - BLOCK_N)
    rows = weight + first_n.to(tl.int64) * (BLOCKS * 128)
    rows = _point_to_blocks(rows, BLOCKS * 128, EACH * 128, BLOCK_N, WARPS)
    if BITS == 4:
        pairs = point_to_scale_pairs(weight_scale) + first_n
    else:
        row_scales = _load_scales(weight_scale + first_n, 0, BLOCK_N, WARPS)
    w, scales = (), ()
    for i in tl.static_range(EACH):
        block = tl.load(rows + i * 128, eviction_policy="evict_first")
        w += (block.to(tl.int8, bitcast=True),)
        if BITS == 4:
            scales += (_load_scales(pairs + i * N, EACH * N, BLOCK_N, WARPS),)
    m = tl.arange(0, ROWS)
    n = first_n + tl.arange(0, BLOCK_N)
    at = m[None, :] * N + n[:, None]
    inside = m[None, :] < M
    if residual is not None:
        addend = tl.load(residual + at, mask=inside, other=0.0)
    wait_for_previous()
    warp = tl.arange(0, WARPS)
    acc = tl.zeros((WARPS, BLOCK_N, ROWS), tl.float32)
    for i in tl.static_range(EACH):
        if BITS == 4:
            part_scales = split_scale_pair(scales[i], SCALE_TYPE)
        for part in tl.static_range(PARTS):
            columns = q + (i * PARTS + part) * 128
            x = tl.load(_point_to_blocks(columns, K, EACH * PARTS * 128, ROWS, WARPS))
            part_w = _order_columns(unpack_bytes(w[i], part, BITS))
            d = tl.dot(part_w, tl.trans(_order_columns(x), (0, 2, 1)), out_dtype=tl.int32)
            tile = (warp * EACH + i) * PARTS + part
            row_scale = tl.load(q_scale + (tile[:, None] * ROWS + m[None, :]))[:, None, :]
            if BITS == 4:
                acc += d.to(tl.float32) * row_scale * _spread_scales(part_scales[part], ROWS)
            else:
                acc += d.to(tl.float32) * row_scale
    if BITS == 8:
        acc = multiply_apart(acc, _spread_scales(row_scales.to(tl.float32), ROWS))
    y = tl.sum(acc, axis=0)
    if residual is not None:
        y += addend.to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def supports_few_rows(n: int, k: int, rows: int, group_size: int | None, planes: int) -> bool:
    """Whether `linear_few_rows` shall take a weight `[N, K]` for so many rows.

    It does where it is faster than the GEMM, of which MOST_ROWS of its table tells: with more rows
    a program has less of their quantized columns for each of its weights.

    Args:
        group_size: None for INT8 weights; planes: INT8 planes of the activations.
    """
    bits = 8 if group_size is None else 4
    fits = supports_k(k) and group_size in (None, ACTIVATION_TILE) and planes == 1 and n >= 16
    return fits and rows <= find_config(f"linear_w{bits}_few_rows", out_features=n)["MOST_ROWS"]


def linear_few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    rows: int,
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[T, K]`, `supports_few_rows` given.

    Args:
        group_size: None for INT8 weights.
        rows: the largest T of all calls.

    Returns:
        `[T, N]` in x's dtype.
    """
    (m, k), bits = x.shape, 8 if group_size is None else 4
    padded_m = RowFormat.of_weights(rows, bits).padded_m
    quantized = quantize_rows(x, norm_weight, eps, k, 1, padded_m, False, 4, bits)
    return multiply_few_rows(QuantizedRows(*quantized), m, x.dtype, weight, scale, bits, residual)


def multiply_few_rows(
    x: QuantizedRows,
    m: int | torch.SymInt,
    dtype: torch.dtype,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The product of `linear_few_rows` with rows that are quantized already.

    Args:
        x: of `RowFormat.of_weights`; m: how many rows count.

    Returns:
        `[m, N]` in dtype.
    """
    n, blocks = weight.shape[0], weight.shape[1] // 128
    config = find_config(f"linear_w{bits}_few_rows", out_features=n)
    warps, block_n = min(config["num_warps"], blocks), min(config["BLOCK_N"], floor_power_of_two(n))
    out = scale.new_empty((m, n), dtype=dtype)
    launch(
        _few_rows_kernel,
        (cdiv(n, block_n),),
        *(*x, weight, scale, residual, out, m, n),
        BLOCKS=blocks,
        WARPS=warps,
        BITS=bits,
        BLOCK_N=block_n,
        ROWS=x.scale.shape[1],
        num_warps=warps,
    )
    return out

"""RMSNorm and quantization of whole rows, in registers and as a kernel ahead of a GEMM.

A row is quantized per tile of columns into one or two INT8 planes. One plane is what
`ops.quantize_int8` defines. Two planes hold 15 bits, r = 128 q1 + q0 with q1 in -127..127 and q0 in
-64..63. For Gaussian rows that is an error of 0.005%, a thirtieth of what rounding to bf16 costs.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int4 import NIBBLE_SCALE
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.ops import ACTIVATION_TILE


@triton.jit
def quantize_tiles(x, PLANES: tl.constexpr):
    """Quantizes tiles x, fp32 `[R, TILE]`, to r, int32 `[R, TILE]`, and fp32 scales `[R]`.

    `take_plane` takes the planes from r.
    """
    inverse, scale = compute_int8_scale(tl.max(tl.abs(x), axis=1))
    if PLANES == 2:
        inverse, scale = inverse * 128.0, scale * 0.0078125
    return round_to_int8(x * inverse[:, None]), scale


@triton.jit
def take_plane(r, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """int32 whose low byte is one plane of r, which is as from `quantize_tiles`.

    Of two planes, 0 is q1 and 1 is q0. Only the low 8 bits of r count, or 15 of two planes.
    """
    if PLANES == 1:
        return r
    high = ((r + 64) << 10) >> 17
    return high if PLANE == 0 else r - (high << 7)


@triton.jit
def _load_normed_row(
    x,
    norm_weight,
    eps,
    row,
    K: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Waits, and loads a row of x `[M, K]`: after RMSNorm, if norm_weight is given, and the columns
    that it has.

    Returns:
        fp32 `[TILES, TILE]`, rounded to x's dtype and zero from column K on, and int32 of the same
        shape.
    """
    WHOLE: tl.constexpr = K == TILES * TILE
    column = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x += row.to(tl.int64) * K
    inside = None if WHOLE else column < K
    other = None if WHOLE else 0.0
    if norm_weight is not None:
        # Behind the wait it would come after the weights that the next kernel asks for.
        gain = tl.load(norm_weight + column, mask=inside, other=other)
    wait_for_previous()
    value = tl.load(x + column, mask=inside, other=other).to(tl.float32)
    if norm_weight is not None:
        squares = tl.sum(tl.reshape(value * value, (TILES * TILE,)), axis=0)
        value = apply_rms_norm(value, gain, squares / K, eps, x.dtype.element_ty)
    return value, column


@triton.jit
def _norm_rows_kernel(
    x,
    norm_weight,
    out,
    eps,
    K: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """RMSNorm of one row of x `[M, K]` per program, rounded to x's dtype."""
    row = tl.program_id(0)
    value, column = _load_normed_row(x, norm_weight, eps, row, K, TILES, TILE)
    target = out + row.to(tl.int64) * K + column
    tl.store(target, value.to(out.dtype.element_ty), mask=column < K)


@triton.jit
def quantize_rows_kernel(
    x,
    norm_weight,
    q,
    scale,
    eps,
    PADDED_M,
    ROW_STRIDE,
    TILE_STRIDE,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
):
    """RMSNorm (if norm_weight is given) and quantization of one row of x `[M, K]` per program.

    q is int8 `[PLANES, PADDED_M, PADDED_K]`, zero from column K on. scale is fp32, times
    SCALE_FACTOR, of a row every ROW_STRIDE and of its tiles every TILE_STRIDE. Rows from M on are
    not written.

    Where K is a power of two, loads and sums have the layout of `_gemv_kernel` with as many
    warps, and results the same bits.
    """
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    value, column = _load_normed_row(x, norm_weight, eps, row, K, TILES, TILE)
    r, tile_scale = quantize_tiles(value, PLANES)
    # A thread stores the columns that it has loaded: 16 bytes of x.
    COLUMNS: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    for plane in tl.static_range(PLANES):
        target = q + (plane * PADDED_M + row).to(tl.int64) * PADDED_K + column
        target = tl.max_contiguous(target, (1, COLUMNS))
        tl.store(target, take_plane(r, plane, PLANES).to(tl.int8), mask=column < PADDED_K)
    at = scale + row * ROW_STRIDE + tile * TILE_STRIDE
    tl.store(at, tile_scale * SCALE_FACTOR, mask=tile * TILE < PADDED_K)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`ops.rms_norm` of x `[T, K]`, bf16 or fp32, in one launch."""
    x, (m, k) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    tiles = triton.next_power_of_2(cdiv(k, ACTIVATION_TILE))
    sizes = {"K": k, "TILES": tiles, "TILE": ACTIVATION_TILE}
    launch(_norm_rows_kernel, (m,), x, weight, out, eps, **sizes, num_warps=4)
    return out


def quantize_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    padded_k: int,
    planes: int,
    padded_m: int,
    scales_by_row: bool,
    num_warps: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, if norm_weight is given, and quantization of the rows of x `[T, K]`.

    Args:
        padded_k, padded_m: of the results; columns from K on are zero, rows from T on undefined.
        scales_by_row: whether the scales of a row stand side by side, else those of a tile.
        bits: of the weights, 4 or 8.

    Returns:
        int8 `[planes, padded_m, padded_k]` and the scales, fp32 `[padded_m, tiles]` or
        `[tiles, padded_m]`; for INT4 weights times `NIBBLE_SCALE`.
    """
    (m, k), tiles = x.shape, cdiv(padded_k, ACTIVATION_TILE)
    q = x.new_empty((planes, padded_m, padded_k), dtype=torch.int8)
    shape = (padded_m, tiles) if scales_by_row else (tiles, padded_m)
    scale = x.new_empty(shape, dtype=torch.float32)
    launch(
        quantize_rows_kernel,
        (m,),
        x,
        norm_weight,
        q,
        scale,
        eps,
        padded_m,
        tiles if scales_by_row else 1,
        1 if scales_by_row else padded_m,
        K=k,
        PADDED_K=padded_k,
        TILES=triton.next_power_of_2(tiles),
        TILE=ACTIVATION_TILE,
        PLANES=planes,
        SCALE_FACTOR=NIBBLE_SCALE.value if bits == 4 else 1.0,
        num_warps=num_warps,
    )
    return q, scale

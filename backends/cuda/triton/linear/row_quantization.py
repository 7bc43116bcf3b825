"""RMSNorm and quantization of whole rows, in registers and as a kernel ahead of a GEMM.

A row is quantized per tile of columns into one or two INT8 planes. One plane is what
`ops.quantize_int8` defines. Two planes hold 15 bits, r = 128 q1 + q0 with q1 in -127..127 and q0 in
-64..63. For Gaussian rows that is an error of 0.005%, a thirtieth of what rounding to bf16 costs.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.int8 import compute_int8_scale, round_to_int8
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm


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
def quantize_rows_kernel(
    x,
    norm_weight,
    q,
    scale,
    eps,
    PADDED_M,
    K: tl.constexpr,
    PADDED_K: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PLANES: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
):
    """RMSNorm (if norm_weight is given) and quantization of one row of x `[M, K]` per program.

    q is int8 `[PLANES, PADDED_M, PADDED_K]`, zero from column K on. scale is fp32
    `[ceil(PADDED_K / TILE), PADDED_M]`, times SCALE_FACTOR. Rows from M on are not written.
    """
    wait_for_previous()
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    value = tl.load(x + row.to(tl.int64) * K + column, mask=column < K, other=0.0).to(tl.float32)
    if norm_weight is not None:
        mean_square = tl.sum(tl.sum(value * value, axis=1), axis=0) / K
        gain = tl.load(norm_weight + column, mask=column < K, other=0.0)
        value = apply_rms_norm(value, gain, mean_square, eps, x.dtype.element_ty)
    r, tile_scale = quantize_tiles(value, PLANES)
    for plane in tl.static_range(PLANES):
        target = q + (plane * PADDED_M + row).to(tl.int64) * PADDED_K + column
        tl.store(target, take_plane(r, plane, PLANES).to(tl.int8), mask=column < PADDED_K)
    tl.store(scale + tile * PADDED_M + row, tile_scale * SCALE_FACTOR, mask=tile * TILE < PADDED_K)
